"""The Jacobian penalty against the dense Jacobian, for every kind of solve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Cell,
    Implicit,
    OneStep,
    Picard,
    Residual,
    Solution,
    Unrolled,
    UserError,
    solve,
)
from equilibria.core.pure import TransformError
from equilibria.core.scope import once
from equilibria.regularizers.jacobian import (
    JacobianRegularizer,
    jacobian_penalty,
    jacobian_penalty_at,
)
from equilibria.regularizers.schedule import StepwiseWeight
from equilibria.testing import PROBLEMS, jacobian, problem

SMALL = [name for name in PROBLEMS if name != "no_fixed_point"]


def basis(z: Tensor) -> list[Tensor]:
    """The D probes that make the estimate exact."""
    size = z[0].numel()
    return [
        (math.sqrt(size) * row).expand(len(z), size).reshape(z.shape)
        for row in torch.eye(size, dtype=z.dtype)
    ]


def exact(f, z: Tensor) -> Tensor:
    """||J||_F^2 / D by the dense Jacobian."""
    return jacobian(f, z).square().sum((1, 2)) / z[0].numel()


@pytest.mark.parametrize("name", SMALL)
def test_exact_when_the_probes_are_a_basis(name):
    given = problem(name)
    solution = solve(given.f, given.z_star, on_failure="ignore")
    found = jacobian_penalty(solution, probes=basis(solution.z))
    torch.testing.assert_close(found, exact(given.f, solution.z), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_expectation_over_many_probes(distribution, make_deq, x):
    with torch.no_grad():
        solution = make_deq()(x)
        draw = torch.Generator().manual_seed(3)
        many = [
            jacobian_penalty(solution, distribution=distribution, generator=draw)
            for _ in range(1000)
        ]
        estimates = torch.stack(many)
    wanted = exact(solution.function, solution.z)
    error = estimates.std(0) / math.sqrt(len(many))
    assert bool(((estimates.mean(0) - wanted).abs() < 4.0 * error).all())
    assert bool((error > 0).all())


def test_averaging_probes_is_averaging_estimates(make_deq, x):
    with torch.no_grad():
        solution = make_deq()(x)
        draws = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        at_once = jacobian_penalty(solution, num_probes=3, generator=draws[0])
        one_by_one = [jacobian_penalty(solution, generator=draws[1]) for _ in range(3)]
    torch.testing.assert_close(at_once, torch.stack(one_by_one).mean(0))


def test_rademacher_probes_vary_less(make_deq, x):
    with torch.no_grad():
        solution = make_deq()(x)
        spread = {
            kind: torch.stack([jacobian_penalty(solution, distribution=kind) for _ in range(300)])
            .var(0)
            .sum()
            for kind in ("rademacher", "normal")
        }
    assert spread["rademacher"] < spread["normal"]


def test_a_tree_of_states():
    W = 0.4 * torch.randn(5, 5, dtype=torch.float64)

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        joined = torch.tanh(torch.cat((z["a"], z["b"].flatten(1)), 1) @ W.T + 0.3)
        return {"a": joined[:, :1], "b": joined[:, 1:].reshape(-1, 2, 2)}

    z0 = {
        "a": torch.zeros(3, 1, dtype=torch.float64),
        "b": torch.zeros(3, 2, 2, dtype=torch.float64),
    }
    solution = solve(f, z0)
    flat = torch.cat((solution.z["a"], solution.z["b"].flatten(1)), 1)
    probes = [{"a": p[:, :1], "b": p[:, 1:].reshape(-1, 2, 2)} for p in basis(flat)]
    found = jacobian_penalty(solution, probes=probes)
    torch.testing.assert_close(found, exact(lambda z: torch.tanh(z @ W.T + 0.3), flat))


def test_problems_without_rows_do_not_lower_the_mean():
    for index in (torch.tensor([0, 1, 1]), torch.tensor([0, 5, 5])):
        solution = solve(lambda z: 0.5 * z + 1.0, torch.zeros(3, 2), segments=index)
        assert JacobianRegularizer(2.0)(solution).item() == pytest.approx(2.0 * 0.25)


def test_segments_are_problems_of_their_own():
    """The rows of a graph see each other; each graph is divided by its own size."""
    index = torch.tensor([0, 1, 1, 0, 1])
    same = (index.unsqueeze(0) == index.unsqueeze(1)).double() * torch.rand(5, 5).double()

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.3 * same @ z + 0.1)

    solution = solve(f, torch.zeros(5, 2, dtype=torch.float64), segments=index)
    units = torch.eye(10, dtype=torch.float64).view(10, 5, 2)
    found = 10.0 * jacobian_penalty(solution, probes=list(units))
    for graph in range(2):
        rows = index == graph
        block = same[rows][:, rows]
        z = solution.z[rows].reshape(1, -1)
        shape = (int(rows.sum()), 2)

        def one(z: Tensor, block=block, shape=shape) -> Tensor:
            return torch.tanh(0.3 * block @ z.view(shape) + 0.1).view(1, -1)

        torch.testing.assert_close(found[graph], exact(one, z)[0])


def test_one_global_problem():
    W = 0.4 * torch.randn(4, 4, dtype=torch.float64)
    solution = solve(
        lambda z: torch.tanh(W @ z + 0.2), torch.zeros(4, dtype=torch.float64), batch_dims=0
    )
    probes = [2.0 * row for row in torch.eye(4, dtype=torch.float64)]
    found = jacobian_penalty(solution, probes=probes)
    wanted = exact(lambda z: torch.tanh(z @ W.T + 0.2), solution.z.unsqueeze(0))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=repr)
def test_the_gradient_is_that_of_the_dense_penalty_at_a_constant_state(adjoint, make_deq, x):
    """It reaches the parameters of f and, through the injection, the input."""
    x = x.requires_grad_()
    deq = make_deq(adjoint=adjoint)
    solution = deq(x)
    leaves = [x, *deq.parameters()]
    found = torch.autograd.grad(jacobian_penalty(solution, probes=basis(solution.z)).sum(), leaves)
    cell, z = deq.cell, solution.z.detach()
    slope = 1.0 - cell(z, cell.inject(x)).square()
    dense = (slope.unsqueeze(2) * cell.recurrent.weight).square().sum() / z.shape[1]
    wanted = torch.autograd.grad(dense, leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_total_derivative_against_finite_differences(make_deq, x):
    """through_state=True: z* moves with the parameters, and the penalty with z*."""
    deq = make_deq()
    weight = deq.cell.recurrent.weight

    def total() -> Tensor:
        solution = deq(x)
        return jacobian_penalty(solution, through_state=True, probes=basis(solution.z)).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    direction = torch.randn_like(weight)
    values = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            weight.add_(direction, alpha=sign * 1e-5)
            values.append(float(total()))
            weight.add_(direction, alpha=-sign * 1e-5)
    wanted = (values[0] - values[1]) / 2e-5
    assert math.isclose(float((gradient * direction).sum()), wanted, rel_tol=1e-6)
    (partial,) = torch.autograd.grad(jacobian_penalty(s := deq(x), probes=basis(s.z)).sum(), weight)
    assert not math.isclose(float((partial * direction).sum()), wanted, rel_tol=1e-2)


class MaskedCell(Cell):
    """A mask and a normalised weight, drawn or made inside the map by `once`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.num_masks = 0

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        mask = once((self, "mask"), lambda: self._draw(z))
        weight = once((self, "weight"), lambda: 0.5 * self.weight / self.weight.norm())
        return torch.tanh((mask * z) @ weight.T + injection)

    def _draw(self, z: Tensor) -> Tensor:
        self.num_masks += 1
        return torch.bernoulli(torch.full_like(z, 0.5)) * 2.0


