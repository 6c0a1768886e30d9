"""Losses on the states along the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from equilibria import OneStep, Picard, Residual, Unrolled, UserError, solve
from equilibria.regularizers.correction import FixedPointCorrection


@pytest.mark.parametrize(
    ("weighting", "wanted"),
    [
        ("exponential", [0.64, 0.8, 1.0]),
        ("linear", [1 / 3, 2 / 3, 1.0]),
        ("constant", [1.0, 1.0, 1.0]),
    ],
)
def test_weights(weighting, wanted):
    published = FixedPointCorrection(weighting, normalization="last").weights(3)
    assert published == pytest.approx(wanted)
    assert FixedPointCorrection(weighting).weights(3) == pytest.approx(
        [weight / sum(wanted) for weight in wanted]
    )
    assert FixedPointCorrection(weighting).weights(1) == (1.0,)


def test_the_sum_over_the_states_of_a_solve(make_deq, x):
    deq = make_deq(solver=Picard())
    solution = deq(x, states=[2, 4, 6])
    target = torch.ones_like(solution.z)
    correction = FixedPointCorrection()
    found = correction(nn.functional.mse_loss, solution, target)
    losses = [nn.functional.mse_loss(state, target) for state in solution.states]
    weights = correction.weights(len(losses))
    torch.testing.assert_close(
        found, sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    )
    assert len(losses) > 1
    assert torch.equal(solution.states[-1], solution.z)


def test_losses_per_sample_and_trees():
    def f(z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cos(z[1]), 0.5 * z[0]

    solution = solve(f, (torch.ones(3, 2), torch.ones(3, 2)), states=[1, 2])
    found = FixedPointCorrection("constant")(lambda z: (z[0] + z[1]).sum(1), solution)
    wanted = sum((a + b).sum(1) for a, b in solution.states) / 3.0
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("adjoint", [OneStep(), Unrolled()], ids=repr)
def test_every_state_carries_a_gradient(adjoint, make_deq, x):
    """The gradient of the sum is the weighted sum of the gradients of each state.

    Not of the first: f(0) does not depend on the recurrent weight.
    """
    deq = make_deq(solver=Picard(), adjoint=adjoint, termination=Residual(1e-3))
    weight = deq.cell.recurrent.weight
    correction = FixedPointCorrection(gamma=0.5)
    (found,) = torch.autograd.grad(
        correction(lambda z: z.square().sum(), deq(x, states=[2, 3])), weight
    )
    solution = deq(x, states=[2, 3])
    each = [
        torch.autograd.grad(state.square().sum(), weight, retain_graph=True)[0]
        for state in solution.states
    ]
    weights = correction.weights(len(each))
    assert len(each) == 3
    torch.testing.assert_close(found, sum(w * g for w, g in zip(weights, each, strict=True)))
    assert all(bool(gradient.any()) for gradient in each)


def test_the_scale_of_the_loss_does_not_depend_on_the_number_of_states(make_deq, x):
    deq = make_deq()
    for count in (1, 2, 5):
        loss = FixedPointCorrection()(lambda z: torch.ones(()), deq(x, states=count))
        assert float(loss) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weighting": "exponental"}, "did you mean 'exponential'"),
        ({"weighting": "const"}, "did you mean 'constant'"),
        ({"weighting": 3}, "weighting=3 is not one of"),
        ({"normalization": "sums"}, "did you mean 'sum'"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0"),
        ({"gamma": 1.5}, "gamma=1.5 must be above 0 and at most 1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        FixedPointCorrection(**arguments)


def test_unknown_options_are_no_options():
    with pytest.raises(UserError, match="no option 'weight_func'"):
        FixedPointCorrection(weight_func="exp")


def test_what_cannot_be_summed(make_deq, x):
    correction = FixedPointCorrection()
    solution = make_deq()(x)
    with pytest.raises(UserError, match=r"deq\(x, states=3\)"):
        correction(torch.sum, solution)
    with pytest.raises(UserError, match=r"correction\(criterion, solution, target\)"):
        correction(torch.sum, solution.z)
    with pytest.raises(UserError, match="num_states=0"):
        correction.weights(0)
