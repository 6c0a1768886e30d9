"""What mixing and quasi-Newton steps have in common on a GPU: the pass over the history, the solve.

A state that fits one program (`FUSED_SIZE`) takes a single kernel; a larger one a kernel for each
pass, of which `gather_in_blocks` is the first: a program per sample and block of D reads the pair
and its predecessor once, writes both differences and sums the new inner products with all n vectors
of the history in the same pass. Each block leaves its partial sums; nothing is added atomically, so
the same call gives the same bits.

Inner products are summed in the dtype of the state within a block and in float64 across blocks; the
small system is float64 throughout. How D is cut depends on D, n and the dtype only, so that a
sample's answer does not depend on its batch.
"""

# Triton brings no types; a checker takes its kernels for Python, which they are not, and misses it
# where it is not installed.
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_REGISTER_ROWS = 32
"""Largest system solved in registers, and history vectors per program of the gather kernel."""
TILE_BYTES = 8192
"""Of one tile (history vectors x part of D): sixteen floats a thread, and there are six tiles."""
FUSED_SIZE = 4096
"""Largest D that one program per sample does alone: more launches would cost more than they win."""
BLOCK = 1024
"""Least part of D per program; doubled until there are at most `MAX_BLOCKS`."""
MAX_BLOCKS = 256
"""So many partial sums one program adds up in a few loads, and they fill a GPU at any batch."""
OPTIONS = {"enable_fp_fusion": True}
"""Triton warns where this is left to its default, which is about to change."""


# --- On the host -------------------------------------------------------------------------------


class Cut(NamedTuple):
    """How a step is cut into programs."""

    num_rows: int
    """History vectors per tile, a power of two."""
    width: int
    """Floats of the state per tile."""
    flat_width: int
    """Likewise where there is one vector at a time."""
    block: int
    """Floats of the state per program."""
    num_blocks: int
    in_registers: bool
    """Whether the small system is solved in a kernel."""
    is_fused: bool
    """Whether one program does a sample alone."""


