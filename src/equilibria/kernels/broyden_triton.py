"""Broyden's step on a GPU, in Triton: the same step as `Broyden.propose`.

A state that fits one program (`_FUSED_SIZE`) takes a single kernel; a larger one takes three or
four:

0. lengths, only where a resting sample keeps what is in its slot, which must be known before
   anything is written: partial sums of the squares of the last step.
1. gather, a program per sample and block of D: reads the pair and its predecessor once, writes the
   new pair and sums its inner products with all n pairs in the same pass. Each block leaves its
   partial sums; nothing is added atomically, so the same call gives the same bits.
2. weigh, a program per sample: adds up the partial sums, writes the new row and column of the small
   matrices and solves the system in registers.
3. mix, a program per sample and block of D: one pass over the image differences.

Words moved per float of the state, with n pairs; the lengths' 2, of `z` and `previous_z`, are those
of the bad method and of the good one once its ring is full:

    kind      lengths   gather   mix     together         with relaxation != 1
    good      0 or 2    2n + 4   n + 2   3n + 6 or 8      1 more
    bad       2         n + 5    n + 2   2n + 9           1 more

Inner products are summed in the dtype of the state within a block and in float64 across blocks; the
small system is float64 throughout. How D is cut depends on D and n only, so that a sample's answer
does not depend on its batch.
"""

# Triton brings no types; a checker takes its kernels for Python, which they are not, and misses it
# where it is not installed.
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Kind = Literal["good", "bad"]

_NUM_REGISTER_ROWS = 32
"""Largest system solved in registers, and pairs per program of the gather kernel."""
_TILE_BYTES = 8192
"""Of one tile (pairs x part of D): sixteen floats a thread, and there are six tiles."""
_FUSED_SIZE = 4096
"""Largest D that one program per sample does alone: more launches would cost more than they win."""
_BLOCK = 1024
"""Least part of D per program; doubled until there are at most `_MAX_BLOCKS`."""
_MAX_BLOCKS = 256
"""So many partial sums one program adds up in a few loads, and they fill a GPU at any batch."""
_OPTIONS = {"enable_fp_fusion": True}
"""Triton warns where this is left to its default, which is about to change."""