def test_the_masks_and_weights_of_the_solve_are_used_again():
    """The Jacobian is that of the function that was solved, and weights get their gradient."""
    cell = MaskedCell().double()
    solution = DEQ(cell, termination=Residual(1e-10, 0.0))(torch.randn(3, 6, dtype=torch.float64))
    torch.testing.assert_close(solution.function(solution.z), solution.z, rtol=1e-8, atol=1e-8)
    penalty = jacobian_penalty(solution, probes=basis(solution.z))
    assert cell.num_masks == 1
    torch.testing.assert_close(penalty, exact(solution.function, solution.z))
    penalty.sum().backward()
    assert bool(cell.weight.grad.any())


def test_one_evaluation_and_a_product_per_probe():
    calls = 0
    W = (0.1 * torch.randn(4, 4)).requires_grad_()

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(z @ W.T + 0.1)

    solution = solve(f, torch.zeros(2, 4))
    before = calls
    jacobian_penalty(solution, num_probes=5).sum().backward()
    assert calls == before + 1


@pytest.mark.parametrize("weight_of_loss", [0.0, 1.0])
def test_sharing_the_recorded_evaluation_saves_it_and_changes_nothing(weight_of_loss, make_deq, x):
    """One backward call through loss and penalty, which share their last evaluation."""
    x = x.requires_grad_()
    deq = make_deq()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    deq.cell.register_forward_hook(count)
    gradients, evaluations = [], []
    for share in (False, True):
        solution = deq(x)
        solved = calls
        probes = basis(solution.z)
        penalty = jacobian_penalty(solution, share_evaluation=share, probes=probes).sum()
        loss = weight_of_loss * solution.z.square().sum() + penalty
        gradients.append(torch.autograd.grad(loss, [x, *deq.parameters()]))
        evaluations.append(calls - solved)
    assert evaluations == [1, 0]
    for shared, own in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-9, atol=1e-12)


