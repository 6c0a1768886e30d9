"""The ladder of solvers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import (
    Anderson,
    Broyden,
    Iterate,
    Picard,
    Residual,
    Solver,
    Status,
    UserError,
    solve,
)
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.newton_krylov import NewtonKrylov


def run(solver, factors: list[float], *, width: int = 3, **settings):
    """f(z) = factor z + 1, one factor per sample."""
    factor = torch.tensor(factors, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        return solve(
            lambda z: factor * z + 1.0,
            torch.zeros(len(factors), width, dtype=torch.float64),
            solver=solver,
            **({"max_steps": 60, "on_failure": "ignore"} | settings),
        )


def test_only_the_samples_that_need_help_move_on():
    """Picard solves 0.5 and diverges for -1.1 and 2; -1 oscillates for ever."""
    factors = [0.5, -1.1, -1.0, 2.0]
    plain = run(Picard(), factors)
    ladder = run(Fallback(Picard(), Anderson(), num_steps=4), factors)
    assert plain.status.tolist() == [Status.SUCCESS] + [Status.MAX_STEPS] * 3
    assert bool(ladder.converged.all())
    assert torch.equal(ladder.z[0], plain.z[0])
    assert ladder.num_steps[0] == plain.num_steps[0]


def test_a_ladder_that_is_not_needed_changes_nothing():
    factors = [0.5, 0.9, -0.9]
    alone, ladder = run(Anderson(), factors), run(Fallback(Anderson(), Broyden()), factors)
    assert torch.equal(alone.z, ladder.z)
    assert alone.num_evals == ladder.num_evals


def test_samples_on_different_rungs_share_their_evaluations():
    factors = [0.5, -1.0, 2.0, 0.99, -5.0]
    solver = Fallback(Picard(), Picard(relaxation=0.5), Broyden(), num_steps=3)
    solution = run(solver, factors)
    assert bool(solution.converged.all())
    assert solution.num_evals == 1 + int(solution.num_steps.max())


def test_it_climbs_from_the_best_iterate():
    """Picard on 2 z + 1 only gets worse, so Broyden begins at z0 itself, after 2 steps."""
    solution = run(Fallback(Picard(), Broyden(), num_steps=2), [2.0])
    from_start = run(Broyden(), [2.0])
    assert solution.num_steps[0] == 2 + from_start.num_steps[0]
    torch.testing.assert_close(solution.z, from_start.z)


def test_the_explosion_of_one_solver_is_answered_before_patience_ends():
    solution = run(Fallback(Picard(), Broyden(), num_steps=50, growth=10.0), [3.0])
    assert bool(solution.converged.all())
    assert solution.num_steps[0] < 10


def test_a_solver_that_leaves_the_domain_is_replaced():
    """Half a Picard step on 2 - log z stays positive, the whole one does not."""

    def f(z: Tensor) -> Tensor:
        return 0.5 - 2.0 * torch.log(z)

    settings = {"termination": Residual(1e-8), "max_steps": 80, "on_failure": "ignore"}
    z0 = torch.full((2, 3), 3.0, dtype=torch.float64)
    assert solve(f, z0, solver=Picard(), **settings).status.tolist() == [Status.NONFINITE] * 2
    solution = solve(f, z0, solver=Fallback(Picard(), Picard(relaxation=0.3)), **settings)
    assert bool(solution.converged.all())


def test_the_last_solver_says_when_nothing_works():
    solution = run(
        Fallback(Picard(), Anderson(), Picard(0.5), num_steps=2), [1.0], termination=Residual(1e-8)
    )
    assert not bool(solution.converged.any())


def test_a_solver_with_evaluations_of_its_own_leaves_the_others_alone():
    factors = [0.9, 2.0, 0.5]
    ladder = run(Fallback(Picard(), NewtonKrylov(), num_steps=3), factors, max_steps=200)
    plain = run(Picard(), factors, max_steps=200)
    assert bool(ladder.converged.all())
    for row in (0, 2):
        assert torch.equal(ladder.z[row], plain.z[row])


@dataclass(frozen=True)
class Stands(Solver):
    """Proposes to stay where it is."""

    @property
    def single_evaluation(self) -> bool:
        return True

    def init(self, iterate: Iterate, max_steps: int) -> None:
        return None

    def propose(self, iterate: Iterate, state: None) -> tuple[Tensor, None]:
        return iterate.z.clone(), None

    def step(self, evaluate: Any, iterate: Iterate, state: None) -> tuple[Iterate, None]:
        return evaluate(self.propose(iterate, state)[0]), None


def test_a_solver_that_does_not_move_is_replaced():
    """It asked for no other point, so that its samples are stuck, and not finished."""
    assert bool(run(Fallback(Stands(), Picard(), num_steps=2), [0.5, 0.1]).converged.all())


def test_it_is_a_value():
    ladder = Fallback(Anderson(), Picard(relaxation=0.5), num_steps=4)
    assert ladder == Fallback(Anderson(), Picard(relaxation=0.5), num_steps=4)
    assert hash(copy.deepcopy(ladder)) == hash(ladder)
    assert pickle.loads(pickle.dumps(ladder)) == ladder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fallback(), "got 0 solvers"),
        (lambda: Fallback(Anderson()), "got 1 solvers"),
        (lambda: Fallback(Anderson, Broyden), "an instance, not the class"),
        (lambda: Fallback(Anderson(), "broyden"), "Fallback got 'broyden'"),
        (lambda: Fallback(Anderson(), Broyden(), num_steps=0), "num_steps=0"),
        (lambda: Fallback(Anderson(), Broyden(), factor=1.5), "factor=1.5"),
        (lambda: Fallback(Anderson(), Broyden(), growth=0.5), "growth=0.5"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
