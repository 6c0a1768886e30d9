"""Warm starts that remember nothing of a solve."""

from __future__ import annotations

import pytest
import torch

from equilibria import FixedSteps, Picard, Random, UserError, WarmStartMemory, Zeros, solve

SHAPE = (500, 6)


def starts(warm_start, *, memory=None, z0=None, **settings):
    """Where a solve of z -> 0 z + z_0 started: the identity shows it."""
    z0 = torch.full(SHAPE, 7.0) if z0 is None else z0
    return solve(
        lambda z: torch.utils._pytree.tree_map(torch.clone, z),
        z0,
        solver=Picard(),
        termination=FixedSteps(1),
        warm_start=warm_start,
        memory=memory,
        **settings,
    )


def test_zeros_come_before_the_given_state():
    solution = starts(Zeros())
    assert not solution.z.any()
    assert bool(solution.warm_started.all())


def test_noise_has_its_scale():
    solution = starts(Random(scale=3.0))
    assert solution.z.std().item() == pytest.approx(3.0, rel=0.05)
    assert solution.z.mean().item() == pytest.approx(0.0, abs=0.2)
    assert bool(solution.warm_started.all())


def test_mixed_starts_are_noise_or_the_given_state_by_sample():
    solution = starts(Random(probability=0.3))
    noisy = (solution.z != 7.0).all(1)
    assert torch.equal(noisy, solution.warm_started)
    assert bool((solution.z[~noisy] == 7.0).all())
    assert noisy.double().mean().item() == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize("probability", [0, 0.0])
def test_probability_zero_is_never(probability):
    assert bool((starts(Random(probability=probability)).z == 7.0).all())


def test_without_a_seed_torch_is_asked():
    torch.manual_seed(5)
    first, second = starts(Random()).z, starts(Random()).z
    torch.manual_seed(5)
    assert torch.equal(starts(Random()).z, first)
    assert not torch.equal(first, second)


def test_with_a_seed_every_call_has_its_own_noise_again():
    before = torch.get_rng_state()
    runs = []
    for _ in range(2):
        memory = WarmStartMemory()
        runs.append([starts(Random(seed=1), memory=memory).z for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(torch.get_rng_state(), before)
    other = starts(Random(seed=2), memory=WarmStartMemory()).z
    assert not torch.equal(other, runs[0][0])


def test_noise_takes_the_form_of_a_tree():
    z0 = {"a": torch.zeros(4, 2, 3, dtype=torch.bfloat16), "b": (torch.zeros(4, 1),)}
    z = starts(Random(), z0=z0).z
    assert z["a"].dtype == torch.bfloat16
    assert z["a"].shape == (4, 2, 3)
    assert bool(z["b"][0].all())


def test_padding_of_ragged_batches_gets_no_noise():
    """It would count as a residual."""
    index = torch.tensor([0, 1, 1, 1])
    solution = starts(Random(), z0=torch.zeros(4, 2), segments=index)
    assert solution.residual.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": -1.0}, "scale=-1.0 must be a finite number of at least 0"),
        ({"probability": 1.5}, "probability=1.5 must lie between 0 and 1"),
        ({"probability": -0.1}, "probability=-0.1"),
        ({"probability": True}, "probability=True"),
        ({"seed": 1.5}, "seed=1.5 must be an integer, or None"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Random(**arguments)
