"""Anderson's step in two passes over the history, compiled for the CPU.

What `equilibria.solvers.anderson` does with some thirty operations of PyTorch, done in one call.
Words moved per float of the state and step, with n differences kept: 3 n + 8 for type I, 2 n + 8
for type II.
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
    solve_in_place,
)


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
        gamma = _weights(products, *self._small, slot, first, *self._options)
        out = np.empty_like(arrays[0])
        blend(*arrays, *history, gamma, self._relaxation, 1 if first else 2, out)
        return torch.from_numpy(out)


@compiled
def _weights(
    products: Array,
    squares: Array,
    gram: Array,
    slot: int,
    first: bool,
    ridge: float,
    min_angle: float,
) -> Array:
    """Update the small matrices and solve for -gamma (B, n), the weights of image differences."""
    batch, _, n = products.shape
    weights = np.empty((batch, n))
    unit, factor, right, scale = np.empty((n, n)), np.empty((n, n)), np.empty(n), np.empty(n)
    order = np.empty(n, np.int64)  # newest first
    for i in range(n):
        order[i] = (slot - i) % n
    for b in range(batch):
        by_test, image_by_test = products[b, 0], products[b, 1]
        test_by_image, residual_by_test = products[b, 2], products[b, 3]
        small = gram[b]
        if first:
            for j in range(n):
                squares[b, j, slot] = by_test[j]
                squares[b, slot, j] = by_test[j]
                # S - F is positive on a contraction, R = F - S is not.
                small[j, slot] = by_test[j] - image_by_test[j]
            for j in range(n):
                small[slot, j] = by_test[j] - test_by_image[j]
            _scales(squares[b], order, min_angle, scale, factor)
        else:
            for j in range(n):
                small[j, slot] = by_test[j]
                small[slot, j] = by_test[j]
            _scales(small, order, min_angle, scale, factor)
        for i in range(n):
            right[i] = scale[i] * residual_by_test[i]
            for j in range(n):
                unit[i, j] = small[i, j] * scale[i] * scale[j]
                if scale[i] == 0.0 or scale[j] == 0.0:
                    unit[i, j] = 0.0  # whatever is there, finite or not
            if scale[i] == 0.0:
                right[i], unit[i, i] = 0.0, 1.0
            elif first:
                unit[i, i] += ridge
            else:
                unit[i, i] = 1.0 + ridge
        solve_in_place(unit, right)
        total = 0.0
        for j in range(n):
            right[j] *= scale[j] if first else -scale[j]
            total += right[j]
        usable = math.isfinite(total)  # else the plain step
        for j in range(n):
            weights[b, j] = right[j] if usable else 0.0
    return weights


@compiled
def _scales(squares: Array, order: Array, min_angle: float, scale: Array, factor: Array) -> None:
    """One over the lengths; 0 for what newer differences span, by Cholesky from the newest on."""
    info, n = np.finfo(squares.dtype), order.shape[0]
    for j in range(n):
        scale[j] = 1.0 / math.sqrt(max(squares[j, j], info.tiny ** (2.0 / 3.0)))
    if min_angle == 0.0:
        return
    for i in range(n):
        row = order[i]
        for k in range(i + 1):
            column = order[k]
            value = squares[row, column] * scale[row] * scale[column]
            if i == k:
                value += 10.0 * info.eps
            for q in range(k):
                value -= factor[i, q] * factor[k, q]
            factor[i, k] = math.sqrt(value) if i == k else value / factor[k, k]
    for i in range(n):
        if not factor[i, i] >= min_angle:  # so written, because a pivot may be NaN
            scale[order[i]] = 0.0
