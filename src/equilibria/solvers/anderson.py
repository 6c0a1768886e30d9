"""Anderson acceleration, type I and type II."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

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
from equilibria.core.iterate import Iterate, choose, rms
from equilibria.core.parameters import (
    check_not_negative,
    check_positive_integer,
    check_relaxation,
)
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver

Kind = Literal["II", "I"]


class AndersonState:
    """Differences over the last steps with their inner products, and what the safeguard needs."""

    def __init__(self, iterate: Iterate, size: int, dtype: torch.dtype | None) -> None:
        self.test_differences = Ring(iterate.z, size, dtype)
        """Of residuals for type II, of points for type I: what the mixed residual is tested by."""
        self.image_differences = Ring(iterate.z, size, dtype)
        self.gram = SmallMatrix(iterate.z, size)
        self.squares = SmallMatrix(iterate.z, size)
        self.previous: Iterate | None = None
        self.previous_residual: Tensor | None = None
        """Of type II only."""
        self.guard: _Guard | None = None
        self.fused: Any = None
        """The compiled step on this memory, if there is one."""


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration, in difference form.

    With r_k = f(z_k) - z_k, and the columns of S, R and F the differences of consecutive points,
    residuals and images over the last `history_size` steps,

        type I:   S^T (r_k - R gamma) = 0
        type II:  gamma = argmin | r_k - R gamma |^2 + ridge |diag(R^T R)^(1/2) gamma|^2
        z_{k+1} = f(z_k) - F gamma - (1 - relaxation) (r_k - R gamma)

    Type I is a relative of Broyden's good method with all secant conditions kept at once. It is
    the default because on the 16 families of docs/peers.md it needs the fewest evaluations: within
    a tenth of type II on contractions, and well ahead where the map is expansive, stiff or has
    several fixed points.

    A difference that lies within `min_angle` of the span of newer ones is left out of a step: all
    it could add is what has changed since it was taken, magnified by one over the angle.

    Cost per step: one evaluation; 2 m state copies of memory; about 3 m + 6 words of traffic per
    float of the state (type II: 2 m + 6), because the small matrices gain one row a step and are
    never rebuilt. The safeguard keeps the best iterate: 2 state copies and 8 words more.

    Args:
        history_size: differences kept (m); None keeps all. 20 saves another tenth of the
            evaluations, a third where the spectral radius is above 1, for twice the memory and
            traffic. Type II with all of them is the method closest to GMRES on linear maps.
        relaxation: 1 (default) is undamped.
        ridge: regularisation relative to each column's own scale, so that a solve does not
            depend on the units of the state. An absolute one stalls on small vectors, as those
            of the backward system under mean-reduced losses are.
        min_angle: in radians; 0 keeps every difference. On small linear problems that are far
            from normal 0.03 already costs a few steps; below 0.01 nearly singular nonlinear ones
            (the H-equation near c = 1) take up to four times as many.
        kind: "I" (default) or "II".
        restart: forget the history after so many steps; None (default) lets the window slide,
            which is as good or better on nearly all of our problem families.
        safeguard: a sample whose residual exceeds this factor times its best goes back to its
            best iterate, forgets its history and takes a plain step, damped by a half and by a
            half more until the best improves. None (default) trusts every step: detours often
            pay, and on our problem families no factor from 1 to 100 saved an evaluation, while
            factors below 10 cost some. Give 10 for a map that throws the mixing off.
        fused: the step compiled into two passes over the history: None (default) where that is
            known to be faster and there is no safeguard, True or an error, False never. The same
            numbers up to rounding.
        history_dtype: "bfloat16" rounds differences when they are kept, which halves the memory
            of the solver; all arithmetic stays in the state's precision. None (default) keeps them
            as they are. What it costs in evaluations is in docs/performance.md.

    Raises:
        UserError: history_size or restart below 1, negative ridge, relaxation not in (0, 2),
            min_angle not in [0, 1), an unknown kind, a safeguard below 1.

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal.
        49 (2011), section 4. Fang and Saad, Two classes of multisecant methods for nonlinear
        acceleration, Numer. Linear Algebra Appl. 16 (2009), for the two types. Zhang, O'Donoghue
        and Boyd, Globally convergent type-I Anderson acceleration, SIAM J. Optim. 30 (2020), for
        safeguards.
    """

    history_size: int | None = 10
    relaxation: float = 1.0
    ridge: float = 1e-8
    min_angle: float = 0.01
    kind: Kind = "I"
    restart: int | None = None
    safeguard: float | None = None
    fused: bool | None = None
    history_dtype: HistoryDtype | None = None

    def __post_init__(self) -> None:
        if self.history_size is not None:
            check_positive_integer("history_size", self.history_size)
        dtype_of(self.history_dtype)
        check_relaxation(self.relaxation)
        check_not_negative("ridge", self.ridge)
        if not 0.0 <= self.min_angle < 1.0:
            raise UserError(f"min_angle={self.min_angle} of Anderson must lie in [0, 1) radians")
        if self.kind not in get_args(Kind):
            raise UserError(
                f"kind={self.kind!r} of Anderson is not one of 'II', 'I'"
                f"{nearest(str(self.kind), get_args(Kind))}"
            )
        if self.restart is not None:
            check_positive_integer("restart", self.restart)
        if self.safeguard is not None:
            check_not_negative("safeguard", self.safeguard)
            if self.safeguard < 1.0:
                raise UserError(
                    f"safeguard={self.safeguard} would undo every step that does not improve on "
                    "the best by that factor; give at least 1, or None for no safeguard"
                )

    @property
    def single_evaluation(self) -> bool:
        """Whether a step is `evaluate(propose(...))` and nothing else."""
        return True

    @property
    def separable(self) -> bool:
        """Whether finished samples can leave the batch; with a safeguard they stay."""
        return self.safeguard is None

    def select(self, state: AndersonState, rows: Tensor) -> AndersonState:
        """The history of some samples only."""
        part = copy(state)
        part.test_differences = state.test_differences.of_rows(rows)
        part.image_differences = state.image_differences.of_rows(rows)
        part.gram, part.squares = state.gram.of_rows(rows), state.squares.of_rows(rows)
        if state.previous is not None:
            part.previous = Iterate(*(tensor[rows] for tensor in state.previous))
        if state.previous_residual is not None:
            part.previous_residual = state.previous_residual[rows]
        part.fused = None
        self._fuse(part)
        return part

    def init(self, iterate: Iterate, max_steps: int) -> AndersonState:
        """Allocate the history, no longer than the solve can fill."""
        size = min(self.history_size or max_steps, self.restart or max_steps, max_steps)
        state = AndersonState(iterate, size, dtype_of(self.history_dtype))
        if self.safeguard is not None:
            state.guard = _Guard(iterate, size, self.safeguard)
        else:
            self._fuse(state)
        return state

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: AndersonState
    ) -> tuple[Iterate, AndersonState]:
        """Mix the last images by the weights that make the mixed residual small."""
        z, state = self.propose(iterate, state)
        return evaluate(z), state

    def propose(self, iterate: Iterate, state: AndersonState) -> tuple[Tensor, AndersonState]:
        """The next point, not yet evaluated."""
        guard = state.guard
        if guard is not None:
            iterate = guard.back_to_best(iterate)
        if state.previous is not None and state.image_differences.num_pushed == self.restart:
            state.test_differences.clear()
            state.image_differences.clear()
        if state.previous is not None and state.fused is not None:
            slot = state.test_differences.reserve()
            state.image_differences.reserve()
            filled = len(state.image_differences)
            z = state.fused.propose(iterate, state.previous, slot, filled)
            state.previous = iterate
            return z, state
        residual = iterate.residual
        if state.previous is None:
            z = iterate.z + self.relaxation * residual
        else:
            weigh = _weights_second if self.kind == "II" else _weights_first
            gamma = weigh(state, iterate, residual, self)
            z = self._mix(state, iterate, residual, gamma)
        if guard is not None:
            z = guard.damp(z, iterate)
        state.previous = iterate
        if self.kind == "II" and state.fused is None:
            state.previous_residual = residual
        else:
            iterate.forget_residual()  # not to be kept while f is evaluated
        return z, state

    def _fuse(self, state: AndersonState) -> None:
        """Have the rest of this file done in one call, where it can be."""
        compiled = kernels("anderson", state.image_differences.buffer, self.fused)
        if compiled is None:
            return
        state.fused = compiled.Step(
            state.test_differences.buffer,
            state.image_differences.buffer,
            state.squares.whole,
            state.gram.whole,
            kind=self.kind,
            ridge=self.ridge,
            min_angle=self.min_angle,
            relaxation=self.relaxation,
        )

    def _mix(
        self, state: AndersonState, iterate: Iterate, residual: Tensor, gamma: Tensor
    ) -> Tensor:
        """The point of the weights (B, 1, n)."""
        images, tests = state.image_differences.vectors, state.test_differences.vectors
        z = add_mixture(iterate.fz, gamma, images, alpha=-1.0)
        if self.relaxation == 1.0:
            return z
        # R is what type II is tested by, and F - S for type I.
        mixed = add_mixture(residual, gamma, tests, alpha=-1.0 if self.kind == "II" else 1.0)
        if self.kind == "I":
            mixed = mixed + (z - iterate.fz)
        return z - (1.0 - self.relaxation) * mixed