class Step:
    """`propose` on the memory of one solve, as the step for the CPU has it.

    Args:
        vectors: see `propose`, as for the rest, with all slots of the ring.
        images: likewise.
        squares: likewise.
        by_images: likewise.
        born: likewise.
        kind: "good" or "bad".
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
        kind: Kind,
        relaxation: float,
    ) -> None:
        self._memory = vectors, images, squares, by_images, born
        self._kind: Kind = kind
        self._relaxation = relaxation

    def propose(
        self, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], count: int
    ) -> Tensor:
        """The next point (B, D), from the iterate and the one before."""
        return propose(
            *now, *before, *self._memory, count=count, kind=self._kind, relaxation=self._relaxation
        )


def propose(
    z: Tensor,
    fz: Tensor,
    previous_z: Tensor,
    previous_fz: Tensor,
    vectors: Tensor,
    images: Tensor,
    squares: Tensor,
    by_images: Tensor,
    born: Tensor,
    *,
    slot: int | None = None,
    count: int,
    kind: Kind,
    relaxation: float,
) -> Tensor:
    """Write the newest pair into the memory and return the next point.

    The equations are those of `equilibria.Broyden`. A sample that did not move keeps the pair in
    its slot if the method is the bad one or the ring is full. A sample whose small system is
    singular or not finite takes the plain step. No gradients are recorded. More than 32 pairs are
    solved by `torch.linalg` between the passes instead of in registers; `relaxation` is compiled
    in.

    Args:
        z: the point (B, D), float32 or float64.
        fz: its image.
        previous_z: the point before.
        previous_fz: its image.
        vectors: a ring (B, size, D), or its filled slots (B, n, D): steps for kind "good",
            differences of residuals for kind "bad".
        images: differences of images, likewise.
        squares: inner products of `vectors`, row times column (B, n, n) or larger.
        by_images: `vectors` times `images`, likewise; not used for kind "bad".
        born: the number of the pair in every slot (B, n) or wider, int64.
        slot: where the new pair goes; None is `count` modulo the slots of `vectors`.
        count: the number of the new pair, from 0; `count + 1` slots are filled, or all.
        kind: "good" or "bad", see `Broyden`.
        relaxation: 1 takes the full quasi-Newton step.
    """
    z, fz = z.contiguous(), fz.contiguous()
    previous_z, previous_fz = previous_z.contiguous(), previous_fz.contiguous()
    num_samples, size = z.shape
    num_vectors = min(count + 1, vectors.shape[1])
    if slot is None:
        slot = count % vectors.shape[1]
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    good = kind == "good"
    # The bad method would take rounding noise in the images of a resting sample for news.
    keeps = not good or count >= vectors.shape[1]
    weights = z.new_empty(num_samples, num_vectors)
    num_rows = min(triton.next_power_of_2(num_vectors), _NUM_REGISTER_ROWS)
    block = max(_BLOCK, triton.next_power_of_2(triton.cdiv(size, _MAX_BLOCKS)))
    width = min(_TILE_BYTES // (num_rows * z.element_size()), block)
    num_blocks = triton.cdiv(size, block)
    pair = (z, fz, previous_z, previous_fz)
    ring = (vectors, images, vectors.stride(0), vectors.stride(1))
    ring += (images.stride(0), images.stride(1))
    small = (squares, by_images, born, squares.stride(0), squares.stride(1))
    small += (by_images.stride(0), by_images.stride(1), born.stride(0))
    form = {"GOOD": good, "KEEPS": keeps, "NUM_ROWS": num_rows}
    with torch.cuda.device_of(z):
        if size <= _FUSED_SIZE and num_vectors <= _NUM_REGISTER_ROWS:
            _fused_kernel[(num_samples,)](
                *pair, *ring, *small, weights, out, size, num_vectors, slot, count,
                **form, **_OPTIONS, RELAXATION=relaxation, FLAT_WIDTH=_BLOCK, WIDTH=width,
            )  # fmt: skip
            return out
        num_products = 4 if good else 2
        sums = z.new_empty(num_samples, num_blocks, num_products, num_vectors)
        lengths = z.new_empty(num_samples, num_blocks) if keeps else sums
        if keeps:
            _lengths_kernel[(num_samples, num_blocks)](
                z, previous_z, lengths, size, num_blocks,
                BLOCK=block, FLAT_WIDTH=_BLOCK, **_OPTIONS,
            )  # fmt: skip
        grid = (num_samples, num_blocks, triton.cdiv(num_vectors, num_rows))
        _gather_kernel[grid](
            *pair, *ring, lengths, sums, size, num_vectors, slot, num_blocks,
            **form, **_OPTIONS, NUM_PRODUCTS=num_products, MAX_BLOCKS=_MAX_BLOCKS,
            BLOCK=block, WIDTH=width,
        )  # fmt: skip
        if num_vectors <= _NUM_REGISTER_ROWS:
            _weigh_kernel[(num_samples,)](
                *small, lengths, sums, weights, num_vectors, slot, count, num_blocks,
                **form, **_OPTIONS, NUM_PRODUCTS=num_products, MAX_BLOCKS=_MAX_BLOCKS,
                num_warps=1 if num_rows <= 16 else 4,
            )  # fmt: skip
        else:
            length = lengths.double().sum(1) if keeps else None
            _update_born(born, slot, count, length)
            products = sums.double().sum(1).unbind(1)
            filled = slice(num_vectors)
            matrices = (squares[:, filled, filled], by_images[:, filled, filled])
            weigh = _weights_good if good else _weights_bad
            weights.copy_(weigh(products, *matrices, born[:, filled], slot))
        _mix_kernel[(num_samples, num_blocks)](
            z, fz, images, images.stride(0), images.stride(1), weights, out, size, num_vectors,
            RELAXATION=relaxation, BLOCK=block, FLAT_WIDTH=_BLOCK, **_OPTIONS,
        )  # fmt: skip
    return out


# --- Kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_vectors", "slot", "count"])
def _fused_kernel(
    z, fz, previous_z, previous_fz,
    vectors, images, vector_batch, vector_row, image_batch, image_row,
    squares, by_images, born, square_batch, square_row, by_image_batch, by_image_row, born_batch,
    weights, out, size, num_vectors, slot, count,
    GOOD: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr,
    RELAXATION: tl.constexpr, FLAT_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    z, fz, out = z + sample * size, fz + sample * size, out + sample * size
    previous_z, previous_fz = previous_z + sample * size, previous_fz + sample * size
    images += sample * image_batch
    weights += sample * num_vectors
    rows = tl.arange(0, NUM_ROWS)
    moved = slot >= 0  # always
    if KEEPS:
        moved = _is_positive(_squared_step(z, previous_z, 0, size, size, FLAT_WIDTH))
    own, right, by_image, over_images = _gather(
        z, fz, previous_z, previous_fz,
        vectors + sample * vector_batch, images, vector_row, image_row,
        0, size, size, num_vectors, slot, rows, moved, moved, GOOD, KEEPS, NUM_ROWS, WIDTH,
    )  # fmt: skip
    answer = _weigh(
        own, right, by_image, over_images,
        squares + sample * square_batch, by_images + sample * by_image_batch,
        born + sample * born_batch, square_row, by_image_row,
        num_vectors, slot, count, moved, GOOD, NUM_ROWS,
    )  # fmt: skip
    tl.store(weights + rows, answer, mask=rows < num_vectors)
    # What this program has written, other threads of it read below: weights and differences.
    tl.debug_barrier()
    _mix(
        z, fz, images, image_row, weights, out,
        0, size, size, num_vectors, RELAXATION, FLAT_WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_blocks"])
def _lengths_kernel(
    z, previous_z, lengths, size, num_blocks, BLOCK: tl.constexpr, FLAT_WIDTH: tl.constexpr
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    z, previous_z = z + sample * size, previous_z + sample * size
    begin = block * BLOCK
    end = tl.minimum(begin + BLOCK, size)
    squared = _squared_step(z, previous_z, begin, end, size, FLAT_WIDTH)
    tl.store(lengths + sample * num_blocks + block, squared)


@triton.jit(do_not_specialize=["num_vectors", "slot", "num_blocks"])
def _gather_kernel(
    z, fz, previous_z, previous_fz,
    vectors, images, vector_batch, vector_row, image_batch, image_row,
    lengths, sums, size, num_vectors, slot, num_blocks,
    GOOD: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MAX_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, block, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows = group * NUM_ROWS + tl.arange(0, NUM_ROWS)
    begin = block * BLOCK
    moved = slot >= 0  # always
    if KEEPS:
        moved = _has_moved(lengths + sample * num_blocks, num_blocks, MAX_BLOCKS)
    own, right, by_image, over_images = _gather(
        z + sample * size, fz + sample * size,
        previous_z + sample * size, previous_fz + sample * size,
        vectors + sample * vector_batch, images + sample * image_batch, vector_row, image_row,
        begin, tl.minimum(begin + BLOCK, size), size, num_vectors, slot, rows,
        # Of the groups of rows, the first does the writing.
        moved & (group == 0), moved, GOOD, KEEPS, NUM_ROWS, WIDTH,
    )  # fmt: skip
    at = sums + (sample * num_blocks + block) * NUM_PRODUCTS * num_vectors + rows
    filled = rows < num_vectors
    tl.store(at, own, mask=filled)
    tl.store(at + num_vectors, right, mask=filled)
    if GOOD:
        tl.store(at + 2 * num_vectors, by_image, mask=filled)
        tl.store(at + 3 * num_vectors, over_images, mask=filled)


@triton.jit(do_not_specialize=["num_vectors", "slot", "count", "num_blocks"])
def _weigh_kernel(
    squares, by_images, born, square_batch, square_row, by_image_batch, by_image_row, born_batch,
    lengths, sums, weights, num_vectors, slot, count, num_blocks,
    GOOD: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_PRODUCTS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, NUM_ROWS)
    moved = slot >= 0  # always
    if KEEPS:
        moved = _has_moved(lengths + sample * num_blocks, num_blocks, MAX_BLOCKS)
    sums += sample * num_blocks * NUM_PRODUCTS * num_vectors
    stride = NUM_PRODUCTS * num_vectors
    own = _total(sums, stride, num_blocks, num_vectors, NUM_ROWS)
    right = _total(sums + num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    by_image, over_images = own, own
    if GOOD:
        by_image = _total(sums + 2 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
        over_images = _total(sums + 3 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    answer = _weigh(
        own, right, by_image, over_images,
        squares + sample * square_batch, by_images + sample * by_image_batch,
        born + sample * born_batch, square_row, by_image_row,
        num_vectors, slot, count, moved, GOOD, NUM_ROWS,
    )  # fmt: skip
    tl.store(weights + sample * num_vectors + rows, answer, mask=rows < num_vectors)


@triton.jit(do_not_specialize=["num_vectors"])
def _mix_kernel(
    z, fz, images, image_batch, image_row, weights, out, size, num_vectors,
    RELAXATION: tl.constexpr, BLOCK: tl.constexpr, FLAT_WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    _mix(
        z + sample * size, fz + sample * size, images + sample * image_batch, image_row,
        weights + sample * num_vectors, out + sample * size,
        begin, tl.minimum(begin + BLOCK, size), size, num_vectors, RELAXATION, FLAT_WIDTH,
    )  # fmt: skip


# --- Parts of kernels: of one sample, whose pointers they get ----------------------------------


@triton.jit
def _squared_step(z, previous_z, begin, end, size, FLAT_WIDTH: tl.constexpr):
    """Sum of the squares of the last step from `begin` to `end`."""
    squared = tl.zeros((FLAT_WIDTH,), z.dtype.element_ty)
    for first in range(begin, end, FLAT_WIDTH):
        d = first + tl.arange(0, FLAT_WIDTH)
        inside = d < size
        step = tl.load(z + d, mask=inside, other=0.0)
        step -= tl.load(previous_z + d, mask=inside, other=0.0)
        squared += step * step
    return tl.sum(squared, 0)


@triton.jit
def _has_moved(lengths, num_blocks, MAX_BLOCKS: tl.constexpr):
    """Whether the sample is elsewhere than before, from the blocks' partial sums of squares."""
    blocks = tl.arange(0, MAX_BLOCKS)
    part = tl.load(lengths + blocks, mask=blocks < num_blocks, other=0.0)
    return _is_positive(tl.sum(part.to(tl.float64), 0))


