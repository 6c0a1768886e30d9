"""The Anderson step on a GPU, in Triton: the same step as `Anderson.propose`.

A state that fits one program takes a single kernel; a larger one takes three:

1. gather, see `passes_triton`, which also says how sums are made and how the state is cut.
2. weigh, a program per sample: adds up the partial sums, writes the new row and column of the small
   matrices, leaves out nearly dependent columns and solves the system in registers.
3. mix, a program per sample and block of D: one pass over the images.

Words moved per float of the state, with n differences:

    kind      gather   mix     together   with relaxation != 1
    I         2n + 4   n + 2   3n + 6     4n + 7
    II        n + 5    n + 2   2n + 7     3n + 8
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

Kind = Literal["I", "II"]


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
            kind "I", of residuals for kind "II", in the precision of z or in bfloat16. Slot
            `slot` is overwritten.
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
    cut = passes.cut(z, num_vectors)
    pair = (z, fz, previous_z, previous_fz)
    ring = passes.with_strides(tests, images)
    small = passes.with_strides(squares, gram)
    form = {"FIRST_KIND": first_kind, "NUM_ROWS": cut.num_rows}
    limits = {
        "RIDGE": ridge,
        "MIN_ANGLE": min_angle,
        "SMALLEST": torch.finfo(gram.dtype).tiny ** (2 / 3),
        "ROUNDING": 10.0 * torch.finfo(gram.dtype).eps,
    }
    mixing = {"RELAXATION": relaxation, "FLAT_WIDTH": cut.flat_width}
    with torch.cuda.device_of(z):
        if cut.is_fused:
            _fused_kernel[(num_samples,)](
                *pair, *ring, *small, weights, out, size, num_vectors, slot,
                **form, **limits, **mixing, **passes.OPTIONS, WIDTH=cut.width,
            )  # fmt: skip
            return out
        sums = passes.gather_in_blocks(
            pair, tests, images, cut, slot=slot, num_vectors=num_vectors, points=first_kind
        )
        if cut.in_registers:
            _weigh_kernel[(num_samples,)](
                *small, sums, weights, num_vectors, slot, cut.num_blocks,
                **form, **limits, **passes.OPTIONS, num_warps=1 if cut.num_rows <= 16 else 4,
            )  # fmt: skip
        else:
            products = sums.double().sum(1).unbind(1)
            leading = slice(num_vectors)
            matrices = (squares[:, leading, leading], gram[:, leading, leading])
            weigh = _weights_first if first_kind else _weights_second
            weights.copy_(weigh(products, *matrices, slot, ridge, min_angle))
        _mix_kernel[(num_samples, cut.num_blocks)](
            z, fz, *ring, weights, out, size, num_vectors,
            FIRST_KIND=first_kind, BLOCK=cut.block, **mixing, **passes.OPTIONS,
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
    own, right, by_image, over_images = passes.gather(
        z, fz, previous_z + sample * size, previous_fz + sample * size,
        tests, images, test_row, image_row,
        0, size, size, num_vectors, slot, rows, True, True, FIRST_KIND, False, NUM_ROWS, WIDTH,
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
def _weigh_kernel(
    squares, gram, square_batch, square_row, gram_batch, gram_row,
    sums, weights, num_vectors, slot, num_blocks,
    FIRST_KIND: tl.constexpr, NUM_ROWS: tl.constexpr,
    RIDGE: tl.constexpr, MIN_ANGLE: tl.constexpr, SMALLEST: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, NUM_ROWS)
    own, right, by_image, over_images = passes.gathered(
        sums, sample, num_blocks, num_vectors, FIRST_KIND, NUM_ROWS
    )
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
        lengths = passes.replace(squares, square_row, own, own, num_vectors, slot, NUM_ROWS)
        # R = F - S is negative on a contraction; so is what is kept, and with it the weights.
        system = passes.replace(
            gram, gram_row, own - by_image, own - over_images, num_vectors, slot, NUM_ROWS
        )
        right = -right
    else:
        lengths = passes.replace(gram, gram_row, own, own, num_vectors, slot, NUM_ROWS)
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
    gamma = tl.where(counts, scale * passes.solve(unit, right, num_vectors, NUM_ROWS), 0.0)
    # A system too singular to solve gets the plain step.
    solved = tl.abs(tl.sum(gamma, 0)) < float("inf")
    return tl.where(solved, gamma, 0.0)


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
                change = tl.load(at_image, mask=inside, other=0.0).to(z.dtype.element_ty)
                if RELAXATION != 1.0:
                    test = tl.load(at_test, mask=inside, other=0.0).to(z.dtype.element_ty)
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
