"""A line search on the norm of the residual, without derivatives, each sample on its own."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.core.iterate import Iterate, choose, rms
from equilibria.core.problem import Evaluate

NUM_HALVINGS = 5
"""1/32 of a step that still makes things worse points the wrong way."""

SUFFICIENT_DECREASE = 1e-4
"""The usual small constant of Armijo's rule."""


def backtrack(evaluate: Evaluate, start: Iterate, target: Tensor) -> Iterate:
    """Halve the step d from `start` to `target` (B, D) until the residual falls.

        |r(z + t d)| <= (1 - 1e-4 t) |r(z)|,    t = 1, 1/2, ..., 1/32

    If no t will do, the best of the points tried is taken: a quasi-Newton direction need not be
    one of descent, and standing still would ask the same question again. Costs one evaluation of
    the whole batch per halving that any sample needs, and one wait for the device each.

    References:
        Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 8.
    """
    start_norm = rms((start.fz - start.z).detach())
    best = trial = evaluate(target)
    best_norm = _norm_or_infinity(trial)
    # A finished sample is held in place by `evaluate` and would fail the test for ever.
    searching = (trial.z != start.z).any(1)
    share = 1.0
    for _ in range(NUM_HALVINGS):
        searching = searching & (best_norm > (1.0 - SUFFICIENT_DECREASE * share) * start_norm)
        if not bool(searching.any()):
            break
        share *= 0.5
        point = torch.where(searching.unsqueeze(1), start.z.lerp(target, share), best.z)
        previous, trial = trial, evaluate(point)
        norm = _norm_or_infinity(trial)
        better = searching & (norm < best_norm)
        best, best_norm = choose(better, trial, best), torch.where(better, norm, best_norm)
        searching = searching & (trial.z != previous.z).any(1)
    return best


def _norm_or_infinity(iterate: Iterate) -> Tensor:
    """Norm of the residual (B,); a point where f is not finite is worse than any other."""
    norm = rms((iterate.fz - iterate.z).detach())
    return torch.where(torch.isfinite(norm), norm, torch.inf)
