"""What happens when samples do not converge, and how errors talk."""

from __future__ import annotations

import warnings

import pytest
import torch

from equilibria import ConvergenceError, ConvergenceWarning, Status, UserError
from equilibria.core.errors import nearest
from equilibria.core.status import check_on_failure, enforce

MIXED = torch.tensor([0, 1, 4, 1], dtype=torch.int8)


def test_success_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enforce(torch.zeros(3, dtype=torch.int8), "raise", "the solve")
        enforce(torch.zeros(0, dtype=torch.int8), "raise", "the solve")
        enforce(MIXED, "ignore", "the solve")


def test_a_warning_names_the_outcomes_and_what_helps():
    with pytest.warns(ConvergenceWarning, match="the solve did not converge.*MAX_STEPS.*NONFINITE"):
        enforce(MIXED, "warn", "the solve")


def test_a_warning_is_shown_once_whatever_the_counts():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for repeats in (1, 2, 3):
            enforce(MIXED.repeat(repeats), "warn", "the solve")
    assert len(caught) == 1


def test_an_error_counts():
    with pytest.raises(ConvergenceError, match="of 4 samples 2 MAX_STEPS, 1 NONFINITE"):
        enforce(MIXED, "raise", "the solve")


def test_every_outcome_explains_itself():
    assert len({status.message for status in Status}) == len(Status)


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(UserError, match=r"on_failure='rise' .* did you mean 'raise'"):
        check_on_failure("rise")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Batch-Size", "; did you mean 'batch_size'?"),
        ("bach_size", "; did you mean 'batch_size'?"),
        ("zzz", ""),
    ],
)
def test_nearest(given, wanted):
    assert nearest(given, ["batch_size", "max_steps"]) == wanted
