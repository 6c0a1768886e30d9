"""Spectral normalisation, once per solve."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.parametrized import make_picklable
from equilibria.normalizations.once_per_solve import normalize, wrap


class _Scaled(nn.Module):
    """weight -> coefficient * weight."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, weight: Tensor) -> Tensor:
        return self.coefficient * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.coefficient


def spectral_norm(
    model: nn.Module,
    *,
    coefficient: float = 1.0,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    num_iterations: int = 1,
) -> list[str]:
    """Divide weights by their largest singular value, w = c v / sigma(v); in place.

    With c < 1 on the recurrent weight, z = tanh(W z + x) is a contraction, whatever training
    does. Sigma comes from power iteration with vectors kept as buffers; they are advanced once
    per solve in training mode and left alone in eval mode. PyTorch's parametrisation: a kernel
    counts as the matrix (outputs, rest), whose sigma is below the norm of the convolution, so
    there c < 1 alone is no guarantee.

    Args:
        model: a layer or a whole model; embeddings are left alone.
        coefficient: the singular value aimed at (c).
        include: names or patterns of the weights; None takes all with two dimensions or more.
        exclude: names or patterns to leave out.
        num_iterations: power iterations per solve.

    Returns:
        The names of the normalised weights. Make the optimiser afterwards.

    Raises:
        UserError: a pattern that fits no weight, a coefficient that is not positive,
            num_iterations below 1.

    References:
        Miyato et al., arXiv 1802.05957.
    """
    if not coefficient > 0:
        raise UserError(f"coefficient={coefficient} of spectral_norm must be above 0")
    check_positive_integer("num_iterations", num_iterations)

    def register(module: nn.Module, name: str) -> None:
        parametrizations.spectral_norm(module, name, num_iterations)
        if coefficient != 1.0:
            parametrize.register_parametrization(module, name, _Scaled(coefficient))
        wrap(module, name, 0)
        make_picklable(module)

    return normalize(model, register, include, exclude)
