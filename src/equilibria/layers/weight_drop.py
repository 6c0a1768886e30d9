"""DropConnect: single weights are dropped, the same ones during a whole solve."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.core.errors import UserError, nearest
from equilibria.core.parametrized import make_picklable
from equilibria.core.scope import once
from equilibria.layers.variational_dropout import dropout_mask


class WeightDrop(nn.Module):
    """Parametrisation weight -> weight * mask in training mode, one mask per solve.

    Entries of the mask are 0 or 1 / (1 - p). Outside of a solve every access draws anew.

    Args:
        p: probability that a weight is dropped, 0 to 1.

    References:
        Wan et al., Regularization of neural networks using DropConnect, ICML 2013. On recurrent
        weights: Merity, Keskar and Socher, arXiv 1708.02182.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise UserError(f"p={p} is no probability; give a number from 0 to 1")
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with entries dropped; in eval mode the weight itself."""
        if not self.training or self.p == 0.0:
            return weight
        return once(self, lambda: weight * dropout_mask(weight, weight.shape, self.p))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning a weight stores it as it is."""
        return weight


def weight_drop(module: nn.Module, p: float = 0.5, names: Collection[str] = ("weight",)) -> None:
    """Drop weights of `module` by a `WeightDrop` parametrisation; in place.

    Args:
        module: a layer, for example an `nn.Linear`.
        p: probability that a weight is dropped.
        names: its parameters that are to be dropped, for example ("weight_hh_l0",).

    Raises:
        UserError: the module has no parameter of that name, or p is no probability.
    """
    known = [name for name, _ in module.named_parameters(recurse=False)]
    known += list(getattr(module, "parametrizations", {}))
    for name in names:
        if name not in known:
            raise UserError(
                f"{type(module).__name__} has no parameter {name!r}{nearest(name, known)} (it "
                f"has: {', '.join(known) or 'none'})"
            )
        parametrize.register_parametrization(module, name, WeightDrop(p))
        make_picklable(module)
