"""Stop when the residual is small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.core.iterate import Limits, Measurement
from equilibria.core.options import Options
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination


@dataclass(frozen=True)
class Residual(Termination):
    """Accept a sample when its residual is small, absolutely or relative to its image.

        rms(f(z) - z) <= atol + rtol * rms(f(z))

    The default is relative and nothing else, because the unit of a hidden state means nothing:
    measuring it in another one must not change when a solve stops. Any `atol` breaks that; of a
    state that is smaller than it everywhere, the start already counts as solved, and what was not
    iterated has no gradient worth the name. An image of exactly zero with residual zero is a
    success as it is.

    Give an `atol`, in the unit of the state, where the fixed point may be exactly zero and the
    start is not: f(z) = z / 2 halves state and residual alike, whose ratio stays 1 for ever.

    A relative residual has one trap: it also becomes small when the state runs away. At
    z = 1e16 the map f(z) = z + 1 has residual 0 in float64, and a quasi-Newton step on a singular
    problem lands just there. So the size of the image is compared with the size that the problem
    has shown, s = max(rms(f(z0)), largest residual so far), and beyond `max_growth` times s

    - the tolerance shrinks, atol + rtol * rms(f(z)) * (max_growth * s / rms(f(z)))^2,
    - it has to be one that the dtype resolves at that size, eps * rms(f(z)) <= tolerance, and
    - a sample is DIVERGED once rounding exceeds all that was seen, eps * rms(f(z)) > s.

    Problems whose solution is less than `max_growth` times their first image never notice. On
    random singular linear problems, which have no solution, the formula alone accepts 95 % of the
    runs of Anderson and Broyden. With the guard 3 to 5 % remain, most of them inconsistent by a
    few per cent only.

    Args:
        rtol: relative tolerance. 1e-4 is what float32 resolves comfortably and leaves gradients
            about as accurate as the state.
        atol: tolerance per component (root mean square) in the unit of the state; 0 because that
            unit is not known here.
        max_growth: how far the image may outgrow the problem before the guard acts; under a loose
            rtol less, max(0.1 / rtol, 2), so that what is accepted is a reduction. 100 is what a
            contraction factor of 0.99 needs; beyond, up to what the dtype resolves, more steps
            are asked for. None takes the formula literally.

    Raises:
        UserError: a negative tolerance, both zero, max_growth below 1.
    """

    rtol: float = 1e-4
    atol: float = 0.0
    max_growth: float | None = 100.0

    def __post_init__(self) -> None:
        check_not_negative("rtol", self.rtol)
        check_not_negative("atol", self.atol)
        if self.rtol == self.atol == 0.0:
            raise UserError(
                "rtol and atol are both 0, which no solve can reach; give one of them, or use "
                "FixedSteps to make a given number of steps"
            )
        if self.max_growth is not None:
            check_not_negative("max_growth", self.max_growth)
            if self.max_growth < 1.0:
                raise UserError(
                    f"max_growth={self.max_growth} is below 1, so that no image could be accepted; "
                    "give at least 1, or None to switch the guard off"
                )

    def init(self, measurement: Measurement) -> Limits:
        """Remember the size (B,) that the problem shows at its start, which limits its norms."""
        size = torch.maximum(measurement.residual, measurement.image)
        return Limits(size, size * self._credible_growth)

    def check(
        self, measurement: Measurement, step: int, state: Limits
    ) -> tuple[Tensor | None, Limits]:
        """SUCCESS where the criterion holds, DIVERGED where nothing can be judged any more."""
        if measurement.all_go_on(self.rtol, self.atol, state):
            return None, state
        if measurement.kernels is not None and self.max_growth is not None:
            return measurement.judged(self.rtol, self.atol, state, self._credible_growth)
        residual, image = measurement
        if self.max_growth is None:
            tolerance = image * self.rtol + self.atol
            codes = torch.where(residual <= tolerance, Status.SUCCESS, RUNNING)
            return codes.to(torch.int8), state
        return self._judge(residual, image, state)

    def select(self, state: Limits, rows: Tensor) -> Limits:
        """The limits of some samples only."""
        return Limits(*(norms[rows] for norms in state))

    @property
    def _credible_growth(self) -> float:
        """How far the image may outgrow the size of the problem before the guard acts."""
        if self.max_growth is None:
            return math.inf
        loose = max(0.1 / self.rtol, 2.0) if self.rtol > 0 else self.max_growth
        return min(self.max_growth, loose)

    def _judge(self, residual: Tensor, image: Tensor, state: Limits) -> tuple[Tensor, Limits]:
        """The whole criterion, with the guard."""
        eps, tiny = torch.finfo(image.dtype).eps, torch.finfo(image.dtype).tiny
        grown = image > state.image
        # Written as ratios, so that no square of a large norm overflows.
        shrink = torch.where(grown, state.image / image.clamp_min(tiny), 1.0)
        tolerance = self.atol + self.rtol * image * shrink * shrink
        accepted = (residual <= tolerance) & (~grown | (eps * image <= tolerance))
        codes = torch.where(accepted, Status.SUCCESS, RUNNING)
        codes = torch.where(grown & (eps * image > state.residual), Status.DIVERGED, codes)
        # A residual seen from far away says nothing about the size of the problem.
        size = torch.where(grown, state.residual, torch.fmax(state.residual, residual))
        return codes.to(torch.int8), Limits(size, size * self._credible_growth)


@dataclass(frozen=True)
class ToleranceSchedule(Options):
    """A relative tolerance that tightens (or loosens) over training.

        log:     rtol(t) = start_rtol ^ (1 - t) * end_rtol ^ t
        linear:  rtol(t) = (1 - t) * start_rtol + t * end_rtol,    t = min(step / num_steps, 1)

    Early gradients point in a rough direction anyway, so a loose solve saves evaluations where
    they buy least. A pure function of the training step: nothing to save in a checkpoint.

    Args:
        start_rtol: tolerance at training step 0.
        end_rtol: tolerance from step `num_steps` on.
        num_steps: training steps from one to the other.
        shape: "log" (default: the work of a solve goes with the logarithm of its tolerance) or
            "linear", which stays loose for longer.
        atol: absolute tolerance throughout; when to give one is said at `Residual`.

    Raises:
        UserError: a tolerance that is not positive, num_steps below 1, an unknown shape.

    Examples:
        >>> schedule = ToleranceSchedule(1e-1, 1e-3, num_steps=1000)
        >>> [round(schedule(step).rtol, 6) for step in (0, 500, 1000, 5000)]
        [0.1, 0.01, 0.001, 0.001]
    """

    start_rtol: float
    end_rtol: float
    num_steps: int
    shape: Literal["log", "linear"] = "log"
    atol: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start_rtol", "end_rtol"):
            value = getattr(self, name)
            check_not_negative(name, value)
            if value == 0.0:
                raise UserError(f"{name} of a ToleranceSchedule is 0; give a positive tolerance")
        check_positive_integer("num_steps", self.num_steps)
        check_not_negative("atol", self.atol)
        if self.shape not in ("log", "linear"):
            raise UserError(
                f"shape={self.shape!r} is not one of 'log', 'linear'"
                f"{nearest(str(self.shape), ('log', 'linear'))}"
            )

    def __call__(self, step: int) -> Residual:
        """The termination for a training step.

        Raises:
            UserError: a negative step.
        """
        if step < 0:
            raise UserError(f"training step {step} is negative; count steps from 0")
        t = min(step / self.num_steps, 1.0)
        start, end = self.start_rtol, self.end_rtol
        rtol = start ** (1 - t) * end**t if self.shape == "log" else (1 - t) * start + t * end
        return Residual(rtol, self.atol)
