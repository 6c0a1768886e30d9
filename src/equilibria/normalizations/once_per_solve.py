"""What every normalisation here shares: computed once per solve, over whole models, removable."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from equilibria.core.errors import UserError, nearest
from equilibria.core.scope import once


class OncePerSolve(nn.Module):
    """A parametrisation that is computed once per solve instead of at every access.

    A wrapper around PyTorch's own, whose parameters and buffers keep their names: state
    dictionaries are the same with and without it. Outside of a solve it is computed at every
    access.
    """

    def __init__(self, parametrization: nn.Module) -> None:
        super().__init__()
        self.parametrization = parametrization

    def forward(self, *originals: Tensor) -> Tensor:
        """The weight."""
        return once(self, lambda: self.parametrization(*originals))

    def right_inverse(self, weight: Tensor) -> Any:
        """The original tensors from which the weight comes."""
        inverse = getattr(self.parametrization, "right_inverse", None)
        return weight if inverse is None else inverse(weight)


def wrap(module: nn.Module, name: str, position: int) -> None:
    """Compute one of the parametrisations that `module.name` has once per solve."""
    parametrizations = cast("nn.ModuleDict", module.parametrizations)[name]
    chain = cast("parametrize.ParametrizationList", parametrizations)
    chain[position] = OncePerSolve(chain[position])


def normalize(
    model: nn.Module,
    register: Callable[[nn.Module, str], None],
    include: Collection[str] | None,
    exclude: Collection[str],
) -> list[str]:
    """Apply `register` to weights of a model and return their names.

    Raises:
        UserError: a pattern that fits no weight.
    """
    weights = dict(_weights(model))
    for pattern in (*(include or ()), *exclude):
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise UserError(
                f"the pattern {pattern!r} fits no weight{nearest(pattern, list(weights))} (there "
                f"are: {', '.join(weights) or 'none'})"
            )
    chosen = {
        name: place
        for name, place in weights.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    for module, local_name in chosen.values():
        register(module, local_name)
    return list(chosen)


def remove_normalization(model: nn.Module) -> list[str]:
    """Replace every normalised weight by a plain parameter of its present value, in place.

    Returns the names of the weights. An optimiser made before holds the old parameters: make a
    new one.
    """
    removed: list[str] = []
    for path, module in model.named_modules():
        for name, kinds in list(getattr(module, "parametrizations", {}).items()):
            if any(isinstance(kind, OncePerSolve) for kind in kinds):
                parametrize.remove_parametrizations(module, name)
                removed.append(f"{path}.{name}" if path else name)
    return removed


def _weights(model: nn.Module) -> list[tuple[str, tuple[nn.Module, str]]]:
    """Every matrix or kernel of a layer: linear, convolution, attention, recurrent, their kin.

    By shape and not by class, so that subclasses and the in-projection of attention are not
    skipped; embeddings are tables of vectors and left out.
    """
    return [
        (f"{path}.{name}" if path else name, (module, name))
        for path, module in model.named_modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag | parametrize.ParametrizationList)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and "weight" in name
    ]
