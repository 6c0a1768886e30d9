"""Weight normalisation, once per solve."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.utils import parametrizations

from equilibria.normalizations.once_per_solve import normalize, wrap


def weight_norm(
    model: nn.Module,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    dim: int | None = 0,
) -> list[str]:
    """Split weights into length and direction, w = g v / |v|; in place.

    The published DEQ language and vision models use it on every weight of the block: it keeps
    the Jacobian from growing with the norm of v. PyTorch's parametrisation, computed once per
    solve. Parameters become `parametrizations.NAME.original0` (g) and `original1` (v).

    Args:
        model: a layer or a whole model; embeddings are left alone.
        include: names or patterns of the weights, as in "block.*.weight"; None takes all weights
            with two dimensions or more.
        exclude: names or patterns to leave out.
        dim: dimension that keeps its own lengths, 0 (outputs); None for one length per weight.

    Returns:
        The names of the normalised weights. Make the optimiser afterwards.

    Raises:
        UserError: a pattern that fits no weight.

    References:
        Salimans and Kingma, arXiv 1602.07868.
    """

    def register(module: nn.Module, name: str) -> None:
        parametrizations.weight_norm(module, name, dim if dim is not None else -1)
        wrap(module, name, 0)

    return normalize(model, register, include, exclude)
