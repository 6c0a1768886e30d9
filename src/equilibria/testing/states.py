"""One problem in every form that a state may take: trees, dtypes, layouts, one problem, ragged.

    f(z) = tanh(C z W + x),   |W| = 0.7

on packed (B, 12) rows, where C is the identity, or averages over rows that belong together. Each
kind of state says how the rows are dressed for `solve`; the answer is that of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError, nearest
from equilibria.core.state import State
from equilibria.testing.dense import implicit_gradients, newton

WIDTH = 12


@dataclass(frozen=True)
class _Kind:
    split: Callable[[Tensor], State]
    join: Callable[[Any], Tensor]
    batch: int = 3
    precision: float = 1e-12
    settings: dict[str, Any] = field(default_factory=dict)


class StateProblem:
    """The problem with its state in the form called `kind`, one of `STATES`.

    Call it as the map f; start from `z0`; pass `settings` to `solve`.

    Args:
        kind: form of the state.

    Attributes:
        sources: tensors that f depends on and that require a gradient: W, then x (B, 12).
        settings: keywords of `solve` that belong to the form, such as `segments`.
        precision: relative accuracy that the narrowest part of the state can hold.
        num_calls: how often f was called.

    Raises:
        UserError: there is no kind of that name.
    """

    def __init__(self, kind: str) -> None:
        if kind not in _KINDS:
            raise UserError(f"no kind of state is called {kind!r}{nearest(kind, _KINDS)}")
        self.kind = kind
        self._form = form = _KINDS[kind]
        self.settings, self.precision = form.settings, form.precision
        self.num_calls = 0
        draw = torch.Generator().manual_seed(3)
        weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=draw))[0]
        # One difficulty per sample, so that they finish at different steps.
        size = torch.linspace(0.2, 1.5, form.batch, dtype=torch.float64).unsqueeze(1)
        x = size * torch.randn(form.batch, WIDTH, dtype=torch.float64, generator=draw)
        self.sources = ((0.7 * weight).requires_grad_(), x.requires_grad_())
        self._coupling = _coupling(form)

    def __call__(self, state: State) -> State:
        self.num_calls += 1
        return self._form.split(self.packed(self._form.join(state)))

    def packed(self, z: Tensor) -> Tensor:
        """The same map on rows (B, 12) in float64."""
        weight, x = self.sources
        return torch.tanh(self._coupling @ z @ weight + x)

    def join(self, state: State) -> Tensor:
        """A state of this kind as rows (B, 12) in float64; differentiable."""
        return self._form.join(state)

    @property
    def z0(self) -> State:
        """Zeros in the form of this kind."""
        return self._form.split(torch.zeros_like(self.sources[1]).detach())

    @property
    def num_problems(self) -> int:
        """How many statuses a solution has."""
        if "segments" in self.settings:
            return int(self.settings["segments"].max()) + 1
        return 1 if self.settings.get("batch_dims") == 0 else self._form.batch

    @property
    def z_star(self) -> Tensor:
        """The fixed point as rows (B, 12), by dense Newton over the whole batch."""
        x = self.sources[1]
        start = torch.zeros(1, x.numel(), dtype=torch.float64)
        return newton(lambda z: self.packed(z.view_as(x)).reshape(1, -1), start).view_as(x)

    def gradients(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        """The exact gradients for `sources` of a loss with dL/dz* = `cotangent`, as rows."""
        return implicit_gradients(self.packed, self.z_star, cotangent, self.sources)

    def form_of(self, state: State) -> list[tuple[Any, ...]]:
        """What has to stay: tree, shapes, dtypes and memory format."""
        leaves, spec = pytree.tree_flatten(state)
        formats = [
            leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
            for leaf in leaves
        ]
        shapes = [(tuple(leaf.shape), leaf.dtype) for leaf in leaves]
        return [(spec, len(leaves)), *zip(shapes, formats, strict=True)]


def _coupling(form: _Kind) -> Tensor:
    index = form.settings.get("segments")
    if index is None:
        return torch.eye(form.batch, dtype=torch.float64)
    same = (index.unsqueeze(0) == index.unsqueeze(1)).double()
    return same / same.sum(1, keepdim=True)


def _as_it_is(z: Tensor) -> Tensor:
    return z


def _nested(z: Tensor) -> dict[str, Any]:
    return {"b": [z[:, 0], (z[:, 1:5].unflatten(1, (2, 2)),)], "a": {"rest": z[:, 5:]}}


def _from_nested(state: dict[str, Any]) -> Tensor:
    first, (second,) = state["b"]
    return torch.cat([first.unsqueeze(1), second.flatten(1), state["a"]["rest"]], dim=1)


def _mixed(z: Tensor) -> list[Tensor]:
    return [z[:, :4].float(), z[:, 4:]]


def _from_mixed(state: list[Tensor]) -> Tensor:
    return torch.cat([state[0].double(), state[1]], dim=1)


def _images(z: Tensor) -> Tensor:
    return z.unflatten(1, (2, 3, 2)).contiguous(memory_format=torch.channels_last)


def _strided(z: Tensor) -> Tensor:
    return z.unflatten(1, (3, 4)).mT.contiguous().mT


def _rows(state: Tensor) -> Tensor:
    return state.flatten(1)


_KINDS = {
    "tensor": _Kind(_as_it_is, _as_it_is),
    "tuple": _Kind(lambda z: (z[:, :5], z[:, 5:]), lambda state: torch.cat(state, dim=1)),
    "nested": _Kind(_nested, _from_nested),
    "mixed_dtypes": _Kind(_mixed, _from_mixed, precision=2e-7),
    "half": _Kind(lambda z: z.bfloat16(), lambda state: state.double(), precision=8e-3),
    "whole": _Kind(_as_it_is, _as_it_is, settings={"batch_dims": 0}),
    "segments": _Kind(
        _as_it_is, _as_it_is, batch=6, settings={"segments": torch.tensor([3, 0, 3, 3, 0, 1])}
    ),
    "channels_last": _Kind(_images, _rows),
    "strided": _Kind(_strided, _rows),
    "empty": _Kind(_as_it_is, _as_it_is, batch=0),
    "single": _Kind(_as_it_is, _as_it_is, batch=1),
}

STATES = tuple(_KINDS)
"""Every kind of state by its name."""
