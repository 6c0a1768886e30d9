"""Broyden's step in two passes over the pairs, compiled for the CPU.

Words moved per float of the state and step, with n pairs kept: 3 n + 8 for the good method, 2 n + 8
for the bad one.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equilibria.kernels.compiler import Array, Pair, array, compiled, threads_for
from equilibria.kernels.passes_numba import (
    all_rows,
    mix,
    mix_parallel,
    push_and_multiply,
    push_and_multiply_parallel,
)
from equilibria.kernels.small_systems_numba import broyden_weights


class Step:
    """Broyden's step on the memory of one solve.

    Args:
        vectors: the ring (B, size, D) of steps (good) or residual differences (bad).
        images: the ring of image differences.
        squares: products of the vectors with themselves (B, size, size).
        by_images: products of vectors with image differences; not used by the bad method.
        born: which pair is in each slot (B, size), counted from 0.
        kind: see `Broyden`.
        relaxation: 1 is the full step.
    """

    def __init__(
        self,
        vectors: Tensor,
        images: Tensor,
        squares: Tensor,
        by_images: Tensor,
        born: Tensor,
        *,
        kind: Literal["good", "bad"],
        relaxation: float,
    ) -> None:
        self._history = array(vectors), array(images)
        self._small = array(squares), array(by_images), array(born)
        batch, size, _ = squares.shape
        self._inverses = np.empty((batch, size, size)), np.zeros(batch, np.int64)
        self._good = kind == "good"
        self._relaxation = relaxation

    def propose(self, now: Pair, before: Pair, count: int) -> Tensor:
        """The next point (B, D); writes pair number `count` and its products into the memory."""
        good, arrays, history = self._good, now.arrays, self._history
        parallel = threads_for(arrays[0].size) > 1
        push = push_and_multiply_parallel if parallel else push_and_multiply
        blend = mix_parallel if parallel else mix
        size = history[0].shape[1]
        slot, filled = count % size, min(count + 1, size)
        # As in BroydenState.push: who rests keeps the oldest pair if there is no room for another.
        roomy = good and count < size
        rows = all_rows(len(arrays[0])) if roomy else _moved(arrays[0], before.arrays[0])
        products = push(*arrays, *before.arrays, *history, slot, filled, good, rows)
        weights = broyden_weights(products, *self._small, *self._inverses, rows, slot, count, good)
        out = np.empty_like(arrays[0])
        blend(*arrays, *history, weights, self._relaxation, 0, out)
        return torch.from_numpy(out)


@compiled
def _moved(z: Array, previous_z: Array) -> Array:
    """Mask (B,) of the samples that are somewhere else than before."""
    moved = np.empty(z.shape[0], np.bool_)
    for b in range(z.shape[0]):
        length = z.dtype.type(0)
        for i in range(z.shape[1]):
            step = z[b, i] - previous_z[b, i]
            length += step * step
        moved[b] = length > 0 and math.isfinite(length)
    return moved
