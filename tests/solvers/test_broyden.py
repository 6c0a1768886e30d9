"""Broyden's method against the matrix it stands for, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, FixedSteps, Residual, UserError, solve

pytestmark = pytest.mark.usefixtures("steps")


def reference(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    num_steps: int,
    history_size: int | None,
    relaxation: float,
    kind: str,
) -> Tensor:
    """One sample: B, or its inverse H, starts at -I and takes the retained pairs, oldest first."""

    def g(z: Tensor) -> Tensor:
        return f(z) - z

    z, pairs = z0, []
    for _ in range(num_steps):
        matrix = -torch.eye(len(z), dtype=z.dtype)
        for s, y in pairs[-history_size:] if history_size else pairs:
            if kind == "good":
                matrix = matrix + torch.outer(y - matrix @ s, s) / s.dot(s)
            else:
                matrix = matrix + torch.outer(s - matrix @ y, y) / y.dot(y)
        direction = torch.linalg.solve(matrix, g(z)) if kind == "good" else matrix @ g(z)
        new = z - relaxation * direction
        pairs.append((new - z, g(new) - g(z)))
        z = new
    return z


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("relaxation", [1.0, 0.7])
@pytest.mark.parametrize("history_size", [1, 2, 4, 12, None])
def test_equals_dense_updates_with_the_retained_pairs(history_size, relaxation, kind):
    """Windows of 1, 2 and 4 forget pairs within 9 steps; 12 and None keep them all."""
    weight = torch.randn(3, 12, 12, dtype=torch.float64) / 4
    shift = torch.randn(3, 12, dtype=torch.float64)
    z0 = torch.randn(3, 12, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh((weight @ z.unsqueeze(2)).squeeze(2) + shift)

    for num_steps in (1, 2, 5, 9):
        with torch.no_grad():
            found = solve(
                f,
                z0,
                solver=Broyden(history_size, relaxation, kind),
                termination=FixedSteps(num_steps),
                max_steps=20,
            ).z
        for row in range(3):
            wanted = reference(
                lambda z, row=row: torch.tanh(weight[row] @ z + shift[row]),
                z0[row],
                num_steps,
                history_size,
                relaxation,
                kind,
            )
            torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-10)


def test_a_window_that_fits_changes_nothing():
    solutions = [
        solve(torch.cos, torch.zeros(2, 5), solver=Broyden(size), max_steps=12)
        for size in (12, 40, None)
    ]
    for other in solutions[1:]:
        assert torch.equal(solutions[0].z, other.z)


def searched(f: Callable[[Tensor], Tensor], z0: Tensor, num_steps: int) -> list[Tensor]:
    """The points that a solve with line search has f evaluated at."""
    seen: list[Tensor] = []

    def recorded(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    with torch.no_grad():
        solver = Broyden(line_search=True)
        solve(recorded, z0, solver=solver, termination=FixedSteps(num_steps), max_steps=num_steps)
    return seen


def test_a_step_that_makes_things_worse_is_halved_until_it_does_not():
    """f(z) = -6 z + 7 from 0: the plain step 7 gives |r| = 42, a quarter of it |r| = 5.25 < 7."""
    seen = searched(lambda z: -6.0 * z + 7.0, torch.zeros(1, 1), 1)
    assert [float(z) for z in seen] == [0.0, 7.0, 3.5, 1.75]


def test_a_good_step_is_taken_as_it_is():
    assert len(searched(lambda z: 0.5 * z + 1.0, torch.zeros(2, 3), 3)) == 4


def test_every_sample_is_searched_for_itself():
    factor = torch.tensor([[-6.0], [0.5]])
    seen = searched(lambda z: factor * z + 7.0, torch.zeros(2, 1), 1)
    assert [z[0].item() for z in seen] == [0.0, 7.0, 3.5, 1.75]
    assert [z[1].item() for z in seen] == [0.0, 7.0, 7.0, 7.0]


def test_where_no_step_helps_the_best_one_tried_is_taken():
    """z + 1 has the same residual everywhere but past 0.5, where it is worse."""
    seen = searched(lambda z: torch.where(z > 0.5, z + 9.0, z + 1.0), torch.zeros(1, 1), 2)
    assert [float(z) for z in seen[:6]] == [0.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    assert float(seen[6]) == 0.03125


def test_a_step_out_of_the_domain_is_shortened():
    def f(z: Tensor) -> Tensor:
        return 0.5 - 2.0 * torch.log(z)  # NaN at z <= 0

    z0 = torch.full((2, 3), 3.0)
    for line_search in (False, True):
        with torch.no_grad():
            solution = solve(
                f,
                z0,
                solver=Broyden(line_search=line_search),
                termination=Residual(1e-5),
                on_failure="ignore",
            )
        assert bool(solution.converged.all()) == line_search


def test_a_finished_sample_costs_no_search():
    """Held in place, it cannot decrease its residual, and must not be asked to."""

    def cost(factors: list[float]) -> int:
        factor = torch.tensor(factors).unsqueeze(1)
        with torch.no_grad():
            return solve(
                lambda z: factor * torch.sin(z) + 1.0,
                torch.zeros(len(factors), 1),
                solver=Broyden(line_search=True),
                termination=Residual(1e-6),
                on_failure="raise",
            ).num_evals

    assert cost([-0.9, 0.0]) == cost([-0.9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "ugly"}, "kind='ugly' of Broyden is not one of 'good', 'bad'"),
        ({"line_search": "armijo"}, "line_search='armijo' of Broyden must be True or False"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        Broyden(**options)
