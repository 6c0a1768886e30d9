"""Anderson's step in two passes over the history, compiled for the CPU.

What `equilibria.solvers.anderson` does with some thirty operations of PyTorch, done in one call.
Words moved per float of the state and step, with n differences kept: 3 n + 8 for type I, 2 n + 8
for type II.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equilibria.kernels.compiler import Pair, array, threads_for
from equilibria.kernels.passes_numba import (
    all_rows,
    mix,
    mix_parallel,
    push_and_multiply,
    push_and_multiply_parallel,
)
from equilibria.kernels.small_systems_numba import anderson_weights


class Step:
    """Anderson's step on the memory of one solve.

    Args:
        tests: the ring (B, size, D) of point (type I) or residual (II) differences.
        images: the ring of image differences.
        squares: S^T S (B, size, size) of type I; not used by type II.
        gram: S^T (S - F) of type I, R^T R of type II.
        kind: see `Anderson`, as for the rest.
        ridge: relative regularisation.
        min_angle: below it, in radians, a difference is left out.
        relaxation: 1 is undamped.
    """

    def __init__(
        self,
        tests: Tensor,
        images: Tensor,
        squares: Tensor,
        gram: Tensor,
        *,
        kind: Literal["I", "II"],
        ridge: float,
        min_angle: float,
        relaxation: float,
    ) -> None:
        self._history = array(tests), array(images)
        self._small = array(squares), array(gram)
        self._first = kind == "I"
        self._options = ridge, min_angle
        self._relaxation = relaxation

    def propose(self, now: Pair, before: Pair, slot: int, filled: int) -> Tensor:
        """The next point (B, D); writes the new differences and their products into the memory.

        `slot` is where they go, `filled` how many slots count, that one included.
        """
        first, arrays, history = self._first, now.arrays, self._history
        parallel = threads_for(arrays[0].size) > 1
        push = push_and_multiply_parallel if parallel else push_and_multiply
        blend = mix_parallel if parallel else mix
        rows = all_rows(arrays[0].shape[0])
        products = push(*arrays, *before.arrays, *history, slot, filled, first, rows)
        gamma = anderson_weights(products, *self._small, slot, first, *self._options)
        out = np.empty_like(arrays[0])
        blend(*arrays, *history, gamma, self._relaxation, 1 if first else 2, out)
        return torch.from_numpy(out)
