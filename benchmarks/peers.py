"""The solvers of other libraries, each with its defaults and, where that changes much, tuned.

"Tuned" is what somebody who knows the method would set: the first step of SciPy's quasi-Newton
methods at length 1 without a line search (they start from a tiny or guessed one), a ridge of
torchdeq and jaxopt small enough to depend on no units, windows of 20 and of everything, no line
search for jaxopt's Broyden (its line search takes gradients), matrix-free and inexact linear solves
for optimistix.
Tolerances are set out of reach: the counter says when a run is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.counting import Counter

Run = Callable[[Counter, Tensor], None]

MAX_STEPS = 2000
DENSE_LIMIT = 600
"""Unknowns up to which methods that form the Jacobian are run."""


class Skipped(Exception):  # noqa: N818
    """A method cannot be run on a problem of this size; says why."""


# --- SciPy -------------------------------------------------------------------------------------


def _scipy(name: str, **options: Any) -> Run:
    def run(counter: Counter, z0: Tensor) -> None:
        from scipy import optimize

        def residual(z: np.ndarray) -> np.ndarray:
            point = torch.from_numpy(np.ascontiguousarray(z)).view_as(z0)
            return (counter(point) - point).numpy().ravel()

        solve = getattr(optimize, name)
        solve(residual, z0.numpy().ravel().copy(), f_tol=1e-300, maxiter=MAX_STEPS, **options)

    return run


SCIPY: dict[str, Run] = {
    "scipy anderson": _scipy("anderson"),
    "scipy anderson, tuned": _scipy("anderson", alpha=1.0, line_search=None),
    "scipy anderson, tuned, M=20": _scipy("anderson", alpha=1.0, line_search=None, M=20),
    "scipy anderson, tuned, M=100": _scipy("anderson", alpha=1.0, line_search=None, M=100),
    "scipy broyden1": _scipy("broyden1"),
    "scipy broyden1, tuned": _scipy("broyden1", alpha=1.0, line_search=None),
    "scipy newton_krylov": _scipy("newton_krylov"),
    "scipy newton_krylov, gmres": _scipy("newton_krylov", method="gmres"),
}


# --- torchdeq ----------------------------------------------------------------------------------


def _torchdeq(name: str, **options: Any) -> Run:
    def run(counter: Counter, z0: Tensor) -> None:
        from torchdeq import solver

        with torch.no_grad():
            getattr(solver, name)(counter, z0, max_iter=MAX_STEPS, tol=0.0, **options)

    return run


TORCHDEQ: dict[str, Run] = {
    "torchdeq fixed_point_iter": _torchdeq("fixed_point_iter"),
    "torchdeq anderson": _torchdeq("anderson_solver"),
    "torchdeq anderson, tuned": _torchdeq("anderson_solver", lam=1e-12),
    "torchdeq anderson, tuned, m=20": _torchdeq("anderson_solver", lam=1e-12, m=20),
    "torchdeq anderson, tuned, m=500": _torchdeq("anderson_solver", lam=1e-12, m=500),
    "torchdeq broyden": _torchdeq("broyden_solver"),
    "torchdeq broyden, line search": _torchdeq("broyden_solver", ls=True),
}


# --- JAX ---------------------------------------------------------------------------------------
# The very same torch function, as a callback: XLA sees a black box with the right derivatives.


class _InJax:
    """A map for JAX that calls whatever counter is current, so that nothing is compiled twice."""

    def __init__(self) -> None:
        import jax

        self._jax = jax
        self.counter: Counter | None = None

        @jax.custom_jvp
        def forward(z: Any) -> Any:
            return self._call(self._value, z, z)

        @forward.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            (z,), (v,) = primals, tangents
            return forward(z), self._call(self._product, z, z, v)

        @jax.custom_vjp
        def backward(z: Any) -> Any:
            return self._call(self._value, z, z)

        def _forward_rule(z: Any) -> Any:
            return backward(z), z

        def _backward_rule(z: Any, w: Any) -> Any:
            return (self._call(self._transposed, z, z, w),)

        backward.defvjp(_forward_rule, _backward_rule)
        self.with_products, self.with_transposed = forward, backward

    def _call(self, host: Callable[..., np.ndarray], like: Any, *inputs: Any) -> Any:
        shape = self._jax.ShapeDtypeStruct(like.shape, like.dtype)
        return self._jax.pure_callback(host, shape, *inputs, vmap_method="sequential")

    def _value(self, z: Any) -> np.ndarray:
        return self._counted()(_torch(z)).numpy().ravel()

    def _product(self, z: Any, v: Any) -> np.ndarray:
        return self._counted().product(_torch(z), _torch(v)).numpy().ravel()

    def _transposed(self, z: Any, w: Any) -> np.ndarray:
        return self._counted().transposed_product(_torch(z), _torch(w)).numpy().ravel()

    def _counted(self) -> Counter:
        if self.counter is None:
            raise RuntimeError("no counter has been set")
        return self.counter


def _torch(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array)).unsqueeze(0)


_IN_JAX: list[_InJax] = []


def _in_jax() -> _InJax:
    if not _IN_JAX:
        import jax

        jax.config.update("jax_enable_x64", True)
        # A callback that waits for an array of its own program would wait for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        _IN_JAX.append(_InJax())
    return _IN_JAX[0]


def _jax(build: Callable[[_InJax], Callable[[Any], Any]], *, dense: bool = False) -> Run:
    """`build` makes a jitted function of the start from the map; it is built once."""
    built: list[Callable[[Any], Any]] = []

    def run(counter: Counter, z0: Tensor) -> None:
        if dense and z0.shape[1] > DENSE_LIMIT:
            raise Skipped(f"forms the Jacobian; not run beyond D = {DENSE_LIMIT}")
        import jax

        in_jax = _in_jax()
        if not built:
            built.append(build(in_jax))
        in_jax.counter = counter
        counter.stop = "echo"
        jax.block_until_ready(built[0](jax.numpy.asarray(z0.numpy().ravel())))

    return run


def _jaxopt(name: str, **options: Any) -> Run:
    def build(in_jax: _InJax) -> Callable[[Any], Any]:
        import jax
        import jaxopt

        if name == "Broyden":
            options["fun"] = lambda z: z - in_jax.with_transposed(z)
        else:
            options["fixed_point_fun"] = in_jax.with_products
        solver = getattr(jaxopt, name)(
            maxiter=MAX_STEPS, tol=0.0, implicit_diff=False, jit=True, **options
        )
        return jax.jit(lambda z: solver.run(z).params)

    return _jax(build)


JAXOPT: dict[str, Run] = {
    "jaxopt FixedPointIteration": _jaxopt("FixedPointIteration"),
    "jaxopt AndersonAcceleration": _jaxopt("AndersonAcceleration"),
    "jaxopt AndersonAcceleration, tuned": _jaxopt("AndersonAcceleration", ridge=1e-12),
    "jaxopt AndersonAcceleration, tuned, history 20": _jaxopt(
        "AndersonAcceleration", ridge=1e-12, history_size=20
    ),
    "jaxopt Broyden": _jaxopt("Broyden"),
    "jaxopt Broyden, tuned": _jaxopt("Broyden", stepsize=1.0),
}


def _optimistix(name: str, *, gmres: bool = False) -> Run:
    def build(in_jax: _InJax) -> Callable[[Any], Any]:
        import jax
        import lineax
        import optimistix

        options = {"rtol": 1e-300, "atol": 1e-300}
        if gmres:
            linear = lineax.GMRES(rtol=0.1, atol=1e-12, restart=10)
            solver = getattr(optimistix, name)(**options, linear_solver=linear)
        else:
            solver = getattr(optimistix, name)(**options)
        find = optimistix.fixed_point if name == "FixedPointIteration" else optimistix.root_find

        def f(z: Any, args: Any) -> Any:
            image = in_jax.with_products(z)
            return image if name == "FixedPointIteration" else image - z

        return jax.jit(lambda z: find(f, solver, z, max_steps=MAX_STEPS, throw=False).value)

    return _jax(build, dense=name != "FixedPointIteration" and not gmres)


OPTIMISTIX: dict[str, Run] = {
    "optimistix FixedPointIteration": _optimistix("FixedPointIteration"),
    "optimistix Newton": _optimistix("Newton"),
    "optimistix Newton, GMRES": _optimistix("Newton", gmres=True),
    "optimistix Chord": _optimistix("Chord"),
}

LIBRARIES: dict[str, dict[str, Run]] = {
    "scipy": SCIPY,
    "torchdeq": TORCHDEQ,
    "jaxopt": JAXOPT,
    "optimistix": OPTIMISTIX,
}
