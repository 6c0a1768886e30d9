"""The loop's own arithmetic, compiled for the CPU: norms in one pass, and questions about batches.

The questions compare and do nothing else, so that they answer bit for bit as PyTorch does.
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
    compiled,
    compiled_exactly,
    compiled_parallel,
    threads_for,
)


def norms(z: Array, fz: Array) -> Tensor:
    """Root mean squares of f(z) - z and of f(z), (2, B), in one pass over both."""
    both = np.empty((2, z.shape[0]), z.dtype)
    (_norms_parallel if threads_for(z.size) > 1 else _norms)(z, fz, both)
    return torch.from_numpy(both)


def _norms_by_blocks(z: Array, fz: Array, both: Array) -> None:
    batch, width = z.shape
    blocks = (width + BLOCK - 1) // BLOCK
    partial = np.empty((2, batch, blocks))
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        here, there = z[b, start:stop], fz[b, start:stop]
        residual, image = 0.0, 0.0  # in double, where squares neither overflow nor vanish
        for i in range(stop - start):
            difference, value = np.float64(there[i] - here[i]), np.float64(there[i])
            residual += difference * difference
            image += value * value
        partial[0, b, block], partial[1, b, block] = residual, image
    for which in range(2):
        for b in range(batch):
            square = 0.0
            for block in range(blocks):
                square += partial[which, b, block]
            both[which, b] = math.sqrt(square / max(width, 1))


_norms, _norms_parallel = compiled(_norms_by_blocks), compiled_parallel(_norms_by_blocks)


@compiled_exactly
def all_go_on(
    residual: Array, image: Array, rtol: float, atol: float, size: Array, limit: Array
) -> bool:
    """Whether no sample has arrived at its tolerance or left the range that is usual."""
    kind = residual.dtype.type
    for b in range(residual.shape[0]):
        tolerance = image[b] * kind(rtol) + kind(atol)
        if not (residual[b] > tolerance and residual[b] <= size[b] and image[b] <= limit[b]):
            return False
    return True


@compiled_exactly
def all_less(a: Array, b: Array) -> bool:
    """Whether a < b for every sample (B,)."""
    less = True
    for i in range(a.shape[0]):
        less = less and a[i] < b[i]
    return less