def test_a_shared_evaluation_is_there_once(make_deq, x):
    """As for two losses of one network: never silently half a gradient."""
    deq = make_deq()
    solution = deq(x)
    jacobian_penalty(solution, share_evaluation=True).sum().backward(retain_graph=True)
    solution.z.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        jacobian_penalty(solution, share_evaluation=True)
    assert bool((jacobian_penalty(solution) > 0.0).all())


@pytest.mark.parametrize("adjoint", [OneStep(), Unrolled()], ids=repr)
def test_without_a_recorded_evaluation_another_is_made(adjoint, make_deq, x):
    solution = make_deq(adjoint=adjoint)(x)
    probes = basis(solution.z)
    shared = jacobian_penalty(solution, share_evaluation=True, probes=probes)
    torch.testing.assert_close(shared, jacobian_penalty(solution, probes=probes))


def test_a_shared_evaluation_does_not_move_with_the_state(make_deq, x):
    with pytest.raises(UserError, match="give one of the two"):
        JacobianRegularizer(share_evaluation=True, through_state=True)
    with pytest.raises(UserError, match="give one of the two"):
        jacobian_penalty(make_deq()(x), share_evaluation=True, through_state=True)


def test_checkpointed_unrolling(make_deq, x):
    deq = make_deq(adjoint=Unrolled(checkpoint=True), termination=Residual(1e-4))
    solution = deq(x)
    (solution.z.sum() + jacobian_penalty(solution).sum()).backward()
    assert bool(deq.cell.recurrent.weight.grad.isfinite().all())


def test_under_no_grad_it_is_a_measurement(make_deq, x):
    deq = make_deq()
    with torch.no_grad():
        solution = deq(x)
        found = jacobian_penalty(solution)
    assert bool((found > 0).all())
    assert not found.requires_grad
    assert not jacobian_penalty(solution).requires_grad  # nothing in the solution has a graph


def test_plain_functions_and_states():
    W = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    z = torch.randn(3, 4, dtype=torch.float64)
    draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    found = jacobian_penalty_at(lambda z: z @ W.T, z, num_probes=2, generator=draws[0])
    solution = solve(lambda z: z @ W.T, torch.zeros_like(z))
    wanted = jacobian_penalty(solution, num_probes=2, generator=draws[1])
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert bool(W.grad.any())


def test_a_map_without_z_and_an_empty_batch():
    assert jacobian_penalty(solve(torch.ones_like, torch.zeros(2, 3))).tolist() == [0.0, 0.0]
    empty = solve(lambda z: 0.5 * z, torch.zeros(0, 3))
    assert jacobian_penalty(empty).shape == (0,)
    assert float(JacobianRegularizer()(empty)) == 0.0


def test_half_precision_is_summed_in_float32():
    """The sum of squares, 4096 * 20^2, is beyond float16."""
    z = torch.zeros(1, 4096, dtype=torch.float16)
    found = jacobian_penalty_at(lambda z: 20.0 * z, z)
    assert found.dtype == torch.float32
    assert float(found) == 400.0


def test_autocast_gives_the_function_that_was_solved(make_deq, x):
    deq = make_deq(termination=Residual(1e-2)).float()
    with torch.autocast("cpu", torch.bfloat16):
        solution = deq(x.float())
        inside = jacobian_penalty(solution, probes=basis(solution.z.detach()))
    outside = jacobian_penalty(solution, probes=basis(solution.z.detach()))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    inside.sum().backward()
    assert bool(deq.cell.recurrent.weight.grad.any())


def test_training_with_it_lowers_the_jacobian_and_the_number_of_steps():
    torch.manual_seed(0)
    W = (0.9 * torch.randn(20, 20) / math.sqrt(20)).requires_grad_()
    x = torch.randn(16, 20)
    regularizer = JacobianRegularizer(weight=1.0, probability=0.5)
    optimizer = torch.optim.Adam([W], lr=0.02)
    history: list[Solution] = []
    for step in range(60):
        solution = solve(
            lambda z: torch.tanh(z @ W.T + x),
            torch.zeros(16, 20),
            solver=Picard(),
            max_steps=200,
        )
        history.append(solution)
        loss = regularizer(solution, step=step)
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert history[-1].num_evals < 0.7 * history[0].num_evals


# --- when it applies ---------------------------------------------------------------------------


