"""A point together with its image, and how far they are apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Pair(NamedTuple):
    z: Tensor
    fz: Tensor


class Iterate(_Pair):
    """A point `z` and its image `fz = f(z)`, both packed (B, D); one never travels alone."""

    @property
    def residual(self) -> Tensor:
        """f(z) - z (B, D), computed once where no gradients are recorded."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.fz - self.z
        kept: Tensor | None = self.__dict__.get("residual_")
        if kept is None:
            kept = self.__dict__["residual_"] = self.fz - self.z
        return kept


class Measurement(NamedTuple):
    """Per-sample root-mean-square norms (B,) of an iterate: of `f(z) - z` and of `f(z)`."""

    residual: Tensor
    image: Tensor

    @property
    def relative(self) -> Tensor:
        """`residual / image` (B,), zero where both are zero."""
        return self.residual / self.image.clamp_min(torch.finfo(self.image.dtype).tiny)


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension: (B, D) -> (B,).

    Used instead of the Euclidean norm so that an absolute tolerance means the same per component
    whatever the size of the state; a relative tolerance is the same in both norms.
    """
    return torch.linalg.vector_norm(x, dim=-1) * max(x.shape[-1], 1) ** -0.5


def measure(iterate: Iterate, scale: Tensor | None = None) -> Measurement:
    """Measure an iterate without recording gradients; `scale` (B,) corrects for padding."""
    with torch.no_grad():
        measured = Measurement(rms(iterate.residual), rms(iterate.fz))
        return measured if scale is None else Measurement(*(norm * scale for norm in measured))


def choose(rows: Tensor, where_true: Iterate, where_false: Iterate) -> Iterate:
    """Pick whole samples from two iterates by a mask `rows` (B,).

    `torch.where`, never multiplication: 0 * NaN is NaN and would poison a finished sample.
    """
    mask = rows.unsqueeze(-1)
    return Iterate(
        torch.where(mask, where_true.z, where_false.z),
        torch.where(mask, where_true.fz, where_false.fz),
    )
