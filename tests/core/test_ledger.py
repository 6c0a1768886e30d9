"""What is kept of every sample, decided one step at a time."""

from __future__ import annotations

import pytest
import torch

from equilibria.core.fused import bookkeeping
from equilibria.core.iterate import Iterate, measure
from equilibria.core.ledger import BlindLedger, Ledger
from equilibria.core.status import RUNNING, Status

pytestmark = pytest.mark.usefixtures("steps")


def point(*residuals: float) -> Iterate:
    """A sample per residual, at its own place, all with images of size 1."""
    fz = torch.ones(len(residuals), 1, dtype=torch.float64)
    return Iterate(fz - torch.tensor(residuals, dtype=torch.float64).unsqueeze(1), fz)


@torch.no_grad()
def after(keep: str, first: Iterate, *steps: tuple[Iterate, list[int]]) -> Ledger:
    fused = bookkeeping(first.z, None)
    ledger = Ledger(first, measure(first, fused=fused), keep, fused)
    for number, (current, codes) in enumerate(steps, 1):
        codes_ = torch.tensor(codes, dtype=torch.int8)
        ledger.enter(current, measure(current, fused=fused), codes_, number)
    return ledger


def test_the_best_point_is_kept_and_never_one_that_ran_away():
    first, second = point(1.0, 1.0, 1.0, 1.0), point(0.5, 2.0, 0.5, 2.0)
    codes = [RUNNING, RUNNING, Status.DIVERGED, Status.SUCCESS]
    ledger = after("best", first, (second, codes))
    wanted = [second.z[0], first.z[1], first.z[2], second.z[3]]
    assert torch.equal(ledger.kept.z, torch.stack(wanted))
    assert ledger.status.tolist() == codes
    assert ledger.num_steps.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(ledger.measurement.residual, torch.tensor([0.5, 1, 1, 2.0]).double())


def test_the_last_finite_point_is_kept_if_that_is_asked_for():
    first, second = point(1.0, 1.0), point(2.0, torch.nan)
    ledger = after("last", first, (second, [RUNNING, RUNNING]))
    assert torch.equal(ledger.kept.z, torch.stack([second.z[0], first.z[1]]))
    assert ledger.status.tolist() == [RUNNING, Status.NONFINITE]


def test_a_finished_sample_stays_what_it_was():
    steps = [(point(0.5, 0.6), [Status.SUCCESS, RUNNING]), (point(0.1, 0.2), [RUNNING, RUNNING])]
    ledger = after("best", point(1.0, 1.0), *steps)
    assert torch.equal(ledger.kept.z, torch.stack([steps[0][0].z[0], steps[1][0].z[1]]))
    assert ledger.frozen is not None
    assert ledger.frozen[0].tolist() == [False, True]


def test_without_looking_at_numbers_what_is_not_finite_is_the_first_point():
    first, second = point(1.0, 1.0), point(2.0, torch.nan)
    ledger = BlindLedger(first)
    codes = torch.full((2,), Status.MAX_STEPS, dtype=torch.int8)
    assert not ledger.enter(first, measure(first), None, 0)
    assert ledger.enter(second, measure(second), codes, 1)
    assert torch.equal(ledger.kept.z, torch.stack([second.z[0], first.z[1]]))
    assert ledger.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE]
