"""A map that writes to its argument, or to what it returned before, is found out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError
from equilibria.core.state import State


class Untouched:
    """Notices whether a state is written to while this watches it.

    If f wrote its image into z, then z and f(z) would be one tensor, the residual 0, and any point
    a fixed point. PyTorch counts the writes to a tensor; only in inference mode it does not, and
    the numbers are compared instead. Inside transforms and compiled code, which functionalise
    writes, nothing is watched.
    """

    def __init__(self, state: State, complaint: str) -> None:
        self._complaint = complaint
        blind = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        leaves = [
            leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and not blind
        ]
        self._counted = [(leaf, leaf._version) for leaf in leaves if not leaf.is_inference()]  # pyright: ignore[reportPrivateUsage]
        self._copied = [(leaf, leaf.clone()) for leaf in leaves if leaf.is_inference()]

    def check(self) -> None:
        """Raise UserError if it was written to."""
        if any(leaf._version != version for leaf, version in self._counted) or any(  # pyright: ignore[reportPrivateUsage]
            not torch.equal(leaf.nan_to_num(), before.nan_to_num()) for leaf, before in self._copied
        ):
            raise UserError(self._complaint)


WROTE_TO_ARGUMENT = (
    "f wrote to the state that it was given, so that z and f(z) are one tensor; use operations "
    "that are not in place (z + x for z += x, z.mul(a) for z.mul_(a)), or begin f with "
    "z = z.clone()"
)
WROTE_TO_IMAGE = (
    "f wrote to a state that it had returned before (a buffer that it uses again, out=...), so "
    "that every image of the solve is the last one; return a new tensor, for example with .clone()"
)