def _weights_second(
    state: AndersonState, iterate: Iterate, residual: Tensor, settings: Anderson
) -> Tensor:
    """Add the last pair and solve R^T R gamma = R^T r; (B, 1, n) weights."""
    previous = _last(state)
    if state.previous_residual is None:
        raise RuntimeError("type II is asked for weights without the last residual")
    difference = state.test_differences.push_difference(residual, state.previous_residual)
    state.image_differences.push_difference(iterate.fz, previous.fz)
    vectors, slot = state.test_differences.vectors, state.test_differences.newest
    row, right = inner_products(difference, vectors), inner_products(residual, vectors)
    state.gram.set_column(slot, row)
    state.gram.set_row(slot, row)
    gram = state.gram.leading(vectors.shape[1])
    scale = _scales(state, gram, settings.min_angle)
    unit = _scaled(gram, scale)
    ones = torch.full_like(scale, 1.0 + settings.ridge)
    return _solve(torch.diagonal_scatter(unit, ones, dim1=1, dim2=2), scale, right)


def _weights_first(
    state: AndersonState, iterate: Iterate, residual: Tensor, settings: Anderson
) -> Tensor:
    """Add the last pair and solve S^T R gamma = S^T r with R = F - S; (B, 1, n) weights.

    With the upper triangle of S^T S instead of all of it this is Broyden's good method.
    """
    previous = _last(state)
    new_step = state.test_differences.push_difference(iterate.z, previous.z)
    new_image = state.image_differences.push_difference(iterate.fz, previous.fz)
    steps, images = state.test_differences.vectors, state.image_differences.vectors
    slot, n = state.test_differences.newest, steps.shape[1]
    by_step, by_image = inner_products(new_step, steps), inner_products(new_image, steps)
    over_images, right = inner_products(new_step, images), inner_products(residual, steps)
    state.squares.set_column(slot, by_step)
    state.squares.set_row(slot, by_step)
    # R = F - S is negative on a contraction; so is what is kept, and with it the weights.
    state.gram.set_column(slot, by_step - by_image)
    state.gram.set_row(slot, by_step - over_images)
    scale = _scales(state, state.squares.leading(n), settings.min_angle)
    unit = _scaled(state.gram.leading(n), scale)
    # Positive on a contraction, so that adding the ridge takes the system away from singular.
    shift = torch.where(scale > 0, settings.ridge, 1.0).to(scale.dtype)
    return _solve(unit + torch.diag_embed(shift), scale, -right)


