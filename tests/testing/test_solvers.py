"""Every shipped solver keeps the contract of solvers."""

from __future__ import annotations

import pytest

from equilibria import Anderson, Broyden, Picard, Solver
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.reversible import Reversible
from equilibria.testing import FixedPointProblem
from equilibria.testing.solver_contract import SolverContract

pytestmark = pytest.mark.usefixtures("steps")

NOTHING_TO_FIND = {"no_solution", "singular"}


class TestPicard(SolverContract):
    def make_solver(self) -> Solver:
        return Picard()


@pytest.mark.slow
class TestDampedPicard(SolverContract):
    max_steps = 600

    def make_solver(self) -> Solver:
        return Picard(relaxation=0.7)


class TestAnderson(SolverContract):
    def make_solver(self) -> Solver:
        return Anderson()

    def supports(self, problem: FixedPointProblem) -> bool:
        return not problem.tags & (NOTHING_TO_FIND | {"stiff"})


@pytest.mark.slow
class TestAndersonTypeOneWithSafeguard(SolverContract):
    def make_solver(self) -> Solver:
        return Anderson(kind="I", safeguard=2.0)

    def supports(self, problem: FixedPointProblem) -> bool:
        return super().supports(problem) and "non_normal" not in problem.tags


class TestBroyden(SolverContract):
    def make_solver(self) -> Solver:
        return Broyden()

    def supports(self, problem: FixedPointProblem) -> bool:
        return not problem.tags & NOTHING_TO_FIND


@pytest.mark.slow
class TestBadBroydenWithLineSearch(SolverContract):
    def make_solver(self) -> Solver:
        return Broyden(kind="bad", line_search=True)


@pytest.mark.slow
class TestNewtonKrylov(SolverContract):
    differentiable = False

    def make_solver(self) -> Solver:
        return NewtonKrylov()

    def supports(self, problem: FixedPointProblem) -> bool:
        return not problem.tags & NOTHING_TO_FIND

    @pytest.mark.xfail(
        raises=RuntimeError, strict=False, reason="forward-mode products do not nest in PyTorch"
    )
    def test_one_object_serves_nested_solves(self, solver: Solver, easy: FixedPointProblem) -> None:
        super().test_one_object_serves_nested_solves(solver, easy)


@pytest.mark.slow
class TestReversible(SolverContract):
    max_steps = 600

    def make_solver(self) -> Solver:
        return Reversible(reconstruction_tolerance=None)


@pytest.mark.slow
class TestFallback(SolverContract):
    def make_solver(self) -> Solver:
        return Fallback(Anderson(), Picard(relaxation=0.5), Broyden())

    def supports(self, problem: FixedPointProblem) -> bool:
        return not problem.tags & (NOTHING_TO_FIND | {"stiff"})
