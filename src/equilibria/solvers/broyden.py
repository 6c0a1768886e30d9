"""Broyden's good and bad method in compact form, with limited or full memory."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from equilibria.core.backtracking import backtrack
from equilibria.core.errors import UserError, nearest
from equilibria.core.fused import kernels
from equilibria.core.history import (
    HistoryDtype,
    Ring,
    SmallMatrix,
    add_mixture,
    dtype_of,
    inner_products,
)
from equilibria.core.iterate import Iterate
from equilibria.core.parameters import check_positive_integer, check_relaxation
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver

Kind = Literal["good", "bad"]


class BroydenState:
    """Vectors and image differences of the last updates, and their inner products."""

    def __init__(
        self, iterate: Iterate, size: int, kind: Kind, dtype: torch.dtype | None = None
    ) -> None:
        self.kind = kind
        self.vectors = Ring(iterate.z, size, dtype)
        """Steps for the good method, residual differences for the bad one."""
        self.image_differences = Ring(iterate.z, size, dtype)
        self.squares = SmallMatrix(iterate.z, size)
        self.by_images = SmallMatrix(iterate.z, size)
        self.previous: Iterate | None = None
        """Where the last step began; the next pair is measured from here."""
        self.latest: Iterate | None = None
        """Where the last step led."""
        shape, device = (iterate.z.shape[0], size), iterate.z.device
        self._born = torch.zeros(shape, dtype=torch.int64, device=device)
        self.fused: Any = None
        """The compiled step on this memory, if there is one."""

    def push(self, iterate: Iterate, previous: Iterate) -> tuple[Tensor, Tensor]:
        """Add a pair; return the vectors and image differences that are in its slot, (B, D) each.

        A sample that did not move keeps its oldest pair where there is no room for another one:
        what is known of a finished sample must not depend on how long others go on.
        """
        count, slot = self.vectors.num_pushed, self.vectors.num_pushed % self.vectors.size
        rows = None
        # The bad method would take rounding noise in the images of a resting sample for news.
        if self.kind == "bad" or count >= self.vectors.size:
            length = torch.linalg.vector_norm(iterate.z - previous.z, dim=1, keepdim=True)
            rows = (length > 0) & torch.isfinite(length)
        kept = self._born[:, slot]
        self._born[:, slot] = count if rows is None else torch.where(rows[:, 0], count, kept)
        if self.kind == "good":
            new = self.vectors.push_difference(iterate.z, previous.z, rows)
        else:
            new = self.vectors.push_difference(iterate.residual, previous.residual, rows)
        return new, self.image_differences.push_difference(iterate.fz, previous.fz, rows)

    def fuse(self, fused: bool | None, relaxation: float) -> None:
        """Have steps made in one call, where they can be."""
        compiled = kernels("broyden", self.vectors.buffer, fused)
        if compiled is None:
            return
        self.fused = compiled.Step(
            self.vectors.buffer,
            self.image_differences.buffer,
            self.squares.whole,
            self.by_images.whole,
            self._born,
            kind=self.kind,
            relaxation=relaxation,
        )

    def of_rows(self, rows: Tensor) -> BroydenState:
        """The memory of some samples only, given by their indices (b,); not fused."""
        part = copy(self)
        part.vectors = self.vectors.of_rows(rows)
        part.image_differences = self.image_differences.of_rows(rows)
        part.squares, part.by_images = self.squares.of_rows(rows), self.by_images.of_rows(rows)
        part._born = self._born[rows]
        for name in ("previous", "latest"):
            point: Iterate | None = getattr(self, name)
            if point is not None:
                setattr(part, name, Iterate(*(tensor[rows] for tensor in point)))
        part.fused = None
        return part

    def older_rows(self, squares: Tensor) -> Tensor:
        """The upper triangle by age, sample by sample: row not newer than column."""
        born = self._born[:, : squares.shape[1]]
        return torch.where(born.unsqueeze(2) <= born.unsqueeze(1), squares, 0.0)

    def finite_pairs(self) -> tuple[Tensor, Tensor]:
        """The pairs (B, n, D), zero where f was not finite, in no more memory than they fill."""
        vectors, images = self.vectors.vectors, self.image_differences.vectors
        finite = torch.isfinite(vectors.sum(2) + images.sum(2)).unsqueeze(2)
        full = vectors.shape[1] == self.vectors.size
        if full:
            return vectors.masked_fill_(~finite, 0.0), images.masked_fill_(~finite, 0.0)
        return torch.where(finite, vectors, 0.0), torch.where(finite, images, 0.0)


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's method on g(z) = f(z) - z, started from the Jacobian -I.

    With S, R and F the differences of points, residuals and images over the last `history_size`
    updates, r_k = f(z_k) - z_k, and triu(.) the upper triangle (older row, newer column), the
    secant updates have closed forms,

        good:  z_{k+1} = z_k + r_k + F (triu(S^T S) - S^T F)^-1 S^T r_k
        bad:   z_{k+1} = z_k + r_k - F triu(R^T R)^-1 R^T r_k

    times `relaxation` for the step z_{k+1} - z_k. The good method is the least change of the
    Jacobian that explains each step, the bad one the least change of its inverse. Forgetting the
    oldest pair is dropping a column: what is left is exactly Broyden's method on the remaining
    pairs, where a product of rank-one factors would be corrupted.

    The most robust choice for non-normal maps and spectral radius above 1; on easy contractions
    Anderson does the same work with a shorter history.

    Cost per step: one evaluation; 2 L state copies of memory; three passes over L vectors (bad:
    two). The line search adds one evaluation of the whole batch whenever some sample's step has
    to be halved, at most 5 a step, and waits for the device once an evaluation.

    Args:
        history_size: pairs kept (L); None keeps all. 20 keeps nearly all of the robustness of
            the full method on our problem families.
        relaxation: 1 (default) takes the full quasi-Newton step.
        kind: "good" (default) or "bad". The bad method cannot run into a singular update, but
            forgets more slowly what was wrong; it is ahead only on nearly linear problems.
        line_search: halve the step of a sample, up to 5 times, until

                |r(z + t d)| <= (1 - 1e-4 t) |r(z)|,

            and take the best of the points tried if none will do. No derivative is needed, but
            then descent is not guaranteed either. Off by default: detours often pay.
        fused: the step compiled into two passes over the pairs: None (default) where that is
            known to be faster, True or an error, False never. The same numbers up to rounding.
        history_dtype: "bfloat16" rounds pairs when they are kept, which halves the memory of the
            solver; all arithmetic stays in the state's precision. None (default) keeps them as
            they are. What it costs in evaluations is in docs/performance.md.

    Raises:
        UserError: history_size below 1, relaxation not in (0, 2), an unknown kind.

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19
        (1965). Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices and their
        use in limited memory methods, Math. Programming 63 (1994), section 6. For the line
        search: Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 8.
    """

    history_size: int | None = 20
    relaxation: float = 1.0
    kind: Kind = "good"
    line_search: bool = False
    fused: bool | None = None
    history_dtype: HistoryDtype | None = None

    def __post_init__(self) -> None:
        if self.history_size is not None:
            check_positive_integer("history_size", self.history_size)
        dtype_of(self.history_dtype)
        check_relaxation(self.relaxation)
        if self.kind not in get_args(Kind):
            raise UserError(
                f"kind={self.kind!r} of Broyden is not one of 'good', 'bad'"
                f"{nearest(str(self.kind), get_args(Kind))}"
            )
        if not isinstance(self.line_search, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"line_search={self.line_search!r} of Broyden must be True or False")

    @property
    def single_evaluation(self) -> bool:
        """Whether a step is `evaluate(propose(...))` and nothing else."""
        return not self.line_search

    @property
    def separable(self) -> bool:
        """Whether finished samples can leave the batch."""
        return True

    def select(self, state: BroydenState, rows: Tensor) -> BroydenState:
        """The pairs of some samples only."""
        part = state.of_rows(rows)
        part.fuse(self.fused, self.relaxation)
        return part

    def init(self, iterate: Iterate, max_steps: int) -> BroydenState:
        """Allocate the pairs, no more than the solve can fill."""
        size = min(self.history_size or max_steps, max_steps)
        state = BroydenState(iterate, size, self.kind, dtype_of(self.history_dtype))
        state.fuse(self.fused, self.relaxation)
        return state

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: BroydenState
    ) -> tuple[Iterate, BroydenState]:
        """Add the pair of the last step, then take the quasi-Newton step."""
        z, state = self.propose(iterate, state)
        state.latest = backtrack(evaluate, iterate, z) if self.line_search else evaluate(z)
        return state.latest, state

    def propose(self, iterate: Iterate, state: BroydenState) -> tuple[Tensor, BroydenState]:
        """The next point, not yet evaluated."""
        if state.previous is not None and state.fused is not None:
            count = state.vectors.num_pushed
            state.vectors.reserve()
            state.image_differences.reserve()
            z = state.fused.propose(iterate, state.previous, count)
            state.previous = iterate
            return z, state
        if state.previous is None:
            target = iterate.fz
        else:
            weigh = _weights_good if self.kind == "good" else _weights_bad
            weights = weigh(state, iterate, state.previous)
            target = add_mixture(iterate.fz, weights, state.image_differences.vectors)
        state.previous = iterate
        if self.kind == "good":
            iterate.forget_residual()  # not to be kept while f is evaluated
        z = target if self.relaxation == 1.0 else iterate.z.lerp(target, self.relaxation)
        return z, state

    def inverse_jacobian_t(
        self, state: BroydenState, iterate: Iterate
    ) -> Callable[[Tensor], Tensor] | None:
        """The transposed estimate, the last steps included; holds 2 L state copies at most.

        Good: u = g + S (triu(S^T S) - S^T F)^-T F^T g; bad: u = g - R triu(R^T R)^-T F^T g.
        """
        # Both ways to `iterate`: a sample that failed goes back to its best point from the latest,
        # as it does in the loop while others go on.
        for point in (state.latest, iterate):
            if state.previous is not None and point is not None and point is not state.previous:
                state.push(point, state.previous)
                state.previous = point
        return _TransposedInverse(state) if len(state.vectors) else torch.clone


