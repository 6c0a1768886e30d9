"""Type I, restart and safeguard of Anderson acceleration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, FixedSteps, Picard, Residual, UserError, solve
from equilibria.core.iterate import Iterate
from equilibria.solvers.anderson import _sines

pytestmark = pytest.mark.usefixtures("steps")


def tanh_map(width: int = 12):
    weight = torch.randn(3, width, width, dtype=torch.float64) / 4
    shift = torch.randn(3, width, dtype=torch.float64)
    return lambda z: torch.tanh(torch.einsum("bij,bj->bi", weight, z) + shift)


def after(f, solver, num_steps: int, z0: Tensor | None = None) -> Tensor:
    z0 = torch.zeros(3, 12, dtype=torch.float64) if z0 is None else z0
    with torch.no_grad():
        return solve(f, z0, solver=solver, termination=FixedSteps(num_steps), keep="last").z


def by_hand(f, num_steps: int, history_size: int, relaxation: float) -> Tensor:
    """Type I from its definition: S^T (r - R gamma) = 0, dense, one step at a time."""
    z = torch.zeros(3, 12, dtype=torch.float64)
    points, residuals = [z], [f(z) - z]
    for _ in range(num_steps):
        r = residuals[-1]
        z = points[-1] + relaxation * r
        if len(points) > 1:
            s = torch.stack(points[-history_size - 1 :], 2).diff(dim=2)
            y = torch.stack(residuals[-history_size - 1 :], 2).diff(dim=2)
            gamma = torch.linalg.solve(s.mT @ y, s.mT @ r.unsqueeze(2))
            z = z - ((s + relaxation * y) @ gamma).squeeze(2)
        points.append(z)
        residuals.append(f(z) - z)
    return points[-1]


@pytest.mark.parametrize("relaxation", [1.0, 0.6])
@pytest.mark.parametrize("history_size", [1, 3, 5])
def test_type_one_from_its_definition(history_size, relaxation):
    f = tanh_map()
    solver = Anderson(history_size, relaxation, ridge=0.0, min_angle=0.0, kind="I")
    for num_steps in (1, 2, 4, 8):
        wanted = by_hand(f, num_steps, history_size, relaxation)
        found = after(f, solver, num_steps)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_with_one_difference_type_one_is_broyden():
    """A single pair has no triangle: both explain the last step and nothing else."""
    f = tanh_map()
    found = after(f, Anderson(1, ridge=0.0, min_angle=0.0, kind="I"), 6)
    torch.testing.assert_close(found, after(f, Broyden(1), 6), rtol=1e-10, atol=1e-12)


def test_with_one_difference_type_two_is_bad_broyden():
    f = tanh_map()
    found = after(f, Anderson(1, ridge=0.0, min_angle=0.0, kind="II"), 6)
    torch.testing.assert_close(found, after(f, Broyden(1, kind="bad"), 6), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_restart_is_a_new_solve_that_knows_the_last_difference(kind):
    """Until the restart nothing differs; the step after it is that of a window of one."""
    f = tanh_map()
    plain = Anderson(8, kind=kind, ridge=0.0, min_angle=0.0)
    restarted = Anderson(8, kind=kind, ridge=0.0, min_angle=0.0, restart=3)
    for num_steps in (1, 2, 3, 4):
        assert torch.equal(after(f, plain, num_steps), after(f, restarted, num_steps))
    assert not torch.equal(after(f, plain, 5), after(f, restarted, 5))
    points = [after(f, restarted, k) for k in (3, 4)]
    images = [f(z) for z in points]
    residuals = [fz - z for fz, z in zip(images, points, strict=True)]
    change, test = residuals[1] - residuals[0], residuals[1] - residuals[0]
    test = test if kind == "II" else points[1] - points[0]
    gamma = (test * residuals[1]).sum(1, keepdim=True) / (test * change).sum(1, keepdim=True)
    wanted = images[1] - gamma * (images[1] - images[0])
    torch.testing.assert_close(after(f, restarted, 5), wanted, rtol=1e-9, atol=1e-11)


def test_a_window_longer_than_the_restart_changes_nothing():
    f = tanh_map()
    long, short = (after(f, Anderson(size, restart=3), 9) for size in (3, 20))
    assert torch.equal(long, short)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_safeguard_that_does_not_fire_changes_nothing(kind):
    f = tanh_map()
    plain, guarded = (
        after(f, Anderson(kind=kind, safeguard=s, fused=False), 9) for s in (None, 1e12)
    )
    assert torch.equal(plain, guarded)


def test_a_bad_step_is_answered_by_a_damped_one_from_the_best_iterate():
    """Watch the points: after the throw the next one lies halfway from the best to its image."""
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.clone())
        image = 1.0 + 0.9 * (z - 1.0).flip(1)
        return image if len(seen) != 4 else image + 100.0

    z0 = torch.tensor([[0.0, 0.5, 0.1]], dtype=torch.float64)
    after(f, Anderson(safeguard=10.0), 5, z0)
    clean = seen[:3]
    images = [1.0 + 0.9 * (z - 1.0).flip(1) for z in clean]
    best = min(range(3), key=lambda k: float((images[k] - clean[k]).norm()))
    torch.testing.assert_close(seen[4], 0.5 * (clean[best] + images[best]))


def test_the_damping_grows_until_the_best_improves():
    """Nothing but the start has a small residual: every step is half the last one."""
    seen: list[float] = []

    def f(z: Tensor) -> Tensor:
        seen.append(float(z))
        return z + 1.0 if seen[-1] == 0.0 else z + 1e3

    with torch.no_grad():
        z0 = torch.zeros(1, 1, dtype=torch.float64)
        solve(f, z0, solver=Anderson(safeguard=10.0), termination=FixedSteps(5))
    assert seen == [0.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


def test_the_samples_of_a_batch_fall_back_one_by_one():
    def f(z: Tensor) -> Tensor:
        flat = torch.tensor([[0.9], [-1.6]], dtype=torch.float64)
        return torch.where(z.abs() > 4.0, -7.0 * z, 1.0 + flat * z + 0.3 * torch.sin(9 * z))

    settings = {"termination": Residual(1e-6), "max_steps": 60, "on_failure": "ignore"}
    solver = Anderson(safeguard=2.0)
    with torch.no_grad():
        z0 = torch.zeros(2, 5, dtype=torch.float64) + torch.arange(5)
        guarded = solve(f, z0, solver=solver, **settings)
    # Whatever it finds, the guard has kept it from running away.
    assert bool((guarded.residual <= (f(z0) - z0).square().mean(1).sqrt()).all())
    assert bool((guarded.z.abs() < 10).all())


def test_all_kinds_beat_plain_iteration():
    f, settings = tanh_map(), {"termination": Residual(1e-8), "on_failure": "raise"}
    z0 = torch.zeros(3, 12, dtype=torch.float64)
    with torch.no_grad():
        plain = solve(f, z0, solver=Picard(), max_steps=500, **settings).num_evals
        for solver in (Anderson(kind="I"), Anderson(restart=6), Anderson(safeguard=10.0)):
            assert solve(f, z0, solver=solver, max_steps=500, **settings).num_evals < plain


@pytest.mark.parametrize("num_pushed", [4, 6, 8, 9])
def test_sines_are_those_of_the_columns_with_the_newer_ones(num_pushed):
    size, n = 6, min(num_pushed, 6)
    slots = torch.randn(3, 20, n, dtype=torch.float64)
    slots = slots / torch.linalg.vector_norm(slots, dim=1, keepdim=True)
    newest = (num_pushed - 1) % size
    order = [(newest - age) % size for age in range(n)]
    triangle = torch.linalg.qr(slots[:, :, order])[1]
    wanted = torch.empty(3, n, dtype=torch.float64)
    wanted[:, order] = triangle.diagonal(dim1=1, dim2=2).abs()
    torch.testing.assert_close(_sines(slots.mT @ slots, newest), wanted)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_differences_that_newer_ones_span_are_left_out(kind):
    """f moves in a plane only, so that no more than two differences can be independent."""
    matrix = torch.tensor([[0.5, -0.7], [0.6, 0.4]], dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.cat((torch.tanh(z[:, :2] @ matrix.mT + 1.0), torch.ones_like(z[:, 2:])), 1)

    solution = solve(
        f,
        torch.zeros(1, 12, dtype=torch.float64),
        solver=Anderson(5, kind=kind),
        termination=Residual(1e-12, 1e-12),
        on_failure="raise",
    )
    assert solution.num_evals < 15


def test_a_nearly_singular_map_wants_the_angles():
    """Chandrasekhar's H-equation at c = 0.9999: a few directions carry everything."""
    mu = (torch.arange(100).double() + 0.5) / 100
    kernel = 0.5 * 0.9999 * mu.unsqueeze(1) / (mu.unsqueeze(1) + mu) / 100

    def num_evals(solver: Anderson) -> int:
        return solve(
            lambda h: 1.0 / (1.0 - h @ kernel.mT),
            torch.ones(1, 100, dtype=torch.float64),
            solver=solver,
            termination=Residual(1e-6, 0.0),
            max_steps=100,
            on_failure="raise",
        ).num_evals

    assert num_evals(Anderson()) <= 20
    assert num_evals(Anderson(min_angle=0.0)) > 30


