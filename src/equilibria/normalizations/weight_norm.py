"""Weight normalisation, once per solve."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.core.errors import UserError
from equilibria.core.parametrized import make_picklable
from equilibria.normalizations.once_per_solve import normalize, wrap


class WeightNorm(nn.Module):
    """Parametrisation w = g v / |v| of any order of derivative.

    In plain operations: the fused one that PyTorch's own uses has a wrong second derivative by g
    and v (seen in 2.13), and none at all under torch.func. Names and shapes of the originals are
    PyTorch's, so state dictionaries go both ways.

    Args:
        dim: dimension that keeps its own lengths; None for one length of the whole weight.
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        return v * (g / self._length(v))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Length and direction of a weight."""
        return self._length(weight), weight

    def _length(self, v: Tensor) -> Tensor:
        if self.dim is None:
            return torch.linalg.vector_norm(v)
        others = [dim for dim in range(v.dim()) if dim != self.dim]
        return torch.linalg.vector_norm(v, dim=others, keepdim=True)


def add_weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> None:
    """Give one weight of a module a `WeightNorm`, computed at every access; in place.

    For modules that read their weights once per solve by themselves.

    Raises:
        UserError: the weight has no such dimension.
    """
    num_dims = getattr(module, name).dim()
    if dim is not None and dim not in range(num_dims):
        raise UserError(
            f"dim={dim!r} is none of the {num_dims} dimensions of {name!r}; count them from 0, or "
            "give None for one length of the whole weight"
        )
    parametrize.register_parametrization(module, name, WeightNorm(dim), unsafe=True)
    # Unsafe skips checks only: what is assigned comes back, but for rounding.
    make_picklable(module)
    module.register_load_state_dict_pre_hook(partial(_rename_old, name))


def weight_norm(
    model: nn.Module,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    dim: int | None = 0,
) -> list[str]:
    """Split weights into length and direction, w = g v / |v|; in place.

    The published DEQ language and vision models use it on every weight of the block: it keeps
    the Jacobian from growing with the norm of v. Computed once per solve. Parameters become
    `parametrizations.NAME.original0` (g) and `original1` (v), as with PyTorch's own.

    Args:
        model: a layer or a whole model; embeddings are left alone.
        include: names or patterns of the weights, as in "block.*.weight"; None takes all weights
            with two dimensions or more.
        exclude: names or patterns to leave out.
        dim: dimension that keeps its own lengths, 0 (outputs); None for one length per weight.

    Returns:
        The names of the normalised weights. Make the optimiser afterwards.

    Raises:
        UserError: a pattern that fits no weight, a dimension that a weight does not have.

    References:
        Salimans and Kingma, arXiv 1602.07868.
    """

    def register(module: nn.Module, name: str) -> None:
        add_weight_norm(module, name, dim)
        wrap(module, name, 0)

    return normalize(model, register, include, exclude)


def _rename_old(
    name: str, module: nn.Module, state: dict[str, Any], prefix: str, *_: object
) -> None:
    """Read what the deprecated `torch.nn.utils.weight_norm` has saved."""
    for old, new in ((f"{name}_g", "original0"), (f"{name}_v", "original1")):
        if f"{prefix}{old}" in state:
            state[f"{prefix}parametrizations.{name}.{new}"] = state.pop(f"{prefix}{old}")
