"""One step of Arnoldi's process with its rotation, compiled for the CPU.

Words moved per float of the state with k vectors built: 3 k + 10, where the plain operations
move 4 k + 14: the first correction and the second round of products share a pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from equilibria.kernels.compiler import (
    BLOCK,
    Array,
    array,
    compiled,
    compiled_parallel,
    threads_for,
)


class Step:
    """Arnoldi's step on the memory of one Krylov space.

    Args:
        basis: orthonormal vectors (B, size, D).
        q_transposed: the rotations (B, size, size).
        r: the triangular factor (B, size - 1, size - 1).
        right: the rotated right side (B, size).
    """

    def __init__(self, basis: Tensor, q_transposed: Tensor, r: Tensor, right: Tensor) -> None:
        self._basis = array(basis)
        self._small = array(q_transposed), array(r), array(right)

    def extend(self, product: Array, k: int) -> tuple[Tensor, Tensor]:
        """Make vector k + 1 from A v_k (B, D), which is not written to, and rotate its column.

        Returns:
            the new column of I - H (B, k + 2), and the norm (B,) of the best residual.
        """
        batch = product.shape[0]
        parallel = threads_for(product.size) > 1
        orthogonalise = _orthogonalise_parallel if parallel else _orthogonalise
        coefficients = orthogonalise(product, self._basis, k + 1)
        column, norm = np.empty((batch, k + 2)), np.empty(batch, product.dtype)
        _rotate(coefficients, *self._small, k, column, norm)
        return torch.from_numpy(column), torch.from_numpy(norm)


def _orthogonalise_blocks(product: Array, basis: Array, filled: int) -> Array:
    """Gram-Schmidt twice, into slot `filled`; coefficients and the last length, (B, filled + 1)."""
    batch, width = product.shape
    blocks = (width + BLOCK - 1) // BLOCK
    partial = np.empty((batch, blocks, filled + 1))
    total = np.empty((batch, filled + 1))
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        vector = product[b, start:stop]
        for j in range(filled):
            other, inner = basis[b, j, start:stop], product.dtype.type(0)
            for i in range(stop - start):
                inner += vector[i] * other[i]
            partial[b, block, j] = inner
    first = _summed(partial, filled)
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        vector, target = product[b, start:stop], basis[b, filled, start:stop]
        for i in range(stop - start):
            target[i] = vector[i]
        for j in range(filled):
            other, weight = basis[b, j, start:stop], product.dtype.type(first[b, j])
            for i in range(stop - start):
                target[i] -= weight * other[i]
        for j in range(filled):
            other, inner = basis[b, j, start:stop], product.dtype.type(0)
            for i in range(stop - start):
                inner += target[i] * other[i]
            partial[b, block, j] = inner
    again = _summed(partial, filled)
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        target, square = basis[b, filled, start:stop], product.dtype.type(0)
        for j in range(filled):
            other, weight = basis[b, j, start:stop], product.dtype.type(again[b, j])
            for i in range(stop - start):
                target[i] -= weight * other[i]
        for i in range(stop - start):
            square += target[i] * target[i]
        partial[b, block, filled] = square
    for b in range(batch):
        square = 0.0
        for block in range(blocks):
            square += partial[b, block, filled]
        total[b, filled] = math.sqrt(square)
        for j in range(filled):
            total[b, j] = first[b, j] + again[b, j]
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        # 0 for a length of 0: the space is exhausted, the solution exact
        inverse = product.dtype.type(1.0 / total[b, filled] if total[b, filled] > 0.0 else 0.0)
        target = basis[b, filled, start:stop]
        for i in range(stop - start):
            target[i] *= inverse
    return total


@compiled
def _summed(partial: Array, filled: int) -> Array:
    batch, blocks, _ = partial.shape
    sums = np.zeros((batch, filled))
    for b in range(batch):
        for block in range(blocks):
            for j in range(filled):
                sums[b, j] += partial[b, block, j]
    return sums


_orthogonalise, _orthogonalise_parallel = (
    compiled(_orthogonalise_blocks),
    compiled_parallel(_orthogonalise_blocks),
)


@compiled
def _rotate(
    coefficients: Array, q_transposed: Array, r: Array, right: Array, k: int, column: Array,
    norm: Array,
) -> None:  # fmt: skip
    """Make the new column triangular by one more rotation, sample by sample."""
    for b in range(right.shape[0]):
        for j in range(k + 2):
            column[b, j] = (1.0 if j == k else 0.0) - coefficients[b, j]
        rotations = q_transposed[b]
        for i in range(k):
            value = 0.0
            for j in range(k + 2):
                value += rotations[i, j] * column[b, j]
            r[b, i, k] = value
        above, below = 0.0, 0.0
        for j in range(k + 2):
            above += rotations[k, j] * column[b, j]
            below += rotations[k + 1, j] * column[b, j]
        length = math.sqrt(above * above + below * below)
        # A column of zeros, with the space exhausted, can take nothing off the residual.
        cosine, sine = (above / length, below / length) if length != 0.0 else (0.0, 1.0)
        r[b, k, k] = length if length != 0.0 else 1.0
        for j in range(k + 2):
            upper, lower = rotations[k, j], rotations[k + 1, j]
            rotations[k, j] = cosine * upper + sine * lower
            rotations[k + 1, j] = cosine * lower - sine * upper
        before = right[b, k]
        right[b, k], right[b, k + 1] = cosine * before, -sine * before
        norm[b] = abs(right[b, k + 1])
