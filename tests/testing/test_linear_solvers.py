"""Every shipped solver of the backward system keeps the contract of linear solvers."""

from __future__ import annotations

import pytest

from equilibria import GMRES, Anderson, Broyden, FixedPoint, LinearSolver, Picard
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.neumann import Neumann
from equilibria.testing.linear_solver_contract import LinearSolverContract, LinearSystem


class TestGMRES(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return GMRES()

    def supports(self, system: LinearSystem) -> bool:
        return True


class TestRestartedGMRES(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return GMRES(restart=5)

    def supports(self, system: LinearSystem) -> bool:
        return super().supports(system) and system.name != "non_normal"


class TestBiCGStab(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return BiCGStab()

    @pytest.mark.xfail(
        raises=AssertionError,
        strict=False,
        reason="num_steps counts products, two per iteration; the trace has a row per iteration",
    )
    def test_the_trace_has_a_row_per_step(self, solver: LinearSolver, easy: LinearSystem) -> None:
        super().test_the_trace_has_a_row_per_step(solver, easy)


class TestNeumann(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return Neumann()


class TestFixedPointPicard(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Picard())


class TestFixedPointAnderson(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Anderson())


class TestFixedPointBroyden(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Broyden())

    def supports(self, system: LinearSystem) -> bool:
        return True