@pytest.mark.parametrize("kind", ["I", "II"])
def test_no_limit_keeps_every_difference(kind):
    f = tanh_map()
    wanted = after(f, Anderson(9, kind=kind), 9)
    torch.testing.assert_close(after(f, Anderson(None, kind=kind), 9), wanted, rtol=0.0, atol=0.0)
    assert bool((after(f, Anderson(2, kind=kind), 9) != wanted).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_size": 0}, "history_size=0"),
        ({"min_angle": -0.1}, "min_angle=-0.1"),
        ({"min_angle": 1.0}, "min_angle=1.0"),
        ({"min_angle": math.nan}, "min_angle=nan"),
        ({"kind": "2"}, "kind='2' of Anderson is not one of 'II', 'I'"),
        ({"restart": 0}, "restart=0"),
        ({"restart": 2.5}, "restart=2.5"),
        ({"safeguard": 0.5}, "safeguard=0.5 would undo"),
        ({"safeguard": math.nan}, "safeguard=nan"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        Anderson(**options)


# --- the small system, by scripted iterates ----------------------------------------------------


def proposals(solver: Anderson, points: Tensor, images: Tensor) -> Tensor:
    """What the solver proposes last, shown points (K, D) and images (K, D) one after the other."""
    iterates = [
        Iterate(z.unsqueeze(0), fz.unsqueeze(0)) for z, fz in zip(points, images, strict=True)
    ]
    state = solver.init(iterates[0], len(iterates))
    for iterate in iterates:
        z, state = solver.propose(iterate, state)
    return z.squeeze(0)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_ridge_is_relative_to_each_column(kind):
    points, images = torch.randn(2, 2, 5, dtype=torch.float64)
    points = 1e-6 * points
    s, f, r = points[1] - points[0], images[1] - images[0], images[1] - points[1]
    test = s if kind == "I" else f - s
    # on a contraction (f - s) points against s, so the ridge of type I is subtracted
    sign = -1.0 if kind == "I" else 1.0
    gamma = (test @ r) / (test @ (f - s) + sign * 0.5 * (test @ test))
    found = proposals(Anderson(kind=kind, ridge=0.5), points, images)
    torch.testing.assert_close(found, images[1] - gamma * f)


@pytest.mark.parametrize("num_steps", [3, 5, 6, 9])
def test_differences_in_the_span_of_newer_ones_are_left_out(num_steps):
    """Against a greedy choice from the newest to the oldest, also when the window has slid."""
    min_angle, history_size = 0.6, 4
    draw = torch.Generator().manual_seed(num_steps)
    points, images = torch.randn(2, num_steps, 6, dtype=torch.float64, generator=draw)
    residuals = images - points
    kept: list[int] = []
    basis = torch.zeros(6, 0, dtype=torch.float64)
    for k in range(num_steps - 1, max(0, num_steps - 1 - history_size), -1):
        unit = torch.nn.functional.normalize(residuals[k] - residuals[k - 1], dim=0)
        rest = unit - basis @ (basis.mT @ unit)
        # the span of all newer ones, whether these are left out themselves or not
        if rest.norm() >= min_angle:
            kept.append(k)
        basis = torch.linalg.qr(torch.cat([basis, unit.unsqueeze(1)], 1))[0]
    assert 0 < len(kept) <= min(history_size, num_steps - 1)
    columns = torch.stack([residuals[k] - residuals[k - 1] for k in kept], 1)
    gamma = torch.linalg.lstsq(columns, residuals[-1].unsqueeze(1)).solution.squeeze(1)
    moved = torch.stack([images[k] - images[k - 1] for k in kept], 1)
    solver = Anderson(history_size, kind="II", ridge=0.0, min_angle=min_angle)
    torch.testing.assert_close(proposals(solver, points, images), images[-1] - moved @ gamma)


def test_a_singular_system_gives_the_plain_step():
    """Not what can be solved of it: the other weights mean nothing without the missing ones."""
    residuals = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [3.0, 2.0]], dtype=torch.float64)
    solver = Anderson(3, kind="II", ridge=0.0, min_angle=0.0)
    found = proposals(solver, torch.zeros_like(residuals), residuals)
    assert torch.equal(found, residuals[-1])