def _last(state: AndersonState) -> Iterate:
    if state.previous is None:
        raise RuntimeError("weights are asked for before the first step")
    return state.previous


def _scales(state: AndersonState, squares: Tensor, min_angle: float) -> Tensor:
    """One over the lengths (B, n).

    0, and so is the weight, for columns that do not count: what the safeguard dropped and
    what newer columns span. Columns of zeros (a sample that no longer moves) are such, too.
    """
    newest = state.test_differences.newest
    lengths = squares.diagonal(dim1=1, dim2=2)
    # Far above the smallest number, so that the derivative of the root is finite, too.
    scale = lengths.clamp_min(torch.finfo(lengths.dtype).tiny ** (2 / 3)).rsqrt()
    if state.guard is not None:
        scale = torch.where(state.guard.remember(newest, lengths.shape[1]), scale, 0.0)
    if min_angle == 0.0:
        return scale
    sines = _sines(_scaled(squares, scale).detach(), newest)
    return torch.where(sines >= min_angle, scale, 0.0)


def _scaled(matrix: Tensor, scale: Tensor) -> Tensor:
    return matrix * scale.unsqueeze(1) * scale.unsqueeze(2)


def _sines(unit: Tensor, newest: int) -> Tensor:
    """Sine of the angle (B, n) of every column with the span of the newer ones.

    These are the pivots of the Cholesky factor, columns from the newest to the oldest. Where
    rounding makes one of them the root of a negative number, what follows means nothing and is
    kept: the ridge has to cope.
    """
    rounding = 10.0 * torch.finfo(unit.dtype).eps
    ordered = unit.flip((1, 2)).roll((newest + 1, newest + 1), (1, 2))
    ordered.diagonal(dim1=1, dim2=2).add_(rounding)
    factor = torch.linalg.cholesky_ex(ordered)[0]
    return factor.diagonal(dim1=1, dim2=2).roll(-(newest + 1), 1).flip(1)


