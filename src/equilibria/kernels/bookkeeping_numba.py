"""The loop's own arithmetic, compiled for the CPU: norms in one pass, and questions about batches.

The questions compare and do nothing else, so that they answer bit for bit as PyTorch does.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from equilibria.kernels.compiler import (
    BLOCK,
    SMALL,
    Array,
    compiled,
    compiled_exactly,
    compiled_parallel,
    threads_for,
)

# As in equilibria.core.status, which this lowest layer does not know.
RUNNING, SUCCESS, DIVERGED, NONFINITE = -1, 0, 3, 4


def is_small(size: int) -> bool:
    """Whether so few floats are worked on faster here than by PyTorch's threads."""
    return size < SMALL


def norms(z: Array, fz: Array) -> Array:
    """Root mean squares of f(z) - z and of f(z), (2, B), in one pass over both."""
    both = np.empty((2, z.shape[0]), z.dtype)
    (_norms_parallel if threads_for(z.size) > 1 else _norms)(z, fz, both)
    return both


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


@compiled_exactly
def choose(rows: Array, where_true: Array, where_false: Array) -> Array:
    """Rows of one array where the mask says so, of the other elsewhere."""
    chosen = np.empty_like(where_true)
    for b in range(rows.shape[0]):
        source = where_true if rows[b] else where_false
        for i in range(chosen.shape[1]):
            chosen[b, i] = source[b, i]
    return chosen


@compiled_exactly
def judge(
    residual: Array,
    image: Array,
    rtol: float,
    atol: float,
    size: Array,
    limit: Array,
    growth: float,
    codes: Array,
    limits: Array,
) -> None:
    """Write codes (B,), 0 for success and 3 for diverged, and the new limits (2, B)."""
    kind, info = residual.dtype.type, np.finfo(residual.dtype)
    eps, tiny = kind(info.eps), kind(info.tiny)
    for b in range(residual.shape[0]):
        r, f, code = residual[b], image[b], RUNNING
        grown = f > limit[b]
        shrink = limit[b] / max(f, tiny) if grown else kind(1)
        tolerance = kind(rtol) * f * shrink * shrink + kind(atol)
        if r <= tolerance and (not grown or eps * f <= tolerance):
            code = SUCCESS
        if grown and eps * f > size[b]:
            code = DIVERGED
        codes[b] = code
        limits[0, b] = size[b] if grown or not r > size[b] else r
        limits[1, b] = limits[0, b] * kind(growth)


@compiled_exactly
def enter(
    codes: Array,
    residual: Array,
    kept_residual: Array,
    status: Array,
    num_steps: Array,
    step: int,
    best: bool,
) -> tuple[Array, Array, int, int]:
    """Close the books of one step, in `status` and `num_steps`.

    Returns:
        who is taken into the kept iterates (B,), who goes on (B,), and how many these are.
    """
    batch = residual.shape[0]
    taken, active = np.zeros(batch, np.bool_), np.zeros(batch, np.bool_)
    num_taken, num_active = 0, 0
    for b in range(batch):
        if status[b] != RUNNING:
            continue
        code = codes[b] if math.isfinite(residual[b]) else NONFINITE
        if best:
            better = residual[b] < kept_residual[b] and code != DIVERGED
            taken[b] = step > 0 and (better or code == SUCCESS)
        else:
            taken[b] = step > 0 and math.isfinite(residual[b])
        num_taken += taken[b]
        if code != RUNNING:
            status[b], num_steps[b] = code, step
        else:
            active[b] = True
            num_active += 1
    return taken, active, num_taken, num_active
