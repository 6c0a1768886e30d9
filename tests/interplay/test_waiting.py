"""What would make a CUDA device wait, seen without one.

Fake tensors have no numbers: whoever asks for one raises. And where tensors are made on "meta"
unless told otherwise, one that is made on the host and moved to the device raises too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from equilibria import (
    Anderson,
    AnyOf,
    Broyden,
    Fallback,
    FixedSteps,
    Implicit,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    Stagnation,
    Unrolled,
    solve,
)
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.gmres import GMRES
from equilibria.linear.neumann import Neumann

NEVER_ASKING = [
    Picard(),
    Picard(relaxation=0.5),
    Anderson(),
    Anderson(history_size=2, min_angle=0.0),
    Anderson(kind="II", safeguard=2.0, relaxation=0.8, restart=2),
    Broyden(),
    Broyden(history_size=2),
    Broyden(kind="bad"),
]
SOLVERS = [
    *NEVER_ASKING,
    Broyden(line_search=True),
    NewtonKrylov(),
    Reversible(reconstruction_tolerance=None),
    Fallback(Anderson(), Picard()),
]
OF_FIXED_WORK = [
    OneStep(),
    Phantom(),
    Unrolled(),
    NeumannSeries(),
    NeumannSeries(clip=1.0),
]
ADJOINTS = [
    *OF_FIXED_WORK,
    Unrolled(checkpoint=True),  # compares what it evaluates again, so it does wait
    *(Implicit(solver) for solver in (GMRES(), BiCGStab(), Neumann(), Anderson(), Broyden())),
]


def differentiate(**settings: Any) -> None:
    x = torch.randn(3, 4, device="cpu")
    weight = torch.full((4, 4), 0.1, device="cpu", requires_grad=True)
    solution = solve(
        lambda z: torch.tanh(z @ weight + x),
        torch.zeros_like(x),
        **({"termination": FixedSteps(5), "on_failure": "ignore"} | settings),
    )
    assert solution.z.device == solution.status.device == x.device
    solution.z.square().mean().backward()


# --- nobody asks for numbers --------------------------------------------------------------------


def test_asking_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        differentiate(termination=Residual())


@pytest.mark.parametrize("solver", NEVER_ASKING, ids=str)
def test_no_solver_asks_for_numbers(solver: Any) -> None:
    with FakeTensorMode():
        differentiate(solver=solver, adjoint=OneStep())


@pytest.mark.parametrize("adjoint", OF_FIXED_WORK, ids=str)
def test_no_gradient_of_fixed_work_asks_for_numbers(adjoint: Any) -> None:
    with FakeTensorMode():
        differentiate(adjoint=adjoint)


def test_records_ask_for_no_numbers() -> None:
    with FakeTensorMode():
        differentiate(adjoint=OneStep(), trace=True, states="all")


# --- nothing is made elsewhere and moved --------------------------------------------------------


def test_the_wrong_device_is_noticed() -> None:
    with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="cpu") + torch.eye(3).to("cpu")


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_make_everything_where_the_state_is(solver: Any) -> None:
    with torch.device("meta"):
        differentiate(solver=solver, termination=Residual(1e-4))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_gradients_make_everything_where_the_state_is(adjoint: Any) -> None:
    with torch.device("meta"):
        differentiate(adjoint=adjoint)


def test_segments_and_rules_make_everything_where_the_state_is() -> None:
    index = torch.tensor([0, 1, 1])
    with torch.device("meta"):
        differentiate(termination=AnyOf(Residual(1e-4), Stagnation()), segments=index)
