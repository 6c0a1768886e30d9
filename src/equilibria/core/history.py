"""Ring buffers of vectors for quasi-Newton and mixing methods."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Literal, get_args

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.core.precision import widest

HistoryDtype = Literal["bfloat16"]
"""What a history may be rounded to; the range of float16 is too small for late differences."""


def dtype_of(name: HistoryDtype | None) -> torch.dtype | None:
    """The dtype of that name.

    Raises:
        UserError: another name.
    """
    if name is None:
        return None
    if name not in get_args(HistoryDtype):
        raise UserError(
            f"history_dtype={name!r} is neither None, which keeps the history as it is, nor "
            f"'bfloat16'{nearest(str(name), get_args(HistoryDtype))}"
        )
    return torch.bfloat16


class Ring:
    """The last `size` vectors of every sample, as one (B, size, D) tensor.

    The newest overwrites the oldest. Written in place, except while gradients are recorded
    (unrolled differentiation through a solver), where each push makes a new tensor.

    Args:
        like: a state (B, D).
        size: slots.
        dtype: what vectors are rounded to when they are kept; None keeps them as they are.
    """

    def __init__(self, like: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
        self.size = size
        self.num_pushed = 0
        self._buffer = like.new_zeros(like.shape[0], size, like.shape[1], dtype=dtype)

    def __len__(self) -> int:
        return min(self.num_pushed, self.size)

    @property
    def newest(self) -> int:
        """The slot that was written last."""
        return (self.num_pushed - 1) % self.size

    @property
    def vectors(self) -> Tensor:
        """The filled slots, (B, len, D), in slot order."""
        return self._buffer[:, : len(self)]

    @property
    def ages(self) -> list[int]:
        """Age of every filled slot, 0 for the newest."""
        return [(self.newest - slot) % self.size for slot in range(len(self))]

    def of_rows(self, rows: Tensor) -> Ring:
        """A ring with the vectors of some samples only, given by their indices (b,)."""
        ring = copy(self)
        ring._buffer = self._buffer[rows]
        return ring

    @property
    def buffer(self) -> Tensor:
        """All slots (B, size, D), for a compiled step that writes the next one itself."""
        return self._buffer

    def reserve(self) -> int:
        """Count one more vector, which the caller writes, and return its slot."""
        self.num_pushed += 1
        return self.newest

    def clear(self) -> None:
        """Forget all vectors; their slots are written anew."""
        self.num_pushed = 0

    def push_difference(self, new: Tensor, old: Tensor, rows: Tensor | None = None) -> Tensor:
        """Append `new - old` (B, D) and return it, rounded as it is kept.

        Samples outside of `rows` (B, 1) keep what is in the slot, and that is returned for them.
        """
        slot = self.num_pushed % self.size
        self.num_pushed += 1
        recording = torch.is_grad_enabled()
        rounds = self._buffer.dtype != new.dtype
        # compiled code knows no out= that is a slice
        if rows is None and not recording and not rounds and not torch.compiler.is_compiling():
            return torch.sub(new, old, out=self._buffer[:, slot])
        difference = new - old
        if rounds:
            difference = difference.to(self._buffer.dtype).to(new.dtype)
        if rows is not None:
            difference = torch.where(rows, difference, self._buffer[:, slot])
        if not recording:
            kept = self._buffer[:, slot].copy_(difference)
            return difference if rounds else kept
        kept = difference.unsqueeze(1).to(self._buffer.dtype)
        self._buffer = torch.cat([self._buffer[:, :slot], kept, self._buffer[:, slot + 1 :]], 1)
        return difference


def inner_products(x: Tensor, vectors: Tensor) -> Tensor:
    """Of x (B, D) with vectors (B, n, D), giving (B, n).

    As a row: the CPU's matrix products read that seven times faster than as a column.
    """
    row = x.unsqueeze(1)
    if vectors.dtype == x.dtype:
        return torch.bmm(row, vectors.mT).squeeze(1)
    parts = [torch.bmm(row[..., at], part.mT) for at, part in _in_precision_of(x, vectors)]
    return torch.stack(parts).sum(0).squeeze(1)


def add_mixture(x: Tensor, weights: Tensor, vectors: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x + alpha * sum_j weights_j vectors_j: x (B, D), weights (B, 1, n), vectors (B, n, D)."""
    row = x.unsqueeze(1)
    if vectors.dtype == x.dtype:
        return torch.baddbmm(row, weights, vectors, alpha=alpha).squeeze(1)
    parts = [
        torch.baddbmm(row[..., at], weights, part, alpha=alpha)
        for at, part in _in_precision_of(x, vectors)
    ]
    return torch.cat(parts, 2).squeeze(1)


PART = 2**18
"""Numbers of a history kept in less precision that are converted at a time: 1 MiB of float32."""


def _in_precision_of(x: Tensor, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The vectors (B, n, D), part of D by part, in the dtype of x, and which part that is."""
    rows, size = vectors.shape[0] * vectors.shape[1], vectors.shape[2]
    width = max(1, PART // max(rows, 1))
    for begin in range(0, max(size, 1), width):
        at = slice(begin, begin + width)
        yield at, vectors[..., at].to(x.dtype)


class SmallMatrix:
    """A (B, size, size) matrix of inner products, kept beside a `Ring`, one slot at a time."""

    def __init__(self, like: Tensor, size: int) -> None:
        self._matrix = like.new_zeros(like.shape[0], size, size, dtype=widest(like.device))

    def of_rows(self, rows: Tensor) -> SmallMatrix:
        """The matrices of some samples only, given by their indices (b,)."""
        small = copy(self)
        small._matrix = self._matrix[rows]
        return small

    @property
    def whole(self) -> Tensor:
        """The matrix (B, size, size), for a compiled step that writes to it."""
        return self._matrix

    @property
    def dtype(self) -> torch.dtype:
        """float64, or float32 where the device has no double."""
        return self._matrix.dtype

    def leading(self, n: int) -> Tensor:
        """The upper left (B, n, n) block."""
        return self._matrix[:, :n, :n]

    def set_column(self, slot: int, column: Tensor) -> None:
        """Write (B, n) into rows 0..n-1 of a column."""
        self._before_write()
        self._matrix[:, : column.shape[1], slot] = column

    def set_row(self, slot: int, row: Tensor) -> None:
        """Write (B, n) into columns 0..n-1 of a row."""
        self._before_write()
        self._matrix[:, slot, : row.shape[1]] = row

    def _before_write(self) -> None:
        if torch.is_grad_enabled():
            self._matrix = self._matrix.clone()
