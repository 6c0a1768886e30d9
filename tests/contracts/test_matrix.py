"""Every solver with every gradient method on every kind of state.

The whole product is slow; the fast part has every pair of two of the three. Values and exact
gradients are compared with dense linear algebra. A method that approximates the gradient has to
give the same one whatever the solver and the form of the state.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from equilibria import (
    Adjoint,
    LinearSolver,
    Picard,
    Residual,
    SecondDerivativeError,
    Solver,
    UserError,
    solve,
)
from equilibria.registry import names, parse
from equilibria.testing.dense import relative_error
from equilibria.testing.states import STATES, StateProblem

# By name in the registry: the variants that are methods of their own.
SOLVERS = {
    "picard": ["picard", "picard(relaxation=0.7)"],
    "anderson": [
        "anderson",
        "anderson(history_size=1)",
        "anderson(kind='I')",
        "anderson(restart=4)",
        "anderson(safeguard=2.0)",
    ],
    "broyden": [
        "broyden",
        "broyden(history_size=None)",
        "broyden(history_size=4)",
        "broyden(kind='bad')",
        "broyden(line_search=True)",
    ],
    "newton_krylov": [
        "newton_krylov",
        "newton_krylov(products='double_backward', line_search=False)",
    ],
    "reversible": ["reversible(reconstruction_tolerance=None)"],
    "fallback": ["fallback(anderson, picard(relaxation=0.5), broyden)"],
}
LINEAR_SOLVERS = {
    "gmres": ["gmres", "gmres(restart=5)"],
    "bicgstab": ["bicgstab"],
    "neumann": ["neumann"],
    "fixed_point": ["fixed_point(solver=anderson)", "fixed_point(solver=broyden)"],
}
ADJOINTS = {
    "implicit": [
        f"implicit(solver={linear}, rtol=1e-11, max_steps=300)"
        for linear in (*(v for variants in LINEAR_SOLVERS.values() for v in variants), "picard")
    ],
    "one_step": ["one_step"],
    "phantom": ["phantom"],
    "neumann_series": ["neumann_series", "neumann_series(num_terms=2, clip=1.0)"],
    "unrolled": ["unrolled", "unrolled(checkpoint=True)"],
    "shine": ["shine(refinement=40)"],  # refined to the end; less of it depends on the path
    "reversible_adjoint": ["reversible_adjoint"],
}


def flat(table: dict[str, list[str]]) -> list[str]:
    return [variant for variants in table.values() for variant in variants]


@pytest.mark.parametrize(
    ("kind", "table"), [(Solver, SOLVERS), (LinearSolver, LINEAR_SOLVERS), (Adjoint, ADJOINTS)]
)
def test_every_plugin_is_in_the_matrix(kind: type, table: dict[str, list[str]]) -> None:
    """A new file in solvers/, linear/ or adjoints/ gets its row here."""
    assert sorted(table) == names(kind)
    for name, variants in table.items():
        assert all(text.partition("(")[0] == name for text in variants)


def refusal(solver: str, adjoint: str, kind: str = "tensor") -> str | None:
    """What the error says about what cannot work together; None if it can."""
    if adjoint.startswith("unrolled") and solver.startswith("newton_krylov"):
        return "NewtonKrylov cannot be unrolled.*Implicit"
    if adjoint.startswith("shine") and not solver.startswith("broyden"):
        return "Shine needs a forward solver that estimates the inverse Jacobian"
    if adjoint.startswith("reversible_adjoint") and not solver.startswith("reversible"):
        return "ReversibleAdjoint cannot undo the steps of"
    if adjoint.startswith("reversible_adjoint") and kind in ("mixed_dtypes", "half"):
        return "ReversibleAdjoint cannot undo steps whose states are rounded"
    return None


ALL = list(product(flat(SOLVERS), flat(ADJOINTS), STATES))
# Each solver meets each adjoint once, and so often that each of the two meets each kind, too.
PAIRS = {
    (solver, adjoint, STATES[(i + j) % len(STATES)])
    for i, solver in enumerate(flat(SOLVERS))
    for j, adjoint in enumerate(flat(ADJOINTS))
}


def test_the_fast_part_has_every_pair() -> None:
    for axes in ((0, 1), (0, 2), (1, 2)):
        wanted = {tuple(triple[axis] for axis in axes) for triple in ALL}
        assert {tuple(triple[axis] for axis in axes) for triple in PAIRS} == wanted


@pytest.mark.parametrize(
    ("solver", "adjoint", "kind"),
    [
        pytest.param(
            *triple, marks=() if triple in PAIRS else pytest.mark.slow, id="-".join(triple)
        )
        for triple in ALL
    ],
)
def test_value_and_gradient(solver: str, adjoint: str, kind: str) -> None:
    given = StateProblem(kind)
    undone = adjoint.startswith("reversible_adjoint")  # as many steps as can be
    tolerance = 1e-3 if undone else max(1e-10, 2 * given.precision)
    settings = {
        "solver": parse(Solver, solver),
        "adjoint": method(adjoint, given),
        "termination": Residual(tolerance, tolerance),
        "max_steps": 22 if undone else 300,
        "on_failure": "raise",
        **given.settings,
    }
    if message := refusal(solver, adjoint, kind):
        with pytest.raises(UserError, match=message):
            solve(given, given.z0, **settings)
        return
    solution = solve(given, given.z0, **settings)
    assert given.form_of(solution.z) == given.form_of(given.z0)
    assert solution.num_evals == given.num_calls
    assert solution.status.shape == (given.num_problems,)
    z, star = given.join(solution.z), z_star(kind)
    torch.testing.assert_close(z.detach(), star, rtol=0.0, atol=20 * tolerance)

    if kind == "empty" and not z.requires_grad:
        assert adjoint.startswith("unrolled")  # no step was made: there is none to differentiate
        return
    found = torch.autograd.grad(z, given.sources, cotangent(kind), materialize_grads=True)
    error = relative_error(found, gradients(adjoint, kind))
    # What is unrolled is the gradient of the steps that were made, which lags behind the value.
    lag = 1e-4 + 3e2 * given.precision if adjoint.startswith("unrolled") else 0.1 * undone
    assert error <= 1e-6 + 20.0 * given.precision + lag
    report = solution.backward.result
    assert (report is None) == adjoint.startswith(("one_step", "phantom", "neumann", "unrolled"))
    if report is not None and not adjoint.startswith("shine"):  # to which none is a failure
        assert report.status.tolist() == [0] * given.num_problems


def method(adjoint: str, given: StateProblem) -> Adjoint:
    """The gradient method, asked for no more than the products of a narrow state can give."""
    made = parse(Adjoint, adjoint)
    if "rtol" in {field.name for field in fields(made)}:
        return replace(made, rtol=max(made.rtol, 4 * given.precision))
    return made


@cache
def z_star(kind: str) -> Tensor:
    return StateProblem(kind).z_star


def cotangent(kind: str) -> Tensor:
    star = z_star(kind)
    return torch.randn(star.shape, dtype=star.dtype, generator=torch.Generator().manual_seed(5))


@cache
def gradients(adjoint: str, kind: str) -> tuple[Tensor, ...]:
    """Dense for an exact method; for others its own, on rows, with the plainest solver."""
    given, made = StateProblem(kind), parse(Adjoint, adjoint)
    if made.exact or adjoint.startswith("shine"):
        return given.gradients(cotangent(kind))
    plain = solve(
        given.packed,
        torch.zeros_like(given.sources[1]),
        solver=Picard(),
        adjoint=made,
        termination=Residual(1e-12, 1e-12),
        max_steps=300,
        **given.settings,
    )
    return torch.autograd.grad(plain.z, given.sources, cotangent(kind), materialize_grads=True)


# --- derivatives against finite differences ----------------------------------------------------

EXACT = [text for text in flat(ADJOINTS) if parse(Adjoint, text).exact]
APPROXIMATE = [text for text in flat(ADJOINTS) if text not in EXACT]
TWICE = [text for text in EXACT if not text.startswith("reversible_adjoint")]
FEW = {
    ("anderson", EXACT[0]),
    ("broyden", "unrolled(checkpoint=True)"),
    ("fallback(anderson, picard(relaxation=0.5), broyden)", "unrolled"),
}


def layer(x: Tensor, weight: Tensor, solver: str, adjoint: str) -> Tensor:
    return solve(
        lambda z: torch.tanh(z @ weight + x.sin()),
        torch.zeros_like(x),
        solver=parse(Solver, solver),
        adjoint=parse(Adjoint, adjoint),
        termination=Residual(1e-11, 1e-11),
        max_steps=300,
        on_failure="raise",
    ).z


@pytest.fixture
def sources() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    weight = 0.4 * torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    return x, weight.requires_grad_()


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        pytest.param(*pair, marks=() if pair in FEW else pytest.mark.slow, id="-".join(pair))
        for pair in product(flat(SOLVERS), TWICE)
        if refusal(*pair) is None
    ],
)
def test_first_and_second_derivatives(
    solver: str, adjoint: str, sources: tuple[Tensor, Tensor]
) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return layer(x, weight, solver, adjoint)

    # Unrolled derivatives converge after the value, second ones after first ones.
    atol = 1e-4 if adjoint.startswith("unrolled") else 1e-5
    fast = (solver, adjoint) not in FEW  # random projections of the Jacobian instead of all of it
    assert gradcheck(run, sources, atol=atol, fast_mode=fast)
    assert gradgradcheck(run, sources, atol=10 * atol, rtol=1e-2, fast_mode=fast)


@pytest.mark.parametrize("adjoint", APPROXIMATE)
def test_second_derivatives_of_an_approximation_are_refused(
    adjoint: str, sources: tuple[Tensor, Tensor]
) -> None:
    z = layer(*sources, "broyden", adjoint)
    with pytest.raises(SecondDerivativeError, match="second"):
        torch.autograd.grad(z.square().sum(), sources[0], create_graph=True)