def test_the_decision_depends_on_seed_and_step_alone():
    """So that ranks agree, and a resumed training goes on as it would have."""
    regularizer = JacobianRegularizer(probability=0.35, seed=7)
    torch.manual_seed(1)
    first = [regularizer.applies_at(step) for step in range(3000)]
    torch.manual_seed(2)
    torch.rand(5)
    assert first == [regularizer.applies_at(step) for step in range(3000)]
    assert abs(sum(first) / 3000 - 0.35) < 0.03
    other = [JacobianRegularizer(probability=0.35, seed=8).applies_at(s) for s in range(3000)]
    agreement = sum(a == b for a, b in zip(first, other, strict=True)) / 3000
    assert abs(agreement - (0.35**2 + 0.65**2)) < 0.04
    # the decision is the same everywhere: these are numbers and not an environment
    assert [step for step in range(12) if first[step]] == [2, 7]


def test_deciding_draws_no_random_numbers(make_deq, x):
    solution = make_deq()(x)
    before = torch.get_rng_state()
    skipped = JacobianRegularizer(probability=0.0)(solution, step=3)
    JacobianRegularizer(probability=0.5).applies_at(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert skipped.shape == ()
    assert float(skipped) == 0.0
    assert not skipped.requires_grad


def test_probes_are_reproducible_and_differ_between_steps(make_deq, x):
    solution, regularizer = make_deq()(x), JacobianRegularizer()
    torch.manual_seed(5)
    first, second = regularizer(solution), regularizer(solution)
    torch.manual_seed(5)
    assert torch.equal(regularizer(solution), first)
    assert not torch.equal(first, second)


def test_the_weight_follows_its_schedule(make_deq, x):
    solution = make_deq()(x)
    schedule = StepwiseWeight(1.9, increase=0.1, every=100, maximum=2.05, begin=10, end=400)
    regularizer = JacobianRegularizer(schedule)
    plain = JacobianRegularizer()
    for step, weight in {
        0: 0.0,
        10: 1.9,
        99: 1.9,
        100: 2.0,
        250: 2.05,
        399: 2.05,
        400: 0.0,
    }.items():
        assert math.isclose(regularizer.weight_at(step), weight)
        torch.manual_seed(0)
        found = regularizer(solution, step=step)
        torch.manual_seed(0)
        torch.testing.assert_close(found, weight * plain(solution))
    assert JacobianRegularizer(lambda step: 2.0 * step).weight_at(3) == 6.0


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JacobianRegularizer(probability=1.2), "probability=1.2 must lie between 0 and 1"),
        (lambda: JacobianRegularizer(probability=-0.1), "probability=-0.1"),
        (lambda: JacobianRegularizer(weight=-1.0), "weight=-1.0"),
        (lambda: JacobianRegularizer(num_probes=0), "num_probes=0"),
        (lambda: JacobianRegularizer(distribution="gauss"), "not one of 'rademacher', 'normal'"),
        (
            lambda: JacobianRegularizer(distribution="rademacer"),
            "did you mean 'rademacher'",
        ),
        (lambda: StepwiseWeight(-1.0), "start=-1.0"),
        (lambda: StepwiseWeight(1.0, increase=0.1), "give every=... training steps"),
        (lambda: StepwiseWeight(1.0, begin=5, end=5), "give 0 <= begin < end"),
        (lambda: StepwiseWeight(1.0, increase=0.1, every=0), "every=0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_step_is_asked_for_where_it_is_needed(make_deq, x):
    solution = make_deq()(x)
    with pytest.raises(UserError, match=r"probability=0.4 .* regularizer\(solution, step=step\)"):
        JacobianRegularizer(probability=0.4)(solution)
    with pytest.raises(UserError, match="weight follows a schedule"):
        JacobianRegularizer(StepwiseWeight(1.0))(solution)
    with pytest.raises(UserError, match="step -1 is negative"):
        JacobianRegularizer(probability=0.4)(solution, step=-1)


def test_what_is_no_solution(make_deq, x):
    with pytest.raises(UserError, match="got a Tensor; give the solution itself"):
        jacobian_penalty(make_deq()(x).z)
    with pytest.raises(UserError, match="probes is empty"):
        jacobian_penalty(make_deq()(x), probes=[])
    solution = make_deq()(x)
    by_hand = Solution(
        solution.z, solution.status, solution.residual, solution.relative_residual,
        solution.num_steps, solution.num_evals, solution.seconds, solution.backward,
    )  # fmt: skip
    with pytest.raises(UserError, match="put together by hand"):
        jacobian_penalty(by_hand)
    with pytest.raises(UserError, match="put together by hand"):
        _ = by_hand.function


def test_inference_mode_and_transforms(make_deq, x):
    deq = make_deq()
    with torch.inference_mode():
        solution = deq(x)
        with pytest.raises(UserError, match=r"use torch.no_grad\(\) instead"):
            jacobian_penalty(solution)
    with pytest.raises(UserError, match=r"use torch.no_grad\(\) instead"):
        jacobian_penalty(solution)
    with pytest.raises(TransformError, match="neither under torch.func"):
        torch.func.grad(lambda x: jacobian_penalty(deq(x)).sum())(x)
