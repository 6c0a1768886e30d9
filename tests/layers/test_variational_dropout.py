"""Masks that are shared over time and drawn once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.core.errors import UserError
from equilibria.layers.variational_dropout import check_dropout, variational_mask


@given(st.floats(0.05, 0.9), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_mask_is_zero_or_the_inverse_of_what_is_kept(p: float, dtype: torch.dtype) -> None:
    like = torch.empty(3, 7, 2, dtype=dtype)
    mask = variational_mask(like, 200, p, training=True)
    assert mask is not None
    assert (mask.shape, mask.dtype, mask.device) == ((3, 1, 200), dtype, like.device)
    kept = torch.ones((), dtype=dtype) / (1 - p)
    assert ((mask == 0) | (mask == kept)).all()


def test_mask_keeps_the_mean() -> None:
    torch.manual_seed(0)
    mask = variational_mask(torch.empty(10, 1), 10_000, 0.3, training=True)
    assert mask is not None
    standard_error = math.sqrt(0.3 / 0.7 / mask.numel())
    assert abs(mask.mean().item() - 1.0) < 5 * standard_error


def test_samples_and_draws_differ() -> None:
    torch.manual_seed(0)
    like = torch.empty(2, 5, 4)
    first = variational_mask(like, 64, 0.5, training=True)
    second = variational_mask(like, 64, 0.5, training=True)
    assert first is not None
    assert second is not None
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_nothing_to_drop_draws_nothing(p: float, training: bool) -> None:
    before = torch.get_rng_state()
    assert variational_mask(torch.empty(2, 3), 4, p, training) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(UserError, match=r"embedding_dropout=.* at least 0 and below 1"):
        check_dropout("embedding_dropout", p)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.999])
def test_probability_in_range_is_accepted(p: float) -> None:
    check_dropout("dropout", p)