def _weights_good(state: BroydenState, iterate: Iterate, previous: Iterate) -> Tensor:
    """Add the last pair and solve (triu(S^T S) - S^T F) w = S^T r; (B, 1, n) weights of F."""
    new_step, new_image = state.push(iterate, previous)
    steps, images = state.vectors.vectors, state.image_differences.vectors
    slot, n = state.vectors.newest, steps.shape[1]
    by_step, by_image = inner_products(new_step, steps), inner_products(new_image, steps)
    state.squares.set_column(slot, by_step)
    state.squares.set_row(slot, by_step)
    state.by_images.set_column(slot, by_image)
    state.by_images.set_row(slot, inner_products(new_step, images))
    squares = state.squares.leading(n)
    system = state.older_rows(squares) - state.by_images.leading(n)
    right = inner_products(iterate.residual, steps)
    return _solve(squares, system, right).to(right.dtype).unsqueeze(1)


def _weights_bad(state: BroydenState, iterate: Iterate, previous: Iterate) -> Tensor:
    """Add the last pair and solve triu(R^T R) w = -R^T r; (B, 1, n) weights of F."""
    new, _ = state.push(iterate, previous)
    vectors, slot = state.vectors.vectors, state.vectors.newest
    column, right = inner_products(new, vectors), inner_products(iterate.residual, vectors)
    state.squares.set_column(slot, column)
    state.squares.set_row(slot, column)
    squares = state.squares.leading(vectors.shape[1])
    return _solve(squares, state.older_rows(squares), -right).to(right.dtype).unsqueeze(1)


