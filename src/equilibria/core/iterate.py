"""A point together with its image, and how far they are apart."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.core.fused import Shared, as_array, carries_derivatives
from equilibria.core.precision import widest


class _Pair(NamedTuple):
    z: Tensor
    fz: Tensor


class Iterate(_Pair, Shared):
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

    def forget_residual(self) -> None:
        """Give its memory back; it is computed anew where somebody asks again."""
        self.__dict__.pop("residual_", None)


class _Norms(NamedTuple):
    residual: Tensor
    image: Tensor


class Measurement(_Norms, Shared):
    """Per-sample root-mean-square norms (B,) of an iterate: of `f(z) - z` and of `f(z)`."""

    kernels: ModuleType | None = None
    """The compiled "bookkeeping", if the norms are its own: it answers the questions, too."""

    @property
    def relative(self) -> Tensor:
        """`residual / image` (B,), zero where both are zero."""
        return self.residual / self.image.clamp_min(torch.finfo(self.image.dtype).tiny)

    def of_rows(self, rows: Tensor) -> Measurement:
        """That of some samples only, given by their indices."""
        return self._made_alike(*(norm[rows] for norm in self))

    def where(self, rows: Tensor, other: Measurement) -> Measurement:
        """These norms for samples in the mask `rows` (B,), and the other's for the rest."""
        both = zip(self, other, strict=True)
        return self._made_alike(*(torch.where(rows, one, two) for one, two in both))

    def _made_alike(self, residual: Tensor, image: Tensor) -> Measurement:
        made = Measurement(residual, image)
        made.kernels = self.kernels
        return made

    def all_go_on(self, rtol: float, atol: float, limits: Limits) -> bool:
        """Whether every residual is above its tolerance, and no norm above its limit."""
        if self.kernels is not None:
            return self.kernels.all_go_on(*self.arrays, rtol, atol, *limits.arrays)
        residual, image = self
        tolerance = image * rtol + atol
        # Not "<=", which a NaN would pass.
        within = (residual <= limits.residual) & (image <= limits.image)
        return bool((within & (residual > tolerance)).all())

    def judged(
        self, rtol: float, atol: float, limits: Limits, growth: float
    ) -> tuple[Tensor, Limits]:
        """The criterion of `Residual` by the compiled steps: codes (B,), and the new limits."""
        if self.kernels is None:
            raise RuntimeError("there are no compiled steps to judge by")
        codes = torch.empty_like(self.residual, dtype=torch.int8)
        both = self.residual.new_empty(2, len(self.residual))
        self.kernels.judge(
            *self.arrays, rtol, atol, *limits.arrays, growth, codes.numpy(), both.numpy()
        )
        return codes, Limits(*both.unbind())

    def all_improve_on(self, other: Measurement) -> bool:
        """Whether every residual is smaller than in another measurement."""
        if self.kernels is not None:
            return self.kernels.all_less(self.arrays[0], other.arrays[0])
        return bool((self.residual < other.residual).all())


class _TwoNorms(NamedTuple):
    residual: Tensor
    image: Tensor


class Limits(_TwoNorms, Shared):
    """Norms (B,) that a residual and an image are not expected to exceed."""


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension: (B, D) -> (B,).

    Used instead of the Euclidean norm so that an absolute tolerance means the same per component
    whatever the size of the state; a relative tolerance is the same in both norms.
    """
    return torch.linalg.vector_norm(x, dim=-1) * max(x.shape[-1], 1) ** -0.5


def measure(
    iterate: Iterate, scale: Tensor | None = None, fused: ModuleType | None = None
) -> Measurement:
    """Measure an iterate without recording gradients; `scale` (B,) corrects for padding.

    `fused` are the compiled steps "bookkeeping", if there are any.
    """
    if fused is not None and scale is None:
        norms = fused.norms(*iterate.arrays)
        measured = Measurement(*torch.from_numpy(norms).unbind())
        measured.kernels, measured.__dict__["arrays_"] = fused, tuple(norms)
        return measured
    with torch.no_grad():
        measured = Measurement(rms(iterate.residual), rms(iterate.fz))
        return measured if scale is None else Measurement(*(norm * scale for norm in measured))


SAFE = 1e-17, 1e17
"""Norms whose squares are far from the ends of single precision."""


def measured_wide(
    iterate: Iterate, measured: Measurement, scale: Tensor | None = None
) -> Measurement | None:
    """The norms by way of double, where squares in single precision vanish or overflow.

    None where they are what they seem. Waits for the device; only for where somebody seems to have
    finished. The compiled norms are by way of double always.
    """
    double = widest(iterate.z.device)
    if measured.kernels is not None or iterate.z.dtype == double:
        return None
    with torch.no_grad():
        norms = torch.stack(tuple(measured))
        if bool(((norms > SAFE[0]) & (norms < SAFE[1])).all()):
            return None
        wide = (rms(x.to(double)).to(x.dtype) for x in (iterate.residual, iterate.fz))
        return Measurement(*(norm if scale is None else norm * scale for norm in wide))


def choose(
    rows: Tensor, where_true: Iterate, where_false: Iterate, fused: ModuleType | None = None
) -> Iterate:
    """Pick whole samples from two iterates by a mask `rows` (B,)."""
    both = zip(where_true, where_false, strict=True)
    return Iterate(*(choose_rows(rows, one, other, fused) for one, other in both))


def choose_rows(
    rows: Tensor, where_true: Tensor, where_false: Tensor, fused: ModuleType | None = None
) -> Tensor:
    """Pick whole rows from two tensors (B, D) by a mask `rows` (B,).

    A choice, never multiplication: 0 * NaN is NaN and would poison a finished sample. `fused` is
    the compiled "bookkeeping", which is quicker for small states.
    """
    if fused is not None and not carries_derivatives() and fused.is_small(where_true.numel()):
        arrays = (as_array(tensor) for tensor in (rows, where_true, where_false))
        return torch.from_numpy(fused.choose(*arrays))
    return torch.where(rows.unsqueeze(-1), where_true, where_false)
