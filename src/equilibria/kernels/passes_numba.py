"""The two passes over the history that mixing and quasi-Newton steps are made of.

Work is cut into blocks of a sample, which are independent. Inside a block products are summed in
the precision of the state, over blocks in double and always in the same order, so a result depends
neither on the number of threads nor on the other samples of the batch.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import prange

from equilibria.kernels.compiler import BLOCK, Array, compiled, compiled_parallel

BY_TEST, IMAGE_BY_TEST, TEST_BY_IMAGE, RESIDUAL_BY_TEST = 0, 1, 2, 3
"""Rows of the products: of the new test difference with all of them, and so on."""


def _push_and_multiply(
    z: Array,
    fz: Array,
    previous_z: Array,
    previous_fz: Array,
    tests: Array,
    images: Array,
    slot: int,
    filled: int,
    points: bool,
    rows: Array,
) -> Array:
    """Write the new differences into `slot`, and multiply with all `filled` ones: (B, 4, n).

    Tests are differences of points, or of residuals. Samples outside of `rows` keep what is in the
    slot, and that is multiplied. The two rows of products with image differences are made for
    points only. Words per float: 6 + 2 n, or 6 + n.
    """
    batch, width = z.shape
    blocks = (width + BLOCK - 1) // BLOCK
    partial = np.empty((batch, blocks, 4, filled))
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        residual = np.empty(stop - start, z.dtype)
        test, image = tests[b, slot, start:stop], images[b, slot, start:stop]
        here, there = z[b, start:stop], fz[b, start:stop]
        before, image_before = previous_z[b, start:stop], previous_fz[b, start:stop]
        for i in range(stop - start):
            residual[i] = there[i] - here[i]
        if rows[b]:
            for i in range(stop - start):
                moved, image_moved = here[i] - before[i], there[i] - image_before[i]
                image[i] = image_moved
                test[i] = moved if points else residual[i] - (image_before[i] - before[i])
        for j in range(filled):
            other_test, other_image = tests[b, j, start:stop], images[b, j, start:stop]
            zero = z.dtype.type(0)
            by_test, image_by_test, test_by_image, residual_by_test = zero, zero, zero, zero
            if points:
                for i in range(stop - start):
                    by_test += test[i] * other_test[i]
                    image_by_test += image[i] * other_test[i]
                    test_by_image += test[i] * other_image[i]
                    residual_by_test += residual[i] * other_test[i]
            else:
                for i in range(stop - start):
                    by_test += test[i] * other_test[i]
                    residual_by_test += residual[i] * other_test[i]
            partial[b, block, 0, j] = by_test
            partial[b, block, 1, j] = image_by_test
            partial[b, block, 2, j] = test_by_image
            partial[b, block, 3, j] = residual_by_test
    products = np.zeros((batch, 4, filled))
    for b in range(batch):
        for block in range(blocks):
            for row in range(4):
                for j in range(filled):
                    products[b, row, j] += partial[b, block, row, j]
    return products


def _mix(
    z: Array,
    fz: Array,
    tests: Array,
    images: Array,
    weights: Array,
    relaxation: float,
    mode: int,
    out: Array,
) -> None:
    """out = c (f(z) + sum_j w_j F_j) + (1 - c) (z + sum_j w_j S_j) for the relaxation c.

    S_j is the test difference (mode 1), the image's less the test's (2), or nothing (0). Words per
    float: n + 2 without relaxation.
    """
    batch, width = z.shape
    filled = weights.shape[1]
    blocks = (width + BLOCK - 1) // BLOCK
    one = z.dtype.type(1)
    c = z.dtype.type(relaxation)
    for job in prange(batch * blocks):
        b, block = job // blocks, job % blocks
        start = block * BLOCK
        stop = min(start + BLOCK, width)
        here, there, target = z[b, start:stop], fz[b, start:stop], out[b, start:stop]
        for i in range(stop - start):
            target[i] = there[i]
        for j in range(filled):
            weight = z.dtype.type(weights[b, j])
            if weight == 0:
                continue  # and what is not finite in an unused slot stays there
            image = images[b, j, start:stop]
            for i in range(stop - start):
                target[i] += weight * image[i]
        if relaxation != 1.0:
            for i in range(stop - start):
                target[i] = c * target[i] + (one - c) * here[i]
            if mode != 0:
                for j in range(filled):
                    weight = (one - c) * z.dtype.type(weights[b, j])
                    if weight == 0:
                        continue
                    test, image = tests[b, j, start:stop], images[b, j, start:stop]
                    for i in range(stop - start):
                        target[i] += weight * (test[i] if mode == 1 else image[i] - test[i])


@functools.lru_cache(maxsize=64)
def all_rows(batch: int) -> Array:
    """The mask of all samples."""
    return np.ones(batch, np.bool_)


push_and_multiply, push_and_multiply_parallel = (
    compiled(_push_and_multiply),
    compiled_parallel(_push_and_multiply),
)
mix, mix_parallel = compiled(_mix), compiled_parallel(_mix)
