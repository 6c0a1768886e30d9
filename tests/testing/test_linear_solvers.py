"""Every shipped solver of the backward system keeps the contract of linear solvers."""

from __future__ import annotations

import pytest

from equilibria import GMRES, Anderson, Broyden, FixedPoint, LinearSolver, Picard
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.neumann import Neumann
from equilibria.testing.linear_solver_contract import LinearSolverContract, LinearSystem

pytestmark = pytest.mark.usefixtures("steps")


class TestGMRES(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return GMRES()

    def supports(self, system: LinearSystem) -> bool:
        return True


@pytest.mark.slow
class TestRestartedGMRES(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return GMRES(restart=5)

    def supports(self, system: LinearSystem) -> bool:
        return super().supports(system) and system.name != "non_normal"


class TestBiCGStab(LinearSolverContract):
    products_per_step = 2

    def make_solver(self) -> LinearSolver:
        return BiCGStab()


@pytest.mark.slow
class TestNeumann(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return Neumann()


@pytest.mark.slow
class TestFixedPointPicard(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Picard())


class TestFixedPointAnderson(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Anderson())


@pytest.mark.slow
class TestFixedPointBroyden(LinearSolverContract):
    def make_solver(self) -> LinearSolver:
        return FixedPoint(Broyden())

    def supports(self, system: LinearSystem) -> bool:
        return True
