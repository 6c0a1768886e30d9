"""Ragged batches: several problems of different size along one leading dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.precision import widest

MOST_EMPTY = 10_000
"""Problems without rows that are let pass: more of them are identities, not numbers."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows of a state form which problem, as in batches of graphs.

    A row index (N,) becomes a place in a padded (G, capacity, ...) tensor, so that solvers see
    one row of zeros-padded numbers per problem: norms, inner products and convergence are those
    of each graph, for any solver, at the price of padding every graph to the largest.

    Args:
        slots: place of every row in the padded tensor, flattened (N,).
        num_segments: number of problems (G).
        capacity: rows of the largest problem.
        num_rows: rows of every problem (G,), 0 for those that have none.
        norm_scale: corrects a root mean square over the padded size to the true one (G,).
    """

    slots: Tensor
    num_segments: int
    capacity: int
    num_rows: Tensor
    norm_scale: Tensor

    @staticmethod
    def of(index: Tensor) -> Segments:
        """Read a segment index (N,): any order, problems without rows allowed.

        Raises:
            UserError: not one-dimensional integers of at least 0, or far larger ones than there
                are rows.
        """
        no_integers = index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
        if index.dim() != 1 or no_integers:
            raise UserError(
                f"segments has shape {tuple(index.shape)} and {index.dtype}; give one integer per "
                "row of the state, the number of the problem it belongs to"
            )
        index = index.to(torch.int64)
        if index.numel() and int(index.min()) < 0:
            raise UserError(f"segments holds {int(index.min())}; problems are numbered from 0")
        num_segments = int(index.max()) + 1 if index.numel() else 0
        if num_segments > MOST_EMPTY + index.numel():
            raise UserError(
                f"segments numbers {num_segments} problems, the largest is {num_segments - 1}, for "
                f"{index.numel()} rows, and every number takes memory whether it has rows or not; "
                "number them without gaps: _, segments = torch.unique(segments, "
                "return_inverse=True)"
            )
        counts = torch.bincount(index, minlength=num_segments)
        capacity = int(counts.max()) if num_segments else 0
        # rows of a problem keep their order: its i-th row gets position i
        order = torch.argsort(index, stable=True)
        starts = torch.cumsum(counts, 0) - counts
        position = torch.empty_like(index)
        position[order] = torch.arange(index.numel(), device=index.device) - starts[index[order]]
        scale = (capacity / counts.clamp_min(1).to(widest(index.device))).sqrt()
        return Segments(index * capacity + position, num_segments, capacity, counts, scale)

    def pad(self, rows: Tensor) -> Tensor:
        """(N, D) -> (G, capacity * D), zeros where there is no row."""
        padded = rows.new_zeros(self.num_segments * self.capacity, rows.shape[1])
        padded = padded.index_copy(0, self.slots, rows)
        return padded.reshape(self.num_segments, self.capacity * rows.shape[1])

    def unpad(self, padded: Tensor, width: int) -> Tensor:
        """(G, capacity * D) -> (N, D)."""
        return padded.reshape(self.num_segments * self.capacity, width)[self.slots]
