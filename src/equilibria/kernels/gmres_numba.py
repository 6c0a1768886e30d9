"""The Krylov space of GMRES, compiled for the CPU.

Words moved per float of the state with k vectors built: 3 k + 10, where the plain operations
move 4 k + 14: the first correction and the second round of products share a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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

# As in equilibria.core.status, which this lowest layer does not know.
RUNNING, SUCCESS, NONFINITE = -1, 0, 4


FIRST_VECTORS = 20
"""Room made at first; what easy backward systems take."""


class Arnoldi:
    """What `equilibria.linear.gmres` keeps of one Krylov space, and does with it.

    Args:
        u: where the cycle starts (B, D), float32 or float64.
        residual: b - (I - A) u there.
        size: vectors at most.
    """

    def __init__(self, u: Tensor, residual: Tensor, size: int) -> None:
        batch, width = u.shape
        room = min(size, FIRST_VECTORS)
        self._u, self._size, self._k = array(u), size, 0
        self._vectors = u.new_empty(batch, room + 1, width)
        self._basis = array(self._vectors)
        self._small = _empty_small(batch, room)
        self._beta = _begin(array(residual), self._basis, self._small[2])

    def extend(self, a: Callable[[Tensor], Tensor]) -> Tensor:
        """Add one vector and return the Euclidean norm (B,) of the best residual."""
        k = self._k
        if k + 1 == self._basis.shape[1]:
            self._make_room()
        product = a(self._vectors[:, k]).detach().contiguous()
        batch = product.shape[0]
        parallel = threads_for(product.numel()) > 1
        orthogonalise = _orthogonalise_parallel if parallel else _orthogonalise
        coefficients = orthogonalise(product.numpy(), self._basis, k + 1)
        norm = np.empty(batch, self._u.dtype)
        _rotate(coefficients, *self._small, k, norm)
        self._k = k + 1
        return torch.from_numpy(norm)

    def solution(self, own_size: Tensor) -> tuple[Tensor, Tensor]:
        """Point and residual, each sample in the space of its own size (B,)."""
        y, spent = _coefficients(*self._small[1:], self._beta, array(own_size), self._k)
        point, residual = np.empty_like(self._u), np.empty_like(self._u)
        parallel = threads_for(self._u.size) > 1
        combine = _combine_parallel if parallel else _combine
        combine(self._u, self._basis, y, spent, point, residual)
        return torch.from_numpy(point), torch.from_numpy(residual)

    def _make_room(self) -> None:
        """Double what is full: most systems are solved long before a restart."""
        batch, filled, width = self._basis.shape
        larger = min(2 * filled, self._size + 1)
        vectors = self._vectors.new_empty(batch, larger, width)
        vectors[:, :filled] = self._vectors
        self._vectors, self._basis = vectors, array(vectors)
        small = _empty_small(batch, larger - 1)
        for new, old in zip(small, self._small, strict=True):
            new[tuple(map(slice, old.shape))] = old
        self._small = small


def judge(
    norm: Tensor,
    target: Tensor,
    tolerance: Tensor,
    rounding: float,
    status: Tensor,
    steps: Tensor,
    made: int,
) -> bool:
    """Note in status and steps who has arrived or broken down; whether all have."""
    return _judge(
        array(norm), array(target), array(tolerance), rounding, array(status), array(steps), made
    )


@compiled
def _judge(
    norm: Array,
    target: Array,
    tolerance: Array,
    rounding: float,
    status: Array,
    steps: Array,
    made: int,
) -> bool:
    over = True
    for b in range(norm.shape[0]):
        if status[b] != RUNNING:
            continue
        finite = math.isfinite(norm[b])
        # zero is no solution, however loose the tolerance
        useless = target[b] > 0 and norm[b] >= target[b] * (1.0 - rounding)
        if finite and (norm[b] > tolerance[b] or useless):
            over = False
        else:
            status[b], steps[b] = (SUCCESS if finite else NONFINITE), made
    return over


def _empty_small(batch: int, room: int) -> tuple[Array, Array, Array, Array]:
    """Rotations (B, n + 1, n + 1), triangle (B, n, n), right side (B, n + 1), columns of I - H."""
    return (
        np.tile(np.eye(room + 1), (batch, 1, 1)),
        np.tile(np.eye(room), (batch, 1, 1)),
        np.zeros((batch, room + 1)),
        np.zeros((batch, room, room + 1)),
    )


@compiled
def _begin(residual: Array, basis: Array, right: Array) -> Array:
    """Write the first vector and the right side; return the length of the residual (B,)."""
    batch, width = residual.shape
    beta = np.empty(batch)
    for b in range(batch):
        square = 0.0
        for i in range(width):
            value = np.float64(residual[b, i])
            square += value * value
        beta[b] = right[b, 0] = math.sqrt(square)
        inverse = residual.dtype.type(1.0 / beta[b] if beta[b] > 0.0 else 0.0)
        for i in range(width):
            basis[b, 0, i] = residual[b, i] * inverse
    return beta


@compiled
def _coefficients(
    r: Array, right: Array, columns: Array, beta: Array, own_size: Array, k: int
) -> tuple[Array, Array]:
    """Weights of the basis vectors in the point (B, k) and in the residual (B, k + 1)."""
    batch = right.shape[0]
    y, spent = np.zeros((batch, k)), np.zeros((batch, k + 1))
    for b in range(batch):
        for i in range(own_size[b] - 1, -1, -1):
            value = right[b, i]
            for j in range(i + 1, own_size[b]):
                value -= r[b, i, j] * y[b, j]
            y[b, i] = value / r[b, i, i]
        spent[b, 0] = beta[b]
        for j in range(k):
            for i in range(j + 2):
                spent[b, i] -= columns[b, j, i] * y[b, j]
    return y, spent


def _combine_blocks(
    u: Array, basis: Array, y: Array, spent: Array, point: Array, residual: Array
) -> None:
    """u + V y, and V spent."""
    batch, width = u.shape
    blocks = (width + BLOCK - 1) // BLOCK
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        here, there, left = u[b, start:stop], point[b, start:stop], residual[b, start:stop]
        for i in range(stop - start):
            there[i] = here[i]
            left[i] = 0
        for j in range(spent.shape[1]):
            vector, share = basis[b, j, start:stop], u.dtype.type(spent[b, j])
            weight = u.dtype.type(y[b, j]) if j < y.shape[1] else u.dtype.type(0)
            for i in range(stop - start):
                there[i] += weight * vector[i]
                left[i] += share * vector[i]


_combine, _combine_parallel = compiled(_combine_blocks), compiled_parallel(_combine_blocks)


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
    coefficients: Array,
    q_transposed: Array,
    r: Array,
    right: Array,
    columns: Array,
    k: int,
    norm: Array,
) -> None:
    """Make the new column of I - H triangular by one more rotation, sample by sample."""
    for b in range(right.shape[0]):
        column, rotations = columns[b, k], q_transposed[b]
        for j in range(k + 2):
            column[j] = (1.0 if j == k else 0.0) - coefficients[b, j]
        for i in range(k):
            value = 0.0
            for j in range(k + 2):
                value += rotations[i, j] * column[j]
            r[b, i, k] = value
        above, below = 0.0, 0.0
        for j in range(k + 2):
            above += rotations[k, j] * column[j]
            below += rotations[k + 1, j] * column[j]
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