@triton.jit
def _is_positive(length):
    return (length > 0.0) & (length < float("inf"))


@triton.jit
def _gather(
    z, fz, previous_z, previous_fz, vectors, images, vector_row, image_row,
    begin, end, size, num_vectors, slot, rows, writes, moved,
    GOOD: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the new pair from `begin` to `end`; its four products with the pairs of `rows`.

    New vector with vectors, residual with vectors, new image with vectors, new vector with images;
    the bad method has the first two only. New is what is in the slot in the end.
    """
    older = ((rows < num_vectors) & (rows != slot))[:, None]
    is_new = (rows == slot)[:, None]
    vector_rows = vectors + rows.to(tl.int64)[:, None] * vector_row
    image_rows = images + rows.to(tl.int64)[:, None] * image_row
    new_vector_row = vectors + slot.to(tl.int64) * vector_row
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
        if GOOD:
            new_vector = point - previous_point
        else:
            new_vector = residual - (previous_image - previous_point)
        # Two conditions: only the first is known to the compiler.
        if KEEPS:  # noqa: SIM102
            if not moved:
                new_vector = tl.load(new_vector_row + d, mask=inside, other=0.0)
                new_image = tl.load(new_image_row + d, mask=inside, other=0.0)
        mask = older & inside[None, :]
        # The new row comes from registers: other programs of this sample may not have written it.
        tile = tl.load(vector_rows + d[None, :], mask=mask, other=0.0)
        tile = tl.where(is_new, new_vector[None, :], tile)
        own += tile * new_vector[None, :]
        right += tile * residual[None, :]
        if GOOD:
            by_image += tile * new_image[None, :]
            tile = tl.load(image_rows + d[None, :], mask=mask, other=0.0)
            tile = tl.where(is_new, new_image[None, :], tile)
            over_images += tile * new_vector[None, :]
        if writes:
            tl.store(new_vector_row + d, new_vector, mask=inside)
            tl.store(new_image_row + d, new_image, mask=inside)
    return tl.sum(own, 1), tl.sum(right, 1), tl.sum(by_image, 1), tl.sum(over_images, 1)


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
def _weigh(
    own, right, by_image, over_images, squares, by_images, born, square_row, by_image_row,
    num_vectors, slot, count, moved, GOOD: tl.constexpr, NUM_ROWS: tl.constexpr,
):  # fmt: skip
    """Bring the small matrices up to date and solve for the weights (NUM_ROWS,)."""
    rows = tl.arange(0, NUM_ROWS)
    filled = rows < num_vectors
    # Selected, not multiplied: products of rows beyond the filled ones may be NaN.
    own = tl.where(filled, own.to(tl.float64), 0.0)
    right = tl.where(filled, right.to(tl.float64), 0.0)
    age = tl.load(born + rows, mask=filled, other=0)
    if moved:
        age = tl.where(rows == slot, count.to(tl.int64), age)
        tl.store(born + slot, count.to(tl.int64))
    products = _replace(squares, square_row, own, own, num_vectors, slot, NUM_ROWS)
    # The upper triangle by age: row not newer than column.
    system = tl.where(age[:, None] <= age[None, :], products, 0.0)
    if GOOD:
        by_image = tl.where(filled, by_image.to(tl.float64), 0.0)
        over_images = tl.where(filled, over_images.to(tl.float64), 0.0)
        system -= _replace(
            by_images, by_image_row, by_image, over_images, num_vectors, slot, NUM_ROWS
        )
    else:
        right = -right
    diagonal = rows[:, None] == rows[None, :]
    length = tl.sum(tl.where(diagonal, products, 0.0), 1)
    # A step of zero (a sample that no longer moves) gets a unit diagonal and weight 0.
    counts = length > 0.0
    scale = tl.where(counts, 1.0 / tl.sqrt(tl.where(counts, length, 1.0)), 0.0)
    unit = system * scale[:, None] * scale[None, :]
    unit += tl.where(diagonal & (scale == 0.0)[:, None], 1.0, 0.0)
    answer = scale * _solve(unit, scale * right, num_vectors, NUM_ROWS)
    # A singular update falls back to the plain step.
    solved = tl.sum(tl.where(tl.abs(answer) < float("inf"), 0, 1), 0) == 0
    return tl.where(solved, answer, 0.0)


@triton.jit
def _replace(matrix, stride, column, row, num_vectors, slot, NUM_ROWS: tl.constexpr):
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
def _solve(matrix, right, num_vectors, NUM_ROWS: tl.constexpr):
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


@triton.jit
def _mix(
    z, fz, images, image_row, weights, out, begin, end, size, num_vectors,
    RELAXATION: tl.constexpr, FLAT_WIDTH: tl.constexpr,
):  # fmt: skip
    """The next point, from `begin` to `end`."""
    for first in range(begin, end, FLAT_WIDTH):
        d = first + tl.arange(0, FLAT_WIDTH)
        inside = d < size
        mixed = tl.load(fz + d, mask=inside, other=0.0)
        at_image = images + d
        for vector in range(num_vectors):
            weight = tl.load(weights + vector)
            # What is left out is not even read, and may be NaN.
            if weight != 0.0:
                mixed += weight * tl.load(at_image, mask=inside, other=0.0)
            at_image += image_row
        if RELAXATION != 1.0:
            point = tl.load(z + d, mask=inside, other=0.0)
            mixed = point + RELAXATION * (mixed - point)
        tl.store(out + d, mixed, mask=inside)


# --- The small system of many pairs, on the host's schedule ------------------------------------


def _update_born(born: Tensor, slot: int, count: int, length: Tensor | None) -> None:
    if length is None:
        born[:, slot] = count
    else:
        moved = (length > 0) & torch.isfinite(length)
        born[:, slot] = torch.where(moved, count, born[:, slot])


def _weights_good(
    products: tuple[Tensor, ...], squares: Tensor, by_images: Tensor, born: Tensor, slot: int
) -> Tensor:
    """What `_weigh` does for the good method."""
    own, right, by_image, over_images = (product.to(squares.dtype) for product in products)
    squares[:, :, slot] = own
    squares[:, slot] = own
    by_images[:, :, slot] = by_image
    by_images[:, slot] = over_images
    return _solve_dense(squares, _older_rows(squares, born) - by_images, right)


def _weights_bad(
    products: tuple[Tensor, ...], squares: Tensor, by_images: Tensor, born: Tensor, slot: int
) -> Tensor:
    """What `_weigh` does for the bad method."""
    own, right = (product.to(squares.dtype) for product in products)
    squares[:, :, slot] = own
    squares[:, slot] = own
    return _solve_dense(squares, _older_rows(squares, born), -right)


def _older_rows(squares: Tensor, born: Tensor) -> Tensor:
    return torch.where(born.unsqueeze(2) <= born.unsqueeze(1), squares, 0.0)


def _solve_dense(squares: Tensor, system: Tensor, right: Tensor) -> Tensor:
    lengths = squares.diagonal(dim1=1, dim2=2)
    counts = lengths > 0
    scale = torch.where(counts, torch.where(counts, lengths, 1.0).rsqrt(), 0.0)
    unit = system * scale.unsqueeze(1) * scale.unsqueeze(2)
    unit = unit + torch.diag_embed((~counts).to(unit.dtype))
    weights = scale * torch.linalg.solve_ex(unit, scale * right)[0]
    return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, 0.0)
