"""The Anderson step on a GPU, in Triton: the same step as `Anderson.propose`.

A state that fits one program (`_FUSED_SIZE`) takes a single kernel; a larger one takes three:

1. gather, a program per sample and block of D: reads the pair and its predecessor once, writes both
   differences and sums the new inner products with all n vectors of the history in the same pass.
   Each block leaves its partial sums; nothing is added atomically, so the same call gives the same
   bits.
2. weigh, a program per sample: adds up the partial sums, writes the new row and column of the small
   matrices, leaves out nearly dependent columns and solves the system in registers.
3. mix, a program per sample and block of D: one pass over the images.

Words moved per float of the state, with n differences:

    kind      gather   mix     together   with relaxation != 1
    I         2n + 4   n + 2   3n + 6     4n + 7
    II        n + 5    n + 2   2n + 7     3n + 8

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

Kind = Literal["I", "II"]

_NUM_REGISTER_ROWS = 32
"""Largest system solved in registers, and history vectors per program of the gather kernel."""
_TILE_BYTES = 8192
"""Of one tile (history vectors x part of D): sixteen floats a thread, and there are six tiles."""
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
        tests: see `propose`, as for the rest, with all slots of the ring.
        images: likewise.
        squares: likewise.
        gram: likewise.
        kind: "I" or "II".
        ridge: relative regularisation.
        min_angle: in radians.
        relaxation: 1 is undamped.
    """

    def __init__(
        self,
        tests: Tensor,
        images: Tensor,
        squares: Tensor,
        gram: Tensor,
        *,
        kind: Kind,
        ridge: float,
        min_angle: float,
        relaxation: float,
    ) -> None:
        self._memory = tests, images, squares, gram
        self._kind: Kind = kind
        self._ridge, self._min_angle, self._relaxation = ridge, min_angle, relaxation

    def propose(
        self, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], slot: int, filled: int
    ) -> Tensor:
        """The next point (B, D), from the iterate and the one before."""
        return propose(
            *now,
            *before,
            *self._memory,
            slot=slot,
            filled=filled,
            kind=self._kind,
            ridge=self._ridge,
            min_angle=self._min_angle,
            relaxation=self._relaxation,
        )


