"""Every shipped gradient method keeps the contract of adjoints."""

from __future__ import annotations

import pytest

from equilibria import Adjoint, Broyden, Implicit, OneStep, Phantom, Picard, Solver, Unrolled
from equilibria.adjoints.neumann_series import NeumannSeries
from equilibria.testing.adjoint_contract import AdjointContract


class TestImplicit(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Implicit(rtol=1e-11, max_steps=200)


@pytest.mark.slow
class TestImplicitByBroyden(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Implicit(Broyden(), rtol=1e-11, max_steps=200)


@pytest.mark.slow
class TestOneStep(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return OneStep()


class TestPhantom(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Phantom()


@pytest.mark.slow
class TestNeumannSeries(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return NeumannSeries()


@pytest.mark.slow
class TestLongNeumannSeries(AdjointContract):
    min_cosine = 0.99

    def make_adjoint(self) -> Adjoint:
        return NeumannSeries(num_terms=20)


class TestUnrolled(AdjointContract):
    # The gradient of the steps lags behind the value, and that of the few coarse steps that
    # bfloat16 allows goes through mixing weights that are mostly rounding.
    accuracy = 1e-5
    min_cosine_in_lower_precision = 0.8

    def make_adjoint(self) -> Adjoint:
        return Unrolled()


@pytest.mark.slow
class TestCheckpointedUnrolled(TestUnrolled):
    def make_adjoint(self) -> Adjoint:
        return Unrolled(checkpoint=True)


@pytest.mark.slow
class TestUnrolledPicard(AdjointContract):
    def make_adjoint(self) -> Adjoint:
        return Unrolled()

    def make_solver(self) -> Solver:
        return Picard()
