"""The same fixed points as independent implementations find, on drawn problems.

SciPy is always there; torchdeq, jaxopt and optimistix are tried where they are installed
(`pip install -e '.[peers]'`). They solve the problem in their own arrays, from the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import optimize

from equilibria import (
    Anderson,
    Broyden,
    Fallback,
    NewtonKrylov,
    Picard,
    Residual,
    Reversible,
    solve,
)

MAX_STEPS = 300
OURS = {
    "anderson": Anderson(),
    "anderson II": Anderson(kind="II"),
    "broyden": Broyden(),
    "newton_krylov": NewtonKrylov(),
    "fallback": Fallback(Anderson(), Broyden()),
}
ONLY_CONTRACTIONS = {
    "picard": Picard(),
    "reversible": Reversible(reconstruction_tolerance=None),
}


@dataclass(frozen=True)
class Drawn:
    """f(z) = act(A z + c) with exactly one fixed point, and numbers that say how hard it is."""

    matrix: np.ndarray
    shift: np.ndarray
    nonlinear: bool

    def residual(self, z: np.ndarray) -> np.ndarray:
        image = self.matrix @ z + self.shift
        return (np.tanh(image) if self.nonlinear else image) - z

    def in_torch(self, z: torch.Tensor) -> torch.Tensor:
        image = z @ torch.from_numpy(self.matrix).mT + torch.from_numpy(self.shift)
        return torch.tanh(image) if self.nonlinear else image


@st.composite
def problems(draw: st.DrawFn, *, contraction: bool = False) -> Drawn:
    """Norm below 1 for contractions and tanh, else anything with a well-conditioned I - A."""
    size = draw(st.sampled_from([1, 2, 5, 8]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = generator.standard_normal((size, size))
    nonlinear = draw(st.booleans())
    if contraction or nonlinear:
        matrix *= draw(st.floats(0.1, 0.9)) / np.linalg.norm(matrix, 2)
    else:
        matrix *= draw(st.floats(0.1, 1.5)) / np.abs(np.linalg.eigvals(matrix)).max()
        assume(np.linalg.svd(np.eye(size) - matrix, compute_uv=False)[-1] > 0.05)
    return Drawn(matrix, generator.standard_normal(size), nonlinear)


def by_us(problem: Drawn, solver: Any) -> np.ndarray:
    with torch.no_grad():
        solution = solve(
            problem.in_torch,
            torch.zeros(1, problem.shift.size, dtype=torch.float64),
            solver=solver,
            termination=Residual(1e-10, 1e-12, max_growth=None),
            max_steps=MAX_STEPS,
            on_failure="raise",
        )
    return solution.z[0].numpy()


# --- The others --------------------------------------------------------------------------------


class NoAnswerError(Exception):
    """The other library did not find a fixed point."""


def by_scipy(name: str) -> Callable[[Drawn], np.ndarray]:
    def run(problem: Drawn) -> np.ndarray:
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                found = getattr(optimize, name)(
                    problem.residual, np.zeros_like(problem.shift), f_tol=1e-10, maxiter=MAX_STEPS
                )
        except (optimize.NoConvergence, ValueError, ZeroDivisionError) as error:
            raise NoAnswerError from error
        return np.asarray(found)

    return run


def by_torchdeq(name: str) -> Callable[[Drawn], np.ndarray]:
    def run(problem: Drawn) -> np.ndarray:
        solver = pytest.importorskip("torchdeq.solver")
        start = torch.zeros(1, problem.shift.size, dtype=torch.float64)
        options = {"lam": 1e-12} if name == "anderson_solver" else {}
        try:
            with torch.no_grad():
                z, _, _ = getattr(solver, name)(
                    problem.in_torch, start, max_iter=MAX_STEPS, tol=1e-11, **options
                )
        except torch.linalg.LinAlgError as error:
            raise NoAnswerError from error
        return z[0].numpy()

    return run


@cache
def in_jax(library: str, name: str, nonlinear: bool) -> Callable[..., Any]:
    """A jitted solve of (matrix, shift); one compilation per size."""
    jax = pytest.importorskip("jax")
    module = pytest.importorskip(library)
    jnp = jax.numpy

    def f(z: Any, args: Any) -> Any:
        matrix, shift = args
        image = matrix @ z + shift
        return jnp.tanh(image) if nonlinear else image

    def run(matrix: Any, shift: Any) -> Any:
        start, args = jnp.zeros_like(shift), (matrix, shift)
        if library == "optimistix":
            solver = getattr(module, name)(rtol=1e-10, atol=1e-12)
            return module.fixed_point(
                f, solver, start, args, max_steps=MAX_STEPS, throw=False
            ).value
        options = {"maxiter": MAX_STEPS, "tol": 1e-11, "implicit_diff": False}
        if name == "Broyden":
            solver = module.Broyden(lambda z, args: z - f(z, args), stepsize=1.0, **options)
        else:
            extra = {"ridge": 1e-12} if name == "AndersonAcceleration" else {}
            solver = getattr(module, name)(f, **options, **extra)
        return solver.run(start, args).params

    return jax.jit(run)


def by_jax(library: str, name: str) -> Callable[[Drawn], np.ndarray]:
    def run(problem: Drawn) -> np.ndarray:
        jax = pytest.importorskip("jax")
        with warnings.catch_warnings(), jax.enable_x64(True):
            warnings.simplefilter("ignore")
            return np.asarray(
                in_jax(library, name, problem.nonlinear)(problem.matrix, problem.shift)
            )

    return run


PEERS: dict[str, Callable[[Drawn], np.ndarray]] = {
    "scipy.anderson": by_scipy("anderson"),
    "scipy.broyden1": by_scipy("broyden1"),
    "scipy.newton_krylov": by_scipy("newton_krylov"),
    "torchdeq.fixed_point_iter": by_torchdeq("fixed_point_iter"),
    "torchdeq.anderson": by_torchdeq("anderson_solver"),
    "torchdeq.broyden": by_torchdeq("broyden_solver"),
    "jaxopt.FixedPointIteration": by_jax("jaxopt", "FixedPointIteration"),
    "jaxopt.AndersonAcceleration": by_jax("jaxopt", "AndersonAcceleration"),
    "jaxopt.Broyden": by_jax("jaxopt", "Broyden"),
    "optimistix.FixedPointIteration": by_jax("optimistix", "FixedPointIteration"),
    "optimistix.Newton": by_jax("optimistix", "Newton"),
    "optimistix.Chord": by_jax("optimistix", "Chord"),
}

MODEST = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def agree(problem: Drawn, run: Callable[[Drawn], np.ndarray], solver: Any) -> None:
    """Ours finds the fixed point whatever the other does; the other's is the same if it is one."""
    ours = by_us(problem, solver)
    assert np.abs(problem.residual(ours)).max() < 1e-8
    try:
        theirs = run(problem)
    except NoAnswerError:
        return
    if np.isfinite(theirs).all() and np.abs(problem.residual(theirs)).max() < 1e-8:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peer", PEERS)
@given(problem=problems(), name=st.sampled_from(sorted(OURS)))
@MODEST
def test_same_fixed_point(peer, problem, name):
    agree(problem, PEERS[peer], OURS[name])


@pytest.mark.parametrize("peer", [name for name in PEERS if name.startswith("scipy")])
@given(
    problem=problems(contraction=True),
    name=st.sampled_from(sorted(ONLY_CONTRACTIONS)),
)
@MODEST
def test_same_fixed_point_of_a_contraction(peer, problem, name):
    agree(problem, PEERS[peer], ONLY_CONTRACTIONS[name])


def test_the_comparison_compares():
    """On a plain contraction every SciPy solver gets there, so that nothing above is vacuous."""
    problem = Drawn(np.array([[0.5, 0.2], [-0.1, 0.3]]), np.array([1.0, -1.0]), nonlinear=True)
    for name in (peer for peer in PEERS if peer.startswith("scipy")):
        assert np.abs(problem.residual(PEERS[name](problem))).max() < 1e-8
