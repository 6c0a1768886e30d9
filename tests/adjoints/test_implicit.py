"""The implicit gradient against dense linear algebra, and everything a training loop does to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from equilibria import (
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Fallback,
    FixedPoint,
    Implicit,
    NeumannSeries,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    Shine,
    Status,
    Unrolled,
    UserError,
    solve,
)
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.neumann import Neumann

FORWARD = [Picard(), Anderson(), Broyden()]
BACKWARD = [
    *FORWARD,
    Reversible(reconstruction_tolerance=None),
    GMRES(),
    GMRES(restart=4),
    FixedPoint(Anderson(history_size=8)),
]


class Sensitivities:
    """A map that depends on a module, an input, a closure leaf and a computed closure tensor."""

    def __init__(self, x: Tensor, width: int = 5) -> None:
        self.linear = nn.Linear(width, width, dtype=x.dtype)
        with torch.no_grad():
            self.linear.weight.mul_(0.8 / torch.linalg.matrix_norm(self.linear.weight, 2))
        self.x = x.clone().requires_grad_()
        self.leaf = torch.randn(x.shape[1], width, dtype=x.dtype, requires_grad=True)
        self.log_gain = torch.tensor([-3.0, -1.0, -0.1, 0.0], dtype=x.dtype, requires_grad=True)
        self.gain = self.log_gain.exp().unsqueeze(1)  # not a leaf; one difficulty per sample
        self.z0 = torch.zeros(len(x), width, dtype=x.dtype)
        self.inputs = [*self.linear.parameters(), self.x, self.leaf, self.log_gain]

    def __call__(self, z: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.linear(z) + self.x @ self.leaf)


@pytest.mark.parametrize("backward", BACKWARD, ids=repr)
@pytest.mark.parametrize("forward", FORWARD, ids=repr)
def test_every_pair_of_solvers_gives_the_dense_gradient(
    forward, backward, x, tight, dense, relative_error
):
    f = Sensitivities(x)
    adjoint = Implicit(backward, rtol=1e-12, max_steps=300)
    solution = solve(f, f.z0, solver=forward, **(tight | {"adjoint": adjoint}))
    cotangent = torch.randn_like(solution.z)
    wanted = dense(f, solution.z, cotangent, f.inputs)
    found = torch.autograd.grad(solution.z, f.inputs, cotangent)
    assert relative_error(found, wanted) < 1e-9
    assert bool((solution.num_steps != solution.num_steps[0]).any())  # difficulties do differ


def test_default_tolerances_are_good_enough_for_training(x, dense, relative_error):
    f = Sensitivities(x.float())
    solution = solve(f, f.z0, on_failure="raise")
    cotangent = torch.randn_like(solution.z)
    wanted = dense(f, solution.z, cotangent, f.inputs)
    assert relative_error(torch.autograd.grad(solution.z, f.inputs, cotangent), wanted) < 1e-3


@pytest.mark.parametrize("backward", [Anderson(), Broyden(), GMRES()], ids=repr)
def test_a_spectral_radius_above_one(backward, tight, dense, relative_error):
    """The fixed point of an expansive map is as differentiable as any other."""
    weight = torch.tensor([[-3.0, 1.0], [0.0, -2.0]], dtype=torch.float64, requires_grad=True)
    constant = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight) + constant

    settings = tight | {"adjoint": Implicit(backward, rtol=1e-12, max_steps=300)}
    solution = solve(f, torch.zeros(3, 2, dtype=torch.float64), solver=Broyden(), **settings)
    cotangent = torch.randn_like(solution.z)
    wanted = dense(f, solution.z, cotangent, [weight, constant])
    found = torch.autograd.grad(solution.z, [weight, constant], cotangent)
    assert relative_error(found, wanted) < 1e-9


def test_a_tree_of_states(tight, dense, relative_error):
    weight = 0.2 * torch.randn(8, 8, dtype=torch.float64)
    weight.requires_grad_()
    bias = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def flat(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight) + bias

    def unflatten(z: Tensor) -> dict[str, object]:
        return {"a": z[:, :2], "rest": [z[:, 2:6].reshape(3, 2, 2), (z[:, 6:],)]}

    def flatten(tree: dict[str, object]) -> Tensor:
        b, (c,) = tree["rest"]
        return torch.cat([tree["a"], b.flatten(1), c], dim=1)

    z0 = unflatten(torch.zeros(3, 8, dtype=torch.float64))
    solution = solve(lambda z: unflatten(flat(flatten(z))), z0, **tight)
    z = flatten(solution.z)
    cotangent = torch.randn_like(z)
    wanted = dense(flat, z, cotangent, [weight, bias])
    assert relative_error(torch.autograd.grad(z, [weight, bias], cotangent), wanted) < 1e-9


def test_only_one_leaf_of_a_tree_in_the_loss(tight):
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = {"used": torch.zeros(2, 1, dtype=torch.float64), "free": torch.zeros(2, 3).double()}
    solution = solve(
        lambda z: {"used": weight * z["used"] + 1.0, "free": 0.5 * z["free"] + weight}, z0, **tight
    )
    solution.z["used"].sum().backward()
    assert weight.grad.item() == pytest.approx(2 * 1 / 0.5**2)  # z* = 1 / (1 - w)


@pytest.mark.parametrize("forward", FORWARD, ids=repr)
def test_gradcheck(forward, make_deq, x):
    deq = make_deq(solver=forward)
    parameters = dict(deq.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return functional_call(deq, named, (x,)).z

    assert gradcheck(run, (x.requires_grad_(), *parameters.values()))


def test_one_layer_twice_in_one_graph(make_deq, x):
    deq = make_deq()
    assert gradcheck(lambda x: deq(deq(x).z[:, :3]).z + deq(2 * x).z, x.requires_grad_())


def test_backward_twice_over_a_retained_graph(make_deq, x):
    deq = make_deq()
    loss = deq(x).z.square().sum()
    loss.backward(retain_graph=True)
    first = deq.cell.recurrent.weight.grad.clone()
    loss.backward()
    assert torch.equal(deq.cell.recurrent.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_evaluation_mode_has_the_same_gradient(make_deq, x):
    deq = make_deq()
    gradients = []
    for mode in (True, False):
        loss = deq.train(mode)(x).z.square().sum()
        gradients.append(torch.autograd.grad(loss, list(deq.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backward", [Picard(), Anderson(), Broyden(), GMRES()], ids=repr)
def test_the_scale_of_the_loss_changes_nothing(backward, dtype, make_deq, x):
    """At a loose tolerance too: a power of two only shifts exponents, so the bits agree."""
    deq = make_deq(termination=Residual(1e-5), adjoint=Implicit(backward, rtol=1e-3))
    deq, x = deq.to(dtype), x.to(dtype)
    loss = deq(x).z.square().sum()
    plain = torch.autograd.grad(loss, list(deq.parameters()), retain_graph=True)
    scaled = torch.autograd.grad(2.0**-20 * loss, list(deq.parameters()))
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(2.0**-20 * a, b)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6, 1e-8])
def test_a_tighter_backward_tolerance_is_a_better_gradient(rtol, x, tight, dense, relative_error):
    f = Sensitivities(x)
    solution = solve(f, f.z0, **(tight | {"adjoint": Implicit(rtol=rtol)}))
    wanted = dense(f, solution.z, torch.ones_like(solution.z), f.inputs)
    found = torch.autograd.grad(solution.z.sum(), f.inputs)
    assert relative_error(found, wanted) < 10 * rtol
    assert bool((solution.backward.result.relative_residual <= rtol).all())


def test_z0_gets_no_gradient(make_deq, x):
    z0 = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    deq = make_deq()
    deq(x, z0=z0).z.sum().backward()
    assert z0.grad is None or not z0.grad.any()
    assert deq.cell.recurrent.weight.grad.any()


def test_z0_at_the_solution_still_gives_the_gradient(make_deq, x):
    deq = make_deq()
    deq(x).z.sum().backward()
    wanted = deq.cell.recurrent.weight.grad.clone()
    deq.zero_grad()
    again = deq(x, z0=deq(x).z.requires_grad_())
    assert again.num_steps.tolist() == [0] * 4
    again.z.sum().backward()
    torch.testing.assert_close(deq.cell.recurrent.weight.grad, wanted, rtol=1e-9, atol=0.0)


def test_a_map_that_ignores_z(tight):
    constant = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    solution = solve(lambda z: 2 * constant, torch.zeros(2, 3, dtype=torch.float64), **tight)
    solution.z.sum().backward()
    assert torch.equal(constant.grad, torch.full((2, 3), 2.0, dtype=torch.float64))


def test_a_map_without_parameters_has_no_graph():
    assert not solve(lambda z: torch.zeros_like(z), torch.ones(2, 3)).z.requires_grad


def test_samples_outside_the_loss_cost_no_accuracy(make_deq, x):
    deq = make_deq()
    deq(x).z[1].sum().backward()
    together = deq.cell.recurrent.weight.grad.clone()
    deq.zero_grad()
    deq(x[1:2]).z.sum().backward()
    torch.testing.assert_close(together, deq.cell.recurrent.weight.grad, rtol=1e-10, atol=0.0)


def test_writing_into_the_output_does_not_corrupt_the_gradient(make_deq, x):
    deq = make_deq()
    wanted = torch.autograd.grad(deq(x).z.sum(), list(deq.parameters()))
    z = deq(x).z
    z.mul_(2.0)
    found = torch.autograd.grad(z.sum(), list(deq.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-10, atol=0.0)


def test_a_nan_sample_leaves_the_gradients_of_the_others_alone(make_deq, x):
    deq = make_deq(on_failure="ignore")
    clean = x.clone().requires_grad_()
    deq(clean).z.sum().backward()
    spoilt = x.clone()
    spoilt[2] = torch.nan
    spoilt.requires_grad_()
    deq(spoilt).z.sum().backward()
    others = [0, 1, 3]
    assert torch.equal(spoilt.grad[others], clean.grad[others])


def test_half_precision_states_get_a_gradient_near_the_exact_one(x, dense, relative_error):
    f = Sensitivities(x)
    z0 = f.z0.bfloat16()
    solution = solve(
        lambda z: f(z.double()).bfloat16(), z0, termination=Residual(2e-2), on_failure="raise"
    )
    wanted = dense(f, solution.z.double(), torch.ones_like(f.z0), f.inputs)
    found = torch.autograd.grad(solution.z.sum(), f.inputs)
    assert relative_error(found, wanted) < 0.05


# The backward solve reports like the forward one.


def expansive_solve(**settings):
    """A map whose transposed Jacobian has radius 3: Picard cannot solve the backward system."""
    weight = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    adjoint = Implicit(Picard(), rtol=1e-10, max_steps=4)
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    return solve(lambda z: weight * z + 1, z0, solver=Broyden(), adjoint=adjoint, **settings)


def test_a_failed_backward_solve_is_reported():
    solution = expansive_solve(on_failure="ignore", trace=True)
    assert bool(solution.converged.all())
    assert solution.backward.result is None
    solution.z.sum().backward()
    report = solution.backward.result
    assert report.status.tolist() == [Status.MAX_STEPS] * 2
    assert report.num_steps.tolist() == [4, 4]
    assert report.num_evals == 5
    assert report.trace.shape == (5, 2)
    # the reported residual belongs to the returned u: u = -3 u + 1
    torch.testing.assert_close(
        report.residual, (1 - 4 * report.u).square().mean(1).sqrt(), rtol=1e-12, atol=0.0
    )


def test_a_failed_backward_solve_warns_or_raises():
    with pytest.warns(ConvergenceWarning, match="the backward solve"):
        expansive_solve().z.sum().backward()
    with pytest.raises(ConvergenceError, match=r"the backward solve.*2 MAX_STEPS"):
        expansive_solve(on_failure="raise").z.sum().backward()


def test_the_report_adds_up_the_time_of_several_backward_passes(make_deq, x):
    solution = make_deq()(x)
    loss = solution.z.square().sum()
    loss.backward(retain_graph=True)
    once = solution.backward.seconds
    loss.backward()
    assert solution.backward.seconds > once > 0


def test_an_infinite_derivative_is_reported():
    weight = torch.tensor(0.5, requires_grad=True)
    solution = solve(lambda z: weight * z.sqrt(), torch.zeros(2, 3), on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"the backward solve.*2 NONFINITE"):
        solution.z.sum().backward()


EVERY = [Implicit(), OneStep(), Phantom(), NeumannSeries(), Shine(), Unrolled()]


@pytest.mark.parametrize("adjoint", EVERY, ids=repr)
@pytest.mark.parametrize(
    "used",
    [torch.Tensor.detach, torch.zeros_like, lambda w: torch.zeros(w.shape, dtype=w.dtype)],
    ids=["detach", "zeros_like", "shape"],
)
def test_tensors_that_f_only_looks_at_give_no_graph(adjoint, used):
    weight = (0.1 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    x, zero = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)

    def solved(x):
        return solve(
            lambda z: torch.tanh(z @ used(weight) + x), zero, solver=Broyden(), adjoint=adjoint
        ).z

    assert not solved(x).requires_grad
    z = solved(x.requires_grad_())
    gradient, none = torch.autograd.grad(z.sum(), (x, weight), allow_unused=True)
    assert gradient.abs().sum() > 0
    assert none is None


@pytest.mark.parametrize(
    ("solver", "status"),
    [
        (BiCGStab(), Status.STALLED),
        (GMRES(restart=1), Status.STALLED),
        (GMRES(), Status.MAX_STEPS),
    ],
    ids=repr,
)
def test_a_backward_solve_that_gets_nowhere_leaves_the_one_step_gradient(solver, status):
    """I - J turns by a right angle: one product with b says nothing about the solution."""
    matrix = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    c = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    adjoint = Implicit(solver, max_steps=1 if solver == GMRES() else 50)
    solution = solve(
        lambda z: z @ matrix + c, torch.zeros(2, 2).double(), adjoint=adjoint, on_failure="ignore"
    )
    g = torch.randn(2, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(solution.z, c, g)
    assert torch.equal(gradient, g)
    report = solution.backward.result
    assert report.status.tolist() == [status] * 2
    torch.testing.assert_close(report.relative_residual, torch.full((2,), 2.0).double().sqrt())


@pytest.mark.parametrize("solver", [GMRES(), BiCGStab(), Neumann(), Anderson()], ids=repr)
def test_a_tolerance_that_zero_would_meet_gives_no_gradient_of_zero(solver):
    c = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    solution = solve(
        lambda z: 0.5 * torch.tanh(z) + c, torch.zeros_like(c), adjoint=Implicit(solver, atol=1e3)
    )
    (gradient,) = torch.autograd.grad(solution.z.sum(), c)
    assert ((gradient > 0.9) & (gradient < 2.1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": Broyden}, "neither a fixed-point solver nor a linear"),
        ({"solver": "broyden"}, "neither a fixed-point solver nor a linear"),
        ({"solver": Reversible()}, "Implicit.*undone.*reconstruction_tolerance=None.*GMRES"),
        ({"solver": Fallback(Anderson(), Reversible())}, "Implicit.*reconstruction_tolerance"),
        ({"solver": FixedPoint(Reversible()), "max_steps": 5}, "reconstruction_tolerance"),
        ({"rtol": -1e-3}, "rtol=-0.001"),
        ({"atol": float("nan")}, "atol=nan"),
        ({"rtol": 0.0}, "both 0"),
        ({"rtol": 1.0}, "rtol=1.0 .*gradient of zero.*less than 1"),
        ({"max_steps": 2.5}, "max_steps=2.5"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Implicit(**arguments)


def test_an_absolute_tolerance_is_in_the_unit_of_the_cotangent():
    """The solve is of cotangents scaled to one, and its tolerance scales with them."""
    weight = (0.9 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]).requires_grad_()
    x, g = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)

    def num_steps(scale: float) -> list[int]:
        solution = solve(
            lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x),
            adjoint=Implicit(rtol=1e-12, atol=1e-3 * scale), termination=Residual(1e-10),
        )  # fmt: skip
        solution.z.backward(scale * g)
        assert solution.backward.result is not None
        return solution.backward.result.num_steps.tolist()

    assert num_steps(2.0**-20) == num_steps(1.0) == num_steps(2.0**20)
