"""Every shipped gradient method keeps the contract of adjoints."""

from __future__ import annotations

from equilibria import Adjoint, Broyden, Implicit, OneStep, Phantom, Picard, Solver, Unrolled
from equilibria.adjoints.neumann_series import NeumannSeries
from equilibria.testing.adjoint_contract import AdjointContract


class TestImplicit(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Implicit(rtol=1e-11, max_steps=200)


class TestImplicitByBroyden(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Implicit(Broyden(), rtol=1e-11, max_steps=200)


class TestOneStep(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return OneStep()


class TestPhantom(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Phantom()


class TestNeumannSeries(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return NeumannSeries()


class TestLongNeumannSeries(AdjointContract):
    min_cosine = 0.99

    def make_adjoint(self) -> Adjoint:
        return NeumannSeries(num_terms=20)


class TestUnrolled(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Unrolled()


class TestCheckpointedUnrolled(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Unrolled(checkpoint=True)


class TestUnrolledPicard(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Unrolled()

    def make_solver(self) -> Solver:
        return Picard()