def cut(z: Tensor, num_vectors: int) -> Cut:
    """How to cut a step of states (B, D) with so many vectors in the history."""
    size = z.shape[1]
    num_rows = min(triton.next_power_of_2(num_vectors), NUM_REGISTER_ROWS)
    block = max(BLOCK, triton.next_power_of_2(triton.cdiv(size, MAX_BLOCKS)))
    in_registers = num_vectors <= NUM_REGISTER_ROWS
    return Cut(
        num_rows,
        width=min(TILE_BYTES // (num_rows * z.element_size()), block),
        flat_width=BLOCK,
        block=block,
        num_blocks=triton.cdiv(size, block),
        in_registers=in_registers,
        is_fused=in_registers and size <= FUSED_SIZE,
    )


def with_strides(one: Tensor, other: Tensor) -> tuple[Tensor | int, ...]:
    """Two tensors (B, n, ...) as kernels take them: with how far the next sample is, and row."""
    return (one, other, *one.stride()[:2], *other.stride()[:2])


def gather_in_blocks(
    pair: tuple[Tensor, Tensor, Tensor, Tensor],
    tests: Tensor,
    images: Tensor,
    cut: Cut,
    *,
    slot: int,
    num_vectors: int,
    points: bool,
    lengths: Tensor | None = None,
) -> Tensor:
    """Write the new differences into `slot`, and multiply with all n: (B, blocks, 4 or 2, n).

    Products are partial sums, of the new test with tests, the residual with tests, the new image
    with tests and the new test with images; the last two are made for points only.

    Args:
        pair: the point (B, D), its image, the point before and its image.
        tests: a ring (B, n or more, D) of differences of points, or of residuals.
        images: differences of images, likewise.
        cut: see `cut`.
        slot: where the new differences go.
        num_vectors: how many slots count (n).
        points: whether tests are differences of points.
        lengths: squares of the last step (B, blocks), partial sums: samples that did not move keep
            what is in the slot, and that is multiplied. None: all have moved.
    """
    z = pair[0]
    num_samples, size = z.shape
    sums = z.new_empty(num_samples, cut.num_blocks, 4 if points else 2, num_vectors)
    grid = (num_samples, cut.num_blocks, triton.cdiv(num_vectors, cut.num_rows))
    with torch.cuda.device_of(z):
        _gather_kernel[grid](
            *pair, *with_strides(tests, images), sums if lengths is None else lengths, sums,
            size, num_vectors, slot, cut.num_blocks,
            POINTS=points, KEEPS=lengths is not None, NUM_ROWS=cut.num_rows, BLOCK=cut.block,
            WIDTH=cut.width, MAX_BLOCKS=MAX_BLOCKS, **OPTIONS,
        )  # fmt: skip
    return sums


# --- Kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_vectors", "slot", "num_blocks"])
def _gather_kernel(
    z, fz, previous_z, previous_fz,
    tests, images, test_batch, test_row, image_batch, image_row,
    lengths, sums, size, num_vectors, slot, num_blocks,
    POINTS: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, MAX_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, block, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows = group * NUM_ROWS + tl.arange(0, NUM_ROWS)
    begin = block * BLOCK
    # Of the groups of rows, the first does the writing.
    writes = group == 0
    moved = writes  # not read
    if KEEPS:
        moved = has_moved(lengths + sample * num_blocks, num_blocks, MAX_BLOCKS)
        writes = moved & writes
    own, right, by_image, over_images = gather(
        z + sample * size, fz + sample * size,
        previous_z + sample * size, previous_fz + sample * size,
        tests + sample * test_batch, images + sample * image_batch, test_row, image_row,
        begin, tl.minimum(begin + BLOCK, size), size, num_vectors, slot, rows,
        writes, moved, POINTS, KEEPS, NUM_ROWS, WIDTH,
    )  # fmt: skip
    num_products: tl.constexpr = 4 if POINTS else 2
    at = sums + (sample * num_blocks + block) * num_products * num_vectors + rows
    filled = rows < num_vectors
    tl.store(at, own, mask=filled)
    tl.store(at + num_vectors, right, mask=filled)
    if POINTS:
        tl.store(at + 2 * num_vectors, by_image, mask=filled)
        tl.store(at + 3 * num_vectors, over_images, mask=filled)


# --- Parts of kernels: of one sample, whose pointers they get ----------------------------------


@triton.jit
def gather(
    z, fz, previous_z, previous_fz, tests, images, test_row, image_row,
    begin, end, size, num_vectors, slot, rows, writes, moved,
    POINTS: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the differences from `begin` to `end`; their four products with history `rows`.

    New test with tests, residual with tests, new image with tests, new test with images; the first
    two only unless tests are differences of points. New is what is in the slot in the end: where
    it may be kept (`KEEPS`), what was in it unless the sample has moved.
    """
    older = ((rows < num_vectors) & (rows != slot))[:, None]
    is_new = (rows == slot)[:, None]
    test_rows = tests + rows.to(tl.int64)[:, None] * test_row
    image_rows = images + rows.to(tl.int64)[:, None] * image_row
    new_test_row = tests + slot.to(tl.int64) * test_row
    new_image_row = images + slot.to(tl.int64) * image_row
    own = tl.zeros((NUM_ROWS, WIDTH), z.dtype.element_ty)
    right = tl.zeros((NUM_ROWS, WIDTH), z.dtype.element_ty)
    by_image = tl.zeros((NUM_ROWS, WIDTH), z.dtype.element_ty)
    over_images = tl.zeros((NUM_ROWS, WIDTH), z.dtype.element_ty)
    for first in range(begin, end, WIDTH):
        d = first + tl.arange(0, WIDTH)
        inside = d < size
        point = tl.load(z + d, mask=inside, other=0.0)
        image = tl.load(fz + d, mask=inside, other=0.0)
        previous_point = tl.load(previous_z + d, mask=inside, other=0.0)
        previous_image = tl.load(previous_fz + d, mask=inside, other=0.0)
        residual = image - point
        new_image = image - previous_image
        if POINTS:
            new_test = point - previous_point
        else:
            new_test = residual - (previous_image - previous_point)
        if tests.dtype.element_ty == tl.bfloat16:
            new_test = rounded(new_test).to(z.dtype.element_ty)
            new_image = rounded(new_image).to(z.dtype.element_ty)
        # Two conditions: only the first is known to the compiler.
        if KEEPS:  # noqa: SIM102
            if not moved:
                new_test = tl.load(new_test_row + d, mask=inside, other=0.0).to(z.dtype.element_ty)
                new_image = tl.load(new_image_row + d, mask=inside, other=0.0).to(
                    z.dtype.element_ty
                )
        mask = older & inside[None, :]
        # The new row comes from registers: other programs of this sample may not have written it.
        tile = tl.load(test_rows + d[None, :], mask=mask, other=0.0).to(z.dtype.element_ty)
        tile = tl.where(is_new, new_test[None, :], tile)
        own += tile * new_test[None, :]
        right += tile * residual[None, :]
        if POINTS:
            by_image += tile * new_image[None, :]
            tile = tl.load(image_rows + d[None, :], mask=mask, other=0.0).to(z.dtype.element_ty)
            tile = tl.where(is_new, new_image[None, :], tile)
            over_images += tile * new_test[None, :]
        if writes:
            # By way of float32: from double to bfloat16 there is no cast everywhere.
            if tests.dtype.element_ty == tl.bfloat16:
                tl.store(new_test_row + d, new_test.to(tl.float32).to(tl.bfloat16), mask=inside)
                tl.store(new_image_row + d, new_image.to(tl.float32).to(tl.bfloat16), mask=inside)
            else:
                tl.store(new_test_row + d, new_test, mask=inside)
                tl.store(new_image_row + d, new_image, mask=inside)
    return tl.sum(own, 1), tl.sum(right, 1), tl.sum(by_image, 1), tl.sum(over_images, 1)


@triton.jit
def rounded(x):
    """To the nearest bfloat16, ties to even, as float32; casts may cut off instead."""
    single = x.to(tl.float32)
    bits = single.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(single == single, bits.to(tl.float32, bitcast=True), single)


@triton.jit
def gathered(sums, sample, num_blocks, num_vectors, POINTS: tl.constexpr, NUM_ROWS: tl.constexpr):
    """The four products of a sample that `gather_in_blocks` left in parts; two unless of points."""
    num_products: tl.constexpr = 4 if POINTS else 2
    sums += sample * num_blocks * num_products * num_vectors
    stride = num_products * num_vectors
    own = _total(sums, stride, num_blocks, num_vectors, NUM_ROWS)
    right = _total(sums + num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    by_image, over_images = own, own
    if POINTS:
        by_image = _total(sums + 2 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
        over_images = _total(sums + 3 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    return own, right, by_image, over_images


@triton.jit
def _total(sums, stride, num_blocks, num_vectors, NUM_ROWS: tl.constexpr):
    """Sum the blocks' partial sums (NUM_ROWS,) in float64, thirty-two blocks at a time."""
    rows = tl.arange(0, NUM_ROWS)
    total = tl.zeros((NUM_ROWS,), tl.float64)
    for first in range(0, num_blocks, 32):
        blocks = first + tl.arange(0, 32)
        mask = (blocks < num_blocks)[:, None] & (rows < num_vectors)[None, :]
        part = tl.load(sums + blocks[:, None] * stride + rows[None, :], mask=mask, other=0.0)
        total += tl.sum(part.to(tl.float64), 0)
    return total


@triton.jit
def has_moved(lengths, num_blocks, MAX_BLOCKS: tl.constexpr):
    """Whether the sample is elsewhere than before, from the blocks' partial sums of squares."""
    blocks = tl.arange(0, MAX_BLOCKS)
    part = tl.load(lengths + blocks, mask=blocks < num_blocks, other=0.0)
    return is_positive(tl.sum(part.to(tl.float64), 0))


@triton.jit
def is_positive(length):
    """Whether a length is that of a step: neither 0 nor too long to measure."""
    return (length > 0.0) & (length < float("inf"))


@triton.jit
def replace(matrix, stride, column, row, num_vectors, slot, NUM_ROWS: tl.constexpr):
    """Write row and column `slot` of a matrix in memory; the whole matrix in float64."""
    rows = tl.arange(0, NUM_ROWS)
    filled = rows < num_vectors
    at = matrix + rows[:, None] * stride + rows[None, :]
    tile = tl.load(at, mask=filled[:, None] & filled[None, :], other=0.0).to(tl.float64)
    tile = tl.where((rows == slot)[None, :], column[:, None], tile)
    tile = tl.where((rows == slot)[:, None], row[None, :], tile)
    tl.store(matrix + rows * stride + slot, column, mask=filled & (rows != slot))
    tl.store(matrix + slot * stride + rows, row, mask=filled)
    return tile


@triton.jit
def solve(matrix, right, num_vectors, NUM_ROWS: tl.constexpr):
    """Gaussian elimination with row pivoting; what is singular or not finite gives no finite sum.

    Rows stay where they are, and `step` remembers when each was the pivot: moving rows between
    threads would cost more than masks do.
    """
    rows = tl.arange(0, NUM_ROWS)
    step = tl.full((NUM_ROWS,), NUM_ROWS, tl.int32)
    for k in range(num_vectors):
        column = tl.sum(tl.where((rows == k)[None, :], matrix, 0.0), 1)
        height = tl.abs(column)
        # NaN is taken for the largest, so that it cannot be passed over.
        height = tl.where(height >= 0.0, height, float("inf"))
        open_rows = (step == NUM_ROWS) & (rows < num_vectors)
        is_pivot = rows == tl.argmax(tl.where(open_rows, height, -1.0), 0)
        pivot_row = tl.sum(tl.where(is_pivot[:, None], matrix, 0.0), 0)
        pivot_right = tl.sum(tl.where(is_pivot, right, 0.0), 0)
        pivot = tl.sum(tl.where(is_pivot, column, 0.0), 0)
        step = tl.where(is_pivot, k, step)
        factor = tl.where(open_rows & (step == NUM_ROWS), column / pivot, 0.0)
        matrix -= factor[:, None] * pivot_row[None, :]
        right -= factor * pivot_right
    solution = tl.zeros((NUM_ROWS,), tl.float64)
    for back in range(num_vectors):
        k = num_vectors - 1 - back
        column = tl.sum(tl.where((rows == k)[None, :], matrix, 0.0), 1)
        pivot = tl.sum(tl.where(step == k, column, 0.0), 0)
        value = tl.sum(tl.where(step == k, right, 0.0), 0) / pivot
        solution = tl.where(rows == k, value, solution)
        right -= column * value
    return solution