def propose(
    z: Tensor,
    fz: Tensor,
    previous_z: Tensor,
    previous_fz: Tensor,
    tests: Tensor,
    images: Tensor,
    squares: Tensor | None,
    gram: Tensor,
    *,
    slot: int,
    filled: int | None = None,
    kind: Kind,
    ridge: float,
    min_angle: float,
    relaxation: float,
) -> Tensor:
    """Write the newest differences into the history and return the next point.

    The equations are those of `equilibria.Anderson`. A sample whose small system is singular or not
    finite takes the plain step. No gradients are recorded. Windows of more than 32 differences
    are solved by `torch.linalg` between the passes instead of in registers; `ridge`, `min_angle`
    and `relaxation` are compiled in.

    Args:
        z: the point (B, D), float32 or float64.
        fz: its image.
        previous_z: the point before.
        previous_fz: its image.
        tests: a ring's filled slots (B, n, D), or more with `filled`: differences of points for
            kind "I", of residuals for kind "II". Slot `slot` is overwritten.
        images: differences of images, likewise.
        squares: inner products S^T S (B, n, n) of kind "I", not used for kind "II". Row and column
            `slot` are overwritten.
        gram: S^T (S - F) of kind "I", R^T R of kind "II", likewise.
        slot: where the new differences go; the slots before it, cyclically, are ever older.
        filled: how many slots count (n), the new one included; None is all that `tests` has.
        kind: "I" or "II", see `Anderson`.
        ridge: relative to each column's own scale.
        min_angle: in radians; columns closer than this to the span of newer ones get no weight.
        relaxation: 1 is undamped.
    """
    z, fz = z.contiguous(), fz.contiguous()
    previous_z, previous_fz = previous_z.contiguous(), previous_fz.contiguous()
    num_samples, size = z.shape
    num_vectors = tests.shape[1] if filled is None else filled
    out = torch.empty_like(z)
    if z.numel() == 0:
        return out
    first_kind = kind == "I"
    if squares is None:
        squares = gram
    weights = z.new_empty(num_samples, num_vectors)
    num_rows = min(triton.next_power_of_2(num_vectors), _NUM_REGISTER_ROWS)
    block = max(_BLOCK, triton.next_power_of_2(triton.cdiv(size, _MAX_BLOCKS)))
    width = min(_TILE_BYTES // (num_rows * z.element_size()), block)
    num_blocks = triton.cdiv(size, block)
    pair = (z, fz, previous_z, previous_fz)
    ring = (tests, images, tests.stride(0), tests.stride(1), images.stride(0), images.stride(1))
    small = (squares, gram, squares.stride(0), squares.stride(1), gram.stride(0), gram.stride(1))
    form = {"FIRST_KIND": first_kind, "NUM_ROWS": num_rows}
    limits = {
        "RIDGE": ridge,
        "MIN_ANGLE": min_angle,
        "SMALLEST": torch.finfo(gram.dtype).tiny ** (2 / 3),
        "ROUNDING": 10.0 * torch.finfo(gram.dtype).eps,
    }
    mixing = {"RELAXATION": relaxation, "FLAT_WIDTH": _BLOCK}
    with torch.cuda.device_of(z):
        if size <= _FUSED_SIZE and num_vectors <= _NUM_REGISTER_ROWS:
            _fused_kernel[(num_samples,)](
                *pair, *ring, *small, weights, out, size, num_vectors, slot,
                **form, **_OPTIONS, **limits, **mixing, WIDTH=width,
            )  # fmt: skip
            return out
        num_products = 4 if first_kind else 2
        sums = z.new_empty(num_samples, num_blocks, num_products, num_vectors)
        grid = (num_samples, num_blocks, triton.cdiv(num_vectors, num_rows))
        _gather_kernel[grid](
            *pair, *ring, sums, size, num_vectors, slot, num_blocks,
            **form, **_OPTIONS, NUM_PRODUCTS=num_products, BLOCK=block, WIDTH=width,
        )  # fmt: skip
        if num_vectors <= _NUM_REGISTER_ROWS:
            _weigh_kernel[(num_samples,)](
                *small, sums, weights, num_vectors, slot, num_blocks,
                **form, **_OPTIONS, **limits, NUM_PRODUCTS=num_products,
                num_warps=1 if num_rows <= 16 else 4,
            )  # fmt: skip
        else:
            products = sums.double().sum(1).unbind(1)
            leading = slice(num_vectors)
            matrices = (squares[:, leading, leading], gram[:, leading, leading])
            weigh = _weights_first if first_kind else _weights_second
            weights.copy_(weigh(products, *matrices, slot, ridge, min_angle))
        _mix_kernel[(num_samples, num_blocks)](
            z, fz, *ring, weights, out, size, num_vectors,
            FIRST_KIND=first_kind, BLOCK=block, **mixing, **_OPTIONS,
        )  # fmt: skip
    return out


# --- Kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_vectors", "slot"])
def _fused_kernel(
    z, fz, previous_z, previous_fz,
    tests, images, test_batch, test_row, image_batch, image_row,
    squares, gram, square_batch, square_row, gram_batch, gram_row,
    weights, out, size, num_vectors, slot,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr,
    RIDGE: tl.constexpr, MIN_ANGLE: tl.constexpr, SMALLEST: tl.constexpr, ROUNDING: tl.constexpr,
    RELAXATION: tl.constexpr, FLAT_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    z, fz, out = z + sample * size, fz + sample * size, out + sample * size
    tests, images = tests + sample * test_batch, images + sample * image_batch
    weights += sample * num_vectors
    rows = tl.arange(0, NUM_ROWS)
    own, right, by_image, over_images = _gather(
        z, fz, previous_z + sample * size, previous_fz + sample * size,
        tests, images, test_row, image_row,
        0, size, size, num_vectors, slot, rows, True, FIRST_KIND, NUM_ROWS, WIDTH,
    )  # fmt: skip
    gamma = _weigh(
        own, right, by_image, over_images,
        squares + sample * square_batch, gram + sample * gram_batch, square_row, gram_row,
        num_vectors, slot, FIRST_KIND, NUM_ROWS, RIDGE, MIN_ANGLE, SMALLEST, ROUNDING,
    )  # fmt: skip
    tl.store(weights + rows, gamma, mask=rows < num_vectors)
    # What this program has written, other threads of it read below: weights and differences.
    tl.debug_barrier()
    _mix(
        z, fz, tests, images, test_row, image_row, weights, out,
        0, size, size, num_vectors, FIRST_KIND, RELAXATION, FLAT_WIDTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_vectors", "slot", "num_blocks"])
def _gather_kernel(
    z, fz, previous_z, previous_fz,
    tests, images, test_batch, test_row, image_batch, image_row,
    sums, size, num_vectors, slot, num_blocks,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample, block, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows = group * NUM_ROWS + tl.arange(0, NUM_ROWS)
    begin = block * BLOCK
    own, right, by_image, over_images = _gather(
        z + sample * size, fz + sample * size,
        previous_z + sample * size, previous_fz + sample * size,
        tests + sample * test_batch, images + sample * image_batch, test_row, image_row,
        begin, tl.minimum(begin + BLOCK, size), size, num_vectors, slot, rows,
        # Of the groups of rows, the first does the writing.
        group == 0, FIRST_KIND, NUM_ROWS, WIDTH,
    )  # fmt: skip
    at = sums + (sample * num_blocks + block) * NUM_PRODUCTS * num_vectors + rows
    filled = rows < num_vectors
    tl.store(at, own, mask=filled)
    tl.store(at + num_vectors, right, mask=filled)
    if FIRST_KIND:
        tl.store(at + 2 * num_vectors, by_image, mask=filled)
        tl.store(at + 3 * num_vectors, over_images, mask=filled)


@triton.jit(do_not_specialize=["num_vectors", "slot", "num_blocks"])
def _weigh_kernel(
    squares, gram, square_batch, square_row, gram_batch, gram_row,
    sums, weights, num_vectors, slot, num_blocks,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr,
    RIDGE: tl.constexpr, MIN_ANGLE: tl.constexpr, SMALLEST: tl.constexpr, ROUNDING: tl.constexpr,
    NUM_PRODUCTS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, NUM_ROWS)
    sums += sample * num_blocks * NUM_PRODUCTS * num_vectors
    stride = NUM_PRODUCTS * num_vectors
    own = _total(sums, stride, num_blocks, num_vectors, NUM_ROWS)
    right = _total(sums + num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    by_image, over_images = own, own
    if FIRST_KIND:
        by_image = _total(sums + 2 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
        over_images = _total(sums + 3 * num_vectors, stride, num_blocks, num_vectors, NUM_ROWS)
    gamma = _weigh(
        own, right, by_image, over_images,
        squares + sample * square_batch, gram + sample * gram_batch, square_row, gram_row,
        num_vectors, slot, FIRST_KIND, NUM_ROWS, RIDGE, MIN_ANGLE, SMALLEST, ROUNDING,
    )  # fmt: skip
    tl.store(weights + sample * num_vectors + rows, gamma, mask=rows < num_vectors)


@triton.jit(do_not_specialize=["num_vectors"])
def _mix_kernel(
    z, fz, tests, images, test_batch, test_row, image_batch, image_row,
    weights, out, size, num_vectors,
    FIRST_KIND: tl.constexpr, RELAXATION: tl.constexpr, BLOCK: tl.constexpr,
    FLAT_WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    _mix(
        z + sample * size, fz + sample * size,
        tests + sample * test_batch, images + sample * image_batch, test_row, image_row,
        weights + sample * num_vectors, out + sample * size,
        begin, tl.minimum(begin + BLOCK, size), size, num_vectors,
        FIRST_KIND, RELAXATION, FLAT_WIDTH,
    )  # fmt: skip


# --- Parts of kernels: of one sample, whose pointers they get ----------------------------------


@triton.jit
def _gather(
    z, fz, previous_z, previous_fz, tests, images, test_row, image_row,
    begin, end, size, num_vectors, slot, rows, writes,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the differences from `begin` to `end`; their four products with history `rows`.

    New test with tests, residual with tests, new image with tests, new test with images; kind II
    has the first two only.
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
        if FIRST_KIND:
            new_test = point - previous_point
        else:
            new_test = residual - (previous_image - previous_point)
        mask = older & inside[None, :]
        # The new row comes from registers: other programs of this sample may not have written it.
        vectors = tl.load(test_rows + d[None, :], mask=mask, other=0.0)
        vectors = tl.where(is_new, new_test[None, :], vectors)
        own += vectors * new_test[None, :]
        right += vectors * residual[None, :]
        if FIRST_KIND:
            by_image += vectors * new_image[None, :]
            vectors = tl.load(image_rows + d[None, :], mask=mask, other=0.0)
            vectors = tl.where(is_new, new_image[None, :], vectors)
            over_images += vectors * new_test[None, :]
        if writes:
            tl.store(new_test_row + d, new_test, mask=inside)
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
    own, right, by_image, over_images, squares, gram, square_row, gram_row, num_vectors, slot,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr,
    RIDGE: tl.constexpr, MIN_ANGLE: tl.constexpr, SMALLEST: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Bring the small matrices up to date and solve for the weights (NUM_ROWS,)."""
    rows = tl.arange(0, NUM_ROWS)
    filled = rows < num_vectors
    # Selected, not multiplied: products of rows beyond the window may be NaN.
    own = tl.where(filled, own.to(tl.float64), 0.0)
    right = tl.where(filled, right.to(tl.float64), 0.0)
    if FIRST_KIND:
        by_image = tl.where(filled, by_image.to(tl.float64), 0.0)
        over_images = tl.where(filled, over_images.to(tl.float64), 0.0)
        lengths = _replace(squares, square_row, own, own, num_vectors, slot, NUM_ROWS)
        # R = F - S is negative on a contraction; so is what is kept, and with it the weights.
        system = _replace(
            gram, gram_row, own - by_image, own - over_images, num_vectors, slot, NUM_ROWS
        )
        right = -right
    else:
        lengths = _replace(gram, gram_row, own, own, num_vectors, slot, NUM_ROWS)
        system = lengths
    diagonal = rows[:, None] == rows[None, :]
    length = tl.sum(tl.where(diagonal, lengths, 0.0), 1)
    # A comparison, since tl.maximum would hide a NaN.
    scale = 1.0 / tl.sqrt(tl.where(length < SMALLEST, SMALLEST, length))
    scale = tl.where(filled, scale, 0.0)
    if MIN_ANGLE > 0.0:
        unit = lengths * scale[:, None] * scale[None, :]
        sines = _sines(tl.where(diagonal, unit + ROUNDING, unit), num_vectors, slot, NUM_ROWS)
        scale = tl.where(sines >= MIN_ANGLE, scale, 0.0)
    counts = scale > 0.0
    unit = system * scale[:, None] * scale[None, :]
    # Selected, since 0 times NaN is NaN: what does not count may be anything.
    unit = tl.where(counts[:, None] & counts[None, :], unit, 0.0)
    right = tl.where(counts, scale * right, 0.0)
    if FIRST_KIND:
        # Positive on a contraction, so that adding the ridge takes the system away from singular.
        shift = tl.where(counts, tl.full((NUM_ROWS,), RIDGE, tl.float64), 1.0)
        unit += tl.where(diagonal, shift[:, None], 0.0)
    else:
        unit = tl.where(diagonal, tl.full((NUM_ROWS, NUM_ROWS), 1.0 + RIDGE, tl.float64), unit)
    gamma = tl.where(counts, scale * _solve(unit, right, num_vectors, NUM_ROWS), 0.0)
    # A system too singular to solve gets the plain step.
    solved = tl.abs(tl.sum(gamma, 0)) < float("inf")
    return tl.where(solved, gamma, 0.0)


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
def _sines(unit, num_vectors, slot, NUM_ROWS: tl.constexpr):
    """Sine of the angle of every column with the span of the newer ones.

    Pivots of the Cholesky factor, columns from the newest to the oldest; 0 from the first that is
    not positive.
    """
    rows = tl.arange(0, NUM_ROWS)
    sines = tl.zeros((NUM_ROWS,), tl.float64)
    for age in range(num_vectors):
        at = (slot - age + num_vectors) % num_vectors
        column = tl.sum(tl.where((rows == at)[None, :], unit, 0.0), 1)
        pivot = tl.sum(tl.where(rows == at, column, 0.0), 0)
        # Beyond such a pivot all are NaN, which no comparison lets through.
        pivot = tl.where(pivot > 0.0, pivot, float("nan"))
        sines = tl.where(rows == at, tl.sqrt(pivot), sines)
        unit -= column[:, None] * (column / pivot)[None, :]
    return sines


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
    z, fz, tests, images, test_row, image_row, weights, out, begin, end, size, num_vectors,
    FIRST_KIND: tl.constexpr, RELAXATION: tl.constexpr, FLAT_WIDTH: tl.constexpr,
):  # fmt: skip
    """The next point, from `begin` to `end`."""
    for first in range(begin, end, FLAT_WIDTH):
        d = first + tl.arange(0, FLAT_WIDTH)
        inside = d < size
        mixed = tl.load(fz + d, mask=inside, other=0.0)
        if RELAXATION != 1.0:
            mixed -= (1.0 - RELAXATION) * (mixed - tl.load(z + d, mask=inside, other=0.0))
        at_image, at_test = images + d, tests + d
        for vector in range(num_vectors):
            weight = tl.load(weights + vector)
            # What is left out is not even read, and may be NaN.
            if weight != 0.0:
                change = tl.load(at_image, mask=inside, other=0.0)
                if RELAXATION != 1.0:
                    test = tl.load(at_test, mask=inside, other=0.0)
                    # Less a part of R, which is what type II is tested by, and F - S for type I.
                    if FIRST_KIND:
                        test = change - test
                    change -= (1.0 - RELAXATION) * test
                mixed -= weight * change
            at_image += image_row
            at_test += test_row
        tl.store(out + d, mixed, mask=inside)


# --- The small system of a long window, on the host's schedule ---------------------------------


def _weights_second(
    products: tuple[Tensor, ...],
    squares: Tensor,
    gram: Tensor,
    slot: int,
    ridge: float,
    min_angle: float,
) -> Tensor:
    """What `_weigh` does for kind II."""
    own, right = (product.to(gram.dtype) for product in products)
    gram[:, :, slot] = own
    gram[:, slot] = own
    scale = _scale(gram, slot, min_angle)
    ones = torch.full_like(scale, 1.0 + ridge)
    unit = _scaled(gram, scale)
    return _finite_weights(torch.diagonal_scatter(unit, ones, dim1=1, dim2=2), scale, right)


def _weights_first(
    products: tuple[Tensor, ...],
    squares: Tensor,
    gram: Tensor,
    slot: int,
    ridge: float,
    min_angle: float,
) -> Tensor:
    """What `_weigh` does for kind I."""
    own, right, by_image, over_images = (product.to(gram.dtype) for product in products)
    squares[:, :, slot] = own
    squares[:, slot] = own
    gram[:, :, slot] = own - by_image
    gram[:, slot] = own - over_images
    scale = _scale(squares, slot, min_angle)
    shift = torch.where(scale > 0, ridge, 1.0).to(scale.dtype)
    return _finite_weights(_scaled(gram, scale) + torch.diag_embed(shift), scale, -right)


def _scale(squares: Tensor, slot: int, min_angle: float) -> Tensor:
    """One over the lengths (B, n), 0 for columns nearly in the span of newer ones."""
    dtype = squares.dtype
    lengths = squares.diagonal(dim1=1, dim2=2)
    scale = lengths.clamp_min(torch.finfo(dtype).tiny ** (2 / 3)).rsqrt()
    if min_angle == 0.0:
        return scale
    ordered = _scaled(squares, scale).flip((1, 2)).roll((slot + 1, slot + 1), (1, 2))
    ordered.diagonal(dim1=1, dim2=2).add_(10.0 * torch.finfo(dtype).eps)
    factor, failed_at = torch.linalg.cholesky_ex(ordered)
    sines = factor.diagonal(dim1=1, dim2=2)
    # The factor is valid up to the pivot that was not positive, counted from 1.
    valid = (failed_at == 0).unsqueeze(1) | (
        torch.arange(1, lengths.shape[1] + 1, device=squares.device) < failed_at.unsqueeze(1)
    )
    counts = (valid & (sines >= min_angle)).roll(-(slot + 1), 1).flip(1)
    return torch.where(counts, scale, 0.0)


def _scaled(matrix: Tensor, scale: Tensor) -> Tensor:
    counts = scale > 0
    scaled = matrix * scale.unsqueeze(1) * scale.unsqueeze(2)
    return torch.where(counts.unsqueeze(1) & counts.unsqueeze(2), scaled, 0.0)


def _finite_weights(unit: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    right = torch.where(scale > 0, scale * right, 0.0)
    gamma = torch.where(scale > 0, scale * torch.linalg.solve_ex(unit, right)[0], 0.0)
    return torch.where(torch.isfinite(gamma.sum(1, keepdim=True)), gamma, 0.0)
