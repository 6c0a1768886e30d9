"""Solvers, gradient methods and cells with one mistake each, and the test that notices it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import GMRES, Adjoint, Cell, Implicit, Iterate, LinearResult, Picard, Solver
from equilibria.core.adjoint import AttachGraph, Forward
from equilibria.testing import Recorder, problem
from equilibria.testing.adjoint_contract import AdjointContract
from equilibria.testing.cell_contract import CellContract
from equilibria.testing.linear_solver_contract import LinearSolverContract, system
from equilibria.testing.solver_contract import Run, SolverContract

broken = pytest.raises(AssertionError, match="contract broken")


def solved(solver: Solver) -> Run:
    f = Recorder(problem("tanh").f)
    return Run(SolverContract().run(f, problem("tanh").z0, solver), f)


@dataclass(frozen=True)
class Base(Solver):
    def init(self, iterate: Iterate, max_steps: int) -> Any:
        return None

    def step(self, evaluate: Any, iterate: Iterate, state: Any) -> tuple[Iterate, Any]:
        return evaluate(self.move(iterate)), state

    def move(self, iterate: Iterate) -> Tensor:
        return iterate.fz


class Coupled(Base):
    """Steps by the mean of the batch."""

    def move(self, iterate: Iterate) -> Tensor:
        return iterate.fz + 0.01 * (iterate.fz - iterate.z).mean(0)


class Writing(Base):
    """Writes to what f returned."""

    def move(self, iterate: Iterate) -> Tensor:
        return iterate.fz.mul_(0.999)


class Random(Base):
    def move(self, iterate: Iterate) -> Tensor:
        return iterate.fz + 1e-3 * torch.randn_like(iterate.fz) * (iterate.fz - iterate.z)


class Absolute(Base):
    """Stops moving below an absolute size."""

    def move(self, iterate: Iterate) -> Tensor:
        residual = iterate.fz - iterate.z
        return torch.where(residual.abs() > 1e-7, iterate.fz, iterate.z)


class Lying(Base):
    """Returns an image that is not that of the point."""

    def step(self, evaluate: Any, iterate: Iterate, state: Any) -> tuple[Iterate, Any]:
        new = evaluate(iterate.fz)
        return Iterate(new.z, new.z + 0.5 * (new.fz - new.z)), state


@pytest.mark.parametrize(
    ("solver", "test"),
    [
        (Lying(), "test_reports_the_residual_of_what_it_returns"),
        (Picard(relaxation=0.01), "test_finds_the_fixed_point"),
    ],
    ids=str,
)
def test_results_on_problems(solver: Solver, test: str) -> None:
    with broken:
        getattr(SolverContract(), test)(problem("tanh"), solved(solver))


@pytest.mark.parametrize(
    ("solver", "test"),
    [
        (Coupled(), "test_a_sample_does_not_depend_on_its_batch"),
        (Lying(), "test_success_means_within_tolerance"),
    ],
    ids=str,
)
def test_solvers_on_problems(solver: Solver, test: str) -> None:
    with broken:
        getattr(SolverContract(), test)(solver, problem("tanh"))


def test_a_solver_that_is_not_reproducible() -> None:
    with broken:
        SolverContract().test_the_same_call_gives_the_same_bits(
            Random(), problem("tanh"), solved(Random())
        )


@pytest.mark.parametrize(
    ("solver", "test"),
    [
        (Writing(), "test_z0_and_images_are_not_written_to"),
        (Random(), "test_the_random_state_is_left_alone"),
        (Absolute(), "test_the_scale_of_the_state_changes_nothing"),
    ],
    ids=str,
)
def test_solvers(solver: Solver, test: str) -> None:
    with broken:
        getattr(SolverContract(), test)(solver, problem("tanh"))


def test_a_nan_that_spreads() -> None:
    with broken:
        SolverContract().test_a_nan_stays_in_its_sample(Coupled(), problem("tanh"), 1)


@dataclass(frozen=True)
class WrongSign(Adjoint):
    exact = True

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        taped, _ = forward.problem.tape(z)
        return AttachGraph.apply(z, -taped.fz, "WrongSign")


@dataclass(frozen=True)
class Unfaithful(Adjoint):
    """Returns f(z*) instead of z*."""

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        return forward.problem.tape(z)[0].fz


def test_adjoints() -> None:
    contract, live = AdjointContract(), problem("tanh").differentiable()
    with broken:
        contract.test_gradients_against_the_dense_truth(WrongSign(), live)
    with broken:
        contract.test_gradients_against_the_dense_truth(Implicit(rtol=1e-2), live)
    with broken:
        contract.test_the_value_is_the_solvers(Unfaithful(), live)
    with broken:
        contract.test_second_derivatives_are_right_or_refused(Unfaithful())


@dataclass(frozen=True)
class Optimistic(GMRES):
    """Reports half of its residual."""

    def solve(self, *arguments: Any, **settings: Any) -> LinearResult:
        result = super().solve(*arguments, **settings)
        return replace(result, residual=0.5 * result.residual)


@dataclass(frozen=True)
class Transposed(GMRES):
    def solve(self, a: Any, b: Tensor, **settings: Any) -> LinearResult:
        return super().solve(lambda u: -a(u), b, **settings)


def test_linear_solvers() -> None:
    contract, easy = LinearSolverContract(), system("nonsymmetric")
    with broken:
        contract.test_few_steps(Optimistic(), easy, 2)
    with broken:
        contract.test_finds_the_solution(Transposed(), easy)
    with broken:
        contract.test_gives_the_implicit_gradient(Transposed(), "tanh")


class Sound(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + injection)


class Dropping(Sound):
    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(z, injection), 0.5)


class Normalised(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z)) + injection)


class Detached(Sound):
    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.linear(z).detach() + 0.1 * z + injection)


class Overwriting(Sound):
    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return super().forward(z, injection.mul_(1.01))


class Growing(Sound):
    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.exp(z) * 0.1 + self.linear(injection)


@pytest.mark.parametrize(
    ("cell", "test", "arguments"),
    [
        (Dropping, "test_the_map_is_a_function_of_z", (True,)),
        (Dropping, "test_the_map_draws_no_random_numbers", ()),
        (Normalised, "test_a_change_of_one_sample_stays_there", ()),
        (Normalised, "test_the_map_updates_no_buffers", ()),
        (Detached, "test_gradients_reach_every_parameter", ()),
        (Overwriting, "test_the_map_writes_to_nothing_it_is_given", ()),
        (Growing, "test_the_map_stays_bounded", ()),
    ],
    ids=str,
)
def test_cells(cell: type[Cell], test: str, arguments: tuple[Any, ...]) -> None:
    class Contract(CellContract):
        def make_inputs(self, batch: int) -> tuple[Any, ...]:
            return (torch.randn(batch, 4),)

    contract, inputs = Contract(), (torch.randn(3, 4),)
    getattr(contract, test)(Sound(), inputs, *arguments)
    with broken:
        getattr(contract, test)(cell(), inputs, *arguments)