class _TransposedInverse:
    """The map g -> (I - J^T)^-1 g by the estimate of Broyden's method, from its pairs.

    Transposes of the forms in `Broyden`: with w = M^-T F^T g for the small matrix M of the method,
    u = g + S w (good), u = g + R w (bad, where M = -triu(R^T R)).
    """

    def __init__(self, state: BroydenState) -> None:
        vectors, images = state.finite_pairs()
        self._vectors, self._images = vectors, images
        dtype = state.squares.dtype
        self._squares = _products(vectors, vectors).to(dtype)
        older = state.older_rows(self._squares)
        if state.kind == "good":
            self._system = older - _products(vectors, images).to(dtype)
        else:
            self._system = -older

    def __call__(self, g: Tensor) -> Tensor:
        right = inner_products(g, self._images)
        weights = _solve(self._squares, self._system.mT, right).to(g.dtype)
        return add_mixture(g, weights.unsqueeze(1), self._vectors)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Of every vector (B, n, D) with every other, in single precision at least: (B, n, n)."""
    if one.dtype != torch.bfloat16:
        return torch.bmm(one, other.mT)
    return torch.stack([inner_products(row.float(), other) for row in one.unbind(1)], 1)


def _solve(squares: Tensor, system: Tensor, right: Tensor) -> Tensor:
    """Solve the small system on vectors scaled to unit length (the update does not change)."""
    lengths = squares.diagonal(dim1=1, dim2=2)
    moved = lengths > 0
    # A step of zero (a sample that no longer moves) gets a unit diagonal and weight 0.
    scale = torch.where(moved, torch.where(moved, lengths, 1.0).rsqrt(), 0.0)
    unit = system * scale.unsqueeze(1) * scale.unsqueeze(2)
    unit = unit + torch.diag_embed((~moved).to(unit.dtype))
    weights = scale * torch.linalg.solve_ex(unit, scale * right)[0]
    # A singular update falls back to the plain step for that sample.
    return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, 0.0)