def _solve(unit: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """Weights (B, 1, n); a system too singular to solve gets the plain step for that sample."""
    gamma = scale * torch.linalg.solve_ex(unit, scale * right)[0]
    total = gamma.detach().sum(1, keepdim=True)
    is_finite = (total - total) == 0.0  # cheaper than isfinite().all()
    return torch.where(is_finite, gamma, 0.0).to(right.dtype).unsqueeze(1)


class _Guard:
    """The best iterate of every sample, and which of its differences still count.

    All by masks: whether a sample falls back is never asked by the host.
    """

    def __init__(self, iterate: Iterate, size: int, factor: float) -> None:
        self._factor = factor
        self._best = iterate
        self._best_norm = rms(iterate.residual.detach())
        self._fell_back = torch.zeros_like(self._best_norm, dtype=torch.bool)
        self._damping = torch.ones_like(self._best_norm)
        self._alive = self._fell_back.unsqueeze(1).expand(-1, size)

    def back_to_best(self, iterate: Iterate) -> Iterate:
        """The iterate, or the best one for samples that have become too much worse."""
        norm = rms(iterate.residual.detach())
        improved = norm < self._best_norm
        self._best = choose(improved, iterate, self._best)
        self._best_norm = torch.where(improved, norm, self._best_norm)
        self._fell_back = norm > self._factor * self._best_norm
        # The damping grows until the best improves: the same step again would fail again.
        self._damping = torch.where(improved, 1.0, self._damping)
        self._damping = torch.where(self._fell_back, 0.5 * self._damping, self._damping)
        return choose(self._fell_back, self._best, iterate)

    def remember(self, slot: int, num_filled: int) -> Tensor:
        """Mask (B, n) of the differences that count, now that `slot` has been written."""
        kept = (~self._fell_back).unsqueeze(1)
        newest = torch.arange(self._alive.shape[1], device=kept.device) == slot
        self._alive = (self._alive | newest) & kept
        return self._alive[:, :num_filled]

    def damp(self, z: Tensor, iterate: Iterate) -> Tensor:
        """The proposed point, or a damped plain step for samples that fell back."""
        plain = iterate.z + self._damping.unsqueeze(1) * iterate.residual
        return torch.where(self._fell_back.unsqueeze(1), plain, z)
