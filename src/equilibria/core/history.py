"""Ring buffers of vectors for quasi-Newton and mixing methods."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from equilibria.core.precision import widest


class Ring:
    """The last `size` vectors of every sample, as one (B, size, D) tensor.

    The newest overwrites the oldest. Written in place, except while gradients are recorded
    (unrolled differentiation through a solver), where each push makes a new tensor.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        self.size = size
        self.num_pushed = 0
        self._buffer = like.new_zeros(like.shape[0], size, like.shape[1])

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
        """Append `new - old` (B, D) and return it.

        Samples outside of `rows` (B, 1) keep what is in the slot, and that is returned for them.
        """
        slot = self.num_pushed % self.size
        self.num_pushed += 1
        recording = torch.is_grad_enabled()
        # compiled code knows no out= that is a slice
        if rows is None and not recording and not torch.compiler.is_compiling():
            return torch.sub(new, old, out=self._buffer[:, slot])
        difference = new - old
        if rows is not None:
            difference = torch.where(rows, difference, self._buffer[:, slot])
        if not recording:
            return self._buffer[:, slot].copy_(difference)
        self._buffer = torch.cat(
            [self._buffer[:, :slot], difference.unsqueeze(1), self._buffer[:, slot + 1 :]], 1
        )
        return difference


def inner_products(x: Tensor, vectors: Tensor) -> Tensor:
    """Of x (B, D) with vectors (B, n, D), giving (B, n).

    As a row: the CPU's matrix products read that seven times faster than as a column.
    """
    return torch.bmm(x.unsqueeze(1), vectors.mT).squeeze(1)


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
