"""Broyden's step on a GPU, in Triton: the same step as `Broyden.propose`.

A state that fits one program takes a single kernel; a larger one takes three or four:

0. lengths, only where a resting sample keeps what is in its slot, which must be known before
   anything is written: partial sums of the squares of the last step.
1. gather, see `passes_triton`, which also says how sums are made and how the state is cut.
2. weigh, a program per sample: adds up the partial sums, writes the new row and column of the small
   matrices and solves the system in registers.
3. mix, a program per sample and block of D: one pass over the image differences.

Words moved per float of the state, with n pairs; the lengths' 2, of `z` and `previous_z`, are those
of the bad method and of the good one once its ring is full:

    kind      lengths   gather   mix     together         with relaxation != 1
    good      0 or 2    2n + 4   n + 2   3n + 6 or 8      1 more
    bad       2         n + 5    n + 2   2n + 9           1 more
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

from equilibria.kernels import passes_triton as passes

Kind = Literal["good", "bad"]


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
            differences of residuals for kind "bad"; in the precision of z or in bfloat16.
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
    cut = passes.cut(z, num_vectors)
    pair = (z, fz, previous_z, previous_fz)
    ring = passes.with_strides(vectors, images)
    small = (*passes.with_strides(squares, by_images), born, born.stride(0))
    form = {"GOOD": good, "KEEPS": keeps, "NUM_ROWS": cut.num_rows}
    mixing = {"RELAXATION": relaxation, "FLAT_WIDTH": cut.flat_width}
    with torch.cuda.device_of(z):
        if cut.is_fused:
            _fused_kernel[(num_samples,)](
                *pair, *ring, *small, weights, out, size, num_vectors, slot, count,
                **form, **mixing, **passes.OPTIONS, WIDTH=cut.width,
            )  # fmt: skip
            return out
        lengths = z.new_empty(num_samples, cut.num_blocks) if keeps else None
        if lengths is not None:
            _lengths_kernel[(num_samples, cut.num_blocks)](
                z, previous_z, lengths, size, cut.num_blocks,
                BLOCK=cut.block, FLAT_WIDTH=cut.flat_width, **passes.OPTIONS,
            )  # fmt: skip
        sums = passes.gather_in_blocks(
            pair, vectors, images, cut,
            slot=slot, num_vectors=num_vectors, points=good, lengths=lengths,
        )  # fmt: skip
        if cut.in_registers:
            _weigh_kernel[(num_samples,)](
                *small, sums if lengths is None else lengths, sums, weights,
                num_vectors, slot, count, cut.num_blocks,
                **form, **passes.OPTIONS, MAX_BLOCKS=passes.MAX_BLOCKS,
                num_warps=1 if cut.num_rows <= 16 else 4,
            )  # fmt: skip
        else:
            length = None if lengths is None else lengths.double().sum(1)
            _update_born(born, slot, count, length)
            products = sums.double().sum(1).unbind(1)
            filled = slice(num_vectors)
            matrices = (squares[:, filled, filled], by_images[:, filled, filled])
            weigh = _weights_good if good else _weights_bad
            weights.copy_(weigh(products, *matrices, born[:, filled], slot))
        _mix_kernel[(num_samples, cut.num_blocks)](
            z, fz, images, images.stride(0), images.stride(1), weights, out, size, num_vectors,
            BLOCK=cut.block, **mixing, **passes.OPTIONS,
        )  # fmt: skip
    return out


# --- Kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_vectors", "slot", "count"])
def _fused_kernel(
    z, fz, previous_z, previous_fz,
    vectors, images, vector_batch, vector_row, image_batch, image_row,
    squares, by_images, square_batch, square_row, by_image_batch, by_image_row, born, born_batch,
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
        moved = passes.is_positive(_squared_step(z, previous_z, 0, size, size, FLAT_WIDTH))
    own, right, by_image, over_images = passes.gather(
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


@triton.jit(do_not_specialize=["num_vectors", "slot", "count", "num_blocks"])
def _weigh_kernel(
    squares, by_images, square_batch, square_row, by_image_batch, by_image_row, born, born_batch,
    lengths, sums, weights, num_vectors, slot, count, num_blocks,
    GOOD: tl.constexpr, KEEPS: tl.constexpr, NUM_ROWS: tl.constexpr, MAX_BLOCKS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, NUM_ROWS)
    moved = slot >= 0  # always
    if KEEPS:
        moved = passes.has_moved(lengths + sample * num_blocks, num_blocks, MAX_BLOCKS)
    own, right, by_image, over_images = passes.gathered(
        sums, sample, num_blocks, num_vectors, GOOD, NUM_ROWS
    )
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
    products = passes.replace(squares, square_row, own, own, num_vectors, slot, NUM_ROWS)
    # The upper triangle by age: row not newer than column.
    system = tl.where(age[:, None] <= age[None, :], products, 0.0)
    if GOOD:
        by_image = tl.where(filled, by_image.to(tl.float64), 0.0)
        over_images = tl.where(filled, over_images.to(tl.float64), 0.0)
        system -= passes.replace(
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
    answer = scale * passes.solve(unit, scale * right, num_vectors, NUM_ROWS)
    # A singular update falls back to the plain step.
    solved = tl.sum(tl.where(tl.abs(answer) < float("inf"), 0, 1), 0) == 0
    return tl.where(solved, answer, 0.0)


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
                change = tl.load(at_image, mask=inside, other=0.0).to(z.dtype.element_ty)
                mixed += weight * change
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
