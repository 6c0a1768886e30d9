"""`DEQ` as a layer among layers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Cell,
    FixedSteps,
    Picard,
    Residual,
    SolveSettings,
    UserError,
)


def test_returns_the_fixed_point_of_its_cell(make_deq, x):
    deq = make_deq()
    solution = deq(x)
    assert bool(solution.converged.all())
    image = deq.cell(solution.z, deq.cell.inject(x))
    torch.testing.assert_close(solution.z, image, rtol=1e-11, atol=1e-12)


def test_injects_once_and_evaluates_as_often_as_it_says(make_deq, x):
    deq = make_deq()
    calls = {"inject": 0, "forward": 0}
    inject, forward = deq.cell.inject, deq.cell.forward

    def counted(name, call):
        def wrapped(*arguments):
            calls[name] += 1
            return call(*arguments)

        return wrapped

    deq.cell.inject, deq.cell.forward = counted("inject", inject), counted("forward", forward)
    solution = deq(x)
    assert calls == {"inject": 1, "forward": solution.num_evals}


def test_training_and_evaluation_have_their_own_settings(make_deq, x):
    deq = make_deq(
        solver=Picard(),
        termination=FixedSteps(2),
        max_steps=5,
        eval_solver=Broyden(),
        eval_termination=FixedSteps(7),
        eval_max_steps=9,
    )
    assert deq.train().settings.solver == Picard()
    assert deq(x).num_steps.tolist() == [2] * 4
    assert deq.eval().settings.solver == Broyden()
    assert deq.settings.max_steps == 9
    assert deq(x).num_steps.tolist() == [7] * 4


def test_evaluation_is_like_training_unless_told_otherwise(make_deq):
    deq = make_deq(solver=Anderson(3))
    assert deq.train().settings == deq.eval().settings


def test_settings_and_z0_for_one_call(make_deq, x):
    deq = make_deq()
    once = replace(deq.settings, termination=FixedSteps(1), solver=Picard())
    start = torch.ones(4, 5, dtype=torch.float64)
    solution = deq(x, z0=start, settings=once, trace=True)
    assert torch.equal(solution.z, deq.cell(start, deq.cell.inject(x)))
    assert solution.trace.shape == (2, 4)
    assert deq(x).num_steps.max() > 1


def test_solving_for_an_injection_made_before(make_deq, x):
    deq = make_deq()
    assert torch.equal(deq.solve(deq.cell.inject(x)).z, deq(x).z)


def test_the_whole_batch_as_one_problem(make_deq, x):
    deq = make_deq()
    together = deq(x, batch_dims=0)
    assert together.status.shape == (1,)
    torch.testing.assert_close(together.z, deq(x).z, rtol=1e-9, atol=1e-11)
    assert torch.equal(deq.solve(deq.cell.inject(x), batch_dims=0).z, together.z)
    with pytest.raises(UserError, match="batch_dims must be 0 .* or 1, not 2"):
        deq(x, batch_dims=2)


def test_a_start_near_the_solution_saves_steps(make_deq, x):
    deq = make_deq()
    cold = deq(x)
    warm = deq(x, z0=cold.z.detach() + 1e-8)
    assert warm.num_evals < cold.num_evals
    torch.testing.assert_close(warm.z, cold.z, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_work_on_their_own(duplicate, make_deq, x):
    """Also after a solve with gradients: nothing of it stays on the module."""
    deq = make_deq()
    solution = deq(x)
    solution.z.sum().backward()
    twin = duplicate(deq)
    assert torch.equal(twin(x).z, solution.z)
    with torch.no_grad():
        twin.cell.recurrent.weight.zero_()
    assert torch.equal(deq(x).z, solution.z)
    assert not torch.equal(twin(x).z, solution.z)


def test_the_state_dict_is_that_of_the_cell_and_nothing_sticks(make_deq, x):
    deq = make_deq()
    names = set(deq.state_dict())
    assert names == {f"cell.{name}" for name in deq.cell.state_dict()}
    attributes = set(vars(deq))
    deq(x).z.sum().backward()
    assert set(vars(deq)) == attributes
    assert set(deq.state_dict()) == names
    twin = make_deq()
    twin.load_state_dict(deq.state_dict())
    assert torch.equal(twin(x).z, deq(x).z)


def test_trains(make_deq, x):
    deq = make_deq(termination=Residual(1e-4))
    target = torch.full((4, 5), 0.3, dtype=torch.float64)
    optimizer = torch.optim.Adam(deq.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(deq(x).z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    "cell", [nn.Linear(3, 3), torch.cos, None], ids=lambda cell: type(cell).__name__
)
def test_something_else_than_a_cell(cell):
    with pytest.raises(UserError, match=r"as its cell; subclass equilibria.Cell .*solve\(f, z0\)"):
        DEQ(cell)


def test_a_cell_without_its_three_methods():
    class Half(Cell):
        def inject(self, x):
            return x

    with pytest.raises(TypeError, match="initial_state"):
        Half()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": Broyden}, "instance, not the class"),
        ({"eval_solver": Broyden}, "instance, not the class"),
        ({"eval_termination": 1e-3}, "is no Termination"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"eval_max_steps": 0}, "max_steps=0"),
        ({"on_failure": "explode"}, "on_failure='explode'"),
    ],
)
def test_bad_settings(arguments, message, make_deq):
    with pytest.raises(UserError, match=message):
        make_deq(**arguments)


def test_settings_are_a_value():
    assert SolveSettings() == SolveSettings()
    assert hash(SolveSettings(solver=Broyden())) == hash(SolveSettings(solver=Broyden()))
