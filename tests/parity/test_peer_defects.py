"""What other libraries get wrong, one test for each: here it is right.

The defects were reproduced on the libraries themselves, or read in their sources; these tests do
not import them, `test_torchdeq_defects.py` does. The names say whose defect it is and what was
wrong.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from equilibria import (
    DEQ,
    GMRES,
    Anderson,
    AnyOf,
    BiCGStab,
    Broyden,
    Cell,
    ConvergenceError,
    ConvergenceWarning,
    FixedPoint,
    FixedSteps,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Residual,
    SolveSettings,
    Stagnation,
    Status,
    Unrolled,
    UserError,
    solve,
)
from equilibria.core.state import StateError
from equilibria.diagnostics.spectrum import spectrum
from equilibria.layers.variational_dropout import VariationalDropout, VariationalDropout1d
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.normalizations.spectral_norm import spectral_norm
from equilibria.normalizations.weight_norm import weight_norm
from equilibria.tasks.generation import SamplingConfig, generate
from equilibria.testing import Recorder, Spoiled, implicit_gradients, problem
from equilibria.testing.dense import relative_error

TIGHT: dict[str, Any] = {
    "termination": Residual(1e-12, 1e-12),
    "adjoint": Implicit(rtol=1e-12, max_steps=200),
    "max_steps": 200,
    "on_failure": "raise",
}


class Tanh(Cell):
    """The textbook cell; `scale` is the norm of its recurrent weight."""

    def __init__(self, width: int = 6, scale: float = 0.8) -> None:
        super().__init__()
        self.recurrent, self.input = nn.Linear(width, width), nn.Linear(3, width)
        with torch.no_grad():
            weight = self.recurrent.weight
            weight.mul_(scale / torch.linalg.matrix_norm(weight, 2))

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injection)


@pytest.fixture
def deq() -> DEQ:
    return DEQ(Tanh(), **TIGHT).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64)


def rms(x: Tensor) -> Tensor:
    return x.detach().square().flatten(1).mean(1).sqrt()


def expect_dense_gradients(live: Any, solution: Any, accuracy: float = 1e-7) -> None:
    g = torch.randn_like(solution.z)
    found = torch.autograd.grad(solution.z, live.sources, g)
    wanted = implicit_gradients(live.f, solution.z, g, live.sources)
    assert relative_error(found, wanted) < accuracy


# --- torchdeq ----------------------------------------------------------------------------------


def test_torchdeq_second_derivatives_through_the_implicit_gradient_are_wrong(
    deq: DEQ, x: Tensor
) -> None:
    """Relative error 1.39 there. Here the Hessian is that of the unrolled loop."""

    def unrolled(x: Tensor) -> Tensor:
        injection = deq.cell.inject(x)
        z = torch.zeros_like(injection)
        for _ in range(200):
            z = deq.cell(z, injection)
        return z

    def hessian(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x[:1])

    torch.testing.assert_close(hessian(lambda x: deq(x).z), hessian(unrolled), rtol=1e-8, atol=1e-9)


def test_torchdeq_intermediate_states_lose_z_star_when_the_solve_ends_early(
    deq: DEQ, x: Tensor
) -> None:
    """With `core='indexing'` there. Here the last of the states is z*, with its exact gradient."""
    plain = deq(x)
    solution = deq(x, states=[1, 2, 150])
    assert int(solution.num_steps.max()) < 150
    assert torch.equal(solution.states[-1], solution.z)
    found = torch.autograd.grad(solution.states[-1].sum(), list(deq.parameters()))
    wanted = torch.autograd.grad(plain.z.sum(), list(deq.parameters()))
    assert relative_error(found, wanted) < 1e-12


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_torchdeq_a_nan_destroys_the_best_iterate_of_its_sample(solver: Any) -> None:
    easy = problem("tanh")
    seen = Recorder(Spoiled(easy.f, row=1, from_call=3))
    solution = solve(seen, easy.z0, solver=solver, on_failure="ignore")
    tried = [rms(easy.f(z) - z)[1] for z in seen.points[:3]]
    assert solution.status[1] == Status.NONFINITE
    assert torch.isclose(rms(easy.f(solution.z) - solution.z)[1], min(tried))


def test_torchdeq_damped_picard_reports_the_damped_residual() -> None:
    """9.8e-3 for a true .965 there."""
    easy = problem("tanh")
    solution = solve(
        easy.f, easy.z0, solver=Picard(relaxation=0.01), max_steps=1, on_failure="ignore"
    )
    torch.testing.assert_close(solution.residual, rms(easy.f(solution.z) - solution.z))


def test_torchdeq_the_power_method_finds_radius_zero_for_a_rotation() -> None:
    turn = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    found = spectrum(lambda z: z @ turn.T, torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(found.radius, torch.full((2,), 0.9, dtype=torch.float64))


def test_torchdeq_hooks_recurse_when_a_layer_is_used_twice(deq: DEQ, x: Tensor) -> None:
    once, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    deq(deq(once).z[:, :3]).z.sum().backward()
    middle = deq(again).z[:, :3]
    cut = middle.detach().requires_grad_()
    (outer,) = torch.autograd.grad(deq(cut).z.sum(), cut)
    middle.backward(outer)
    torch.testing.assert_close(once.grad, again.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "backward",
    [Picard(), Anderson(), Broyden(), GMRES(), BiCGStab(), Neumann(), FixedPoint(Broyden())],
    ids=repr,
)
def test_torchdeq_a_backward_solver_of_its_own_list_raises(backward: Any) -> None:
    """`b_solver='simple_fixed_point_iter'` there."""
    live = problem("tanh").differentiable()
    adjoint = Implicit(backward, rtol=1e-11, max_steps=300)
    solution = solve(live.f, live.z0, **(TIGHT | {"adjoint": adjoint}))
    expect_dense_gradients(live, solution)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchdeq_dropout_masks_are_float32_on_the_cpu(dtype: torch.dtype) -> None:
    layer = VariationalDropout1d()
    assert layer(torch.ones(2, 3, 4, dtype=dtype)).dtype == dtype
    assert layer(torch.ones(2, 3, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("history_size", [1, 5])
@pytest.mark.parametrize("max_steps", [1, 2, 30])
def test_torchdeq_anderson_fails_on_bf16_on_one_vector_and_on_few_steps(
    history_size: int, max_steps: int
) -> None:
    """There: an error for bf16 and m = 1, and z0 back for max_iter <= 2."""
    easy = problem("half_precision", dtype=torch.bfloat16)
    solution = solve(
        easy.f,
        easy.z0,
        solver=Anderson(history_size=history_size),
        termination=Residual(1e-2),
        max_steps=max_steps,
        on_failure="ignore",
    )
    assert solution.z.dtype == torch.bfloat16
    before = rms(easy.f(easy.z0) - easy.z0)
    assert bool((rms(easy.f(solution.z) - solution.z) < before)[before > 0].all())
    assert bool(solution.converged.all()) or max_steps < 30


def test_torchdeq_unknown_options_are_ignored_and_settings_changed_by_a_call(x: Tensor) -> None:
    with pytest.raises(UserError, match="'max_iter'; that is max_steps=50 here"):
        DEQ(Tanh(), max_iter=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="'history'; did you mean 'history_size'"):
        Anderson(history=3)  # type: ignore[call-arg]
    layer, settings = DEQ(Tanh()).double(), SolveSettings(max_steps=7, on_failure="ignore")
    before = pickle.dumps((settings, layer.train_settings))
    layer(x, settings=settings)
    assert pickle.dumps((settings, layer.train_settings)) == before
    with pytest.raises(AttributeError):
        settings.max_steps = 8  # type: ignore[misc]


@pytest.mark.parametrize("normalise", [weight_norm, spectral_norm])
def test_torchdeq_normalised_modules_cannot_be_copied_and_need_a_reset(
    normalise: Callable[[nn.Module], list[str]], deq: DEQ, x: Tensor
) -> None:
    """There deepcopy fails, so no moving average, and a forgotten reset crashes."""
    normalise(deq.cell)
    deq.eval()
    for _ in range(2):  # without a reset in between
        deq(x).z.sum().backward()
    twin = copy.deepcopy(deq)
    average = torch.optim.swa_utils.AveragedModel(deq)
    average.update_parameters(deq)
    for other in (twin, average):
        torch.testing.assert_close(other(x).z, deq(x).z, rtol=1e-9, atol=1e-9)
    gradients = [parameter.grad for parameter in deq.cell.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_torchdeq_norms_skip_subclasses_and_the_inprojections_of_attention() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"special": Special(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    names = weight_norm(model)
    assert {"special.weight", "attention.in_proj_weight"} <= set(names)


def test_torchdeq_nested_and_dict_states_fail() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, 3, dtype=torch.float64)

    def f(z: dict[str, Any]) -> dict[str, Any]:
        return {"a": weight * z["a"] + 1.0, "b": [(weight * z["b"][0][0] + z["a"][:, 0],)]}

    solution = solve(f, {"a": zeros, "b": [(zeros[:, 0],)]}, **TIGHT)
    torch.testing.assert_close(solution.z["b"][0][0], torch.full((2,), 4.0, dtype=torch.float64))
    solution.z["b"][0][0].sum().backward()  # b = 1 / (1 - w)^2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor(2 * 2 / 0.5**3, dtype=torch.float64))


def test_torchdeq_no_func_grad_vmap_or_jvp(deq: DEQ, x: Tensor) -> None:
    def loss(x: Tensor) -> Tensor:
        return deq(x.unsqueeze(0)).z.square().sum()

    live = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(deq(live).z.square().sum(), live)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript
        value, change = torch.func.jvp(lambda x: deq(x).z.square().sum(), (x,), (x,))
    torch.testing.assert_close(value, deq(x).z.square().sum())
    torch.testing.assert_close(change, (wanted * x).sum())


def test_torchdeq_the_default_gradient_is_one_step_and_the_default_stop_absolute(
    x: Tensor,
) -> None:
    layer = DEQ(Tanh()).double()
    assert layer.settings.adjoint.exact
    live = problem("tanh").differentiable()
    expect_dense_gradients(live, solve(live.f, live.z0), accuracy=1e-2)
    tiny = problem("tanh")
    small = solve(lambda z: 1e-9 * tiny.f(1e9 * z), tiny.z0)
    large = solve(tiny.f, tiny.z0)
    torch.testing.assert_close(1e9 * small.z, large.z, rtol=1e-6, atol=1e-9)


# --- torchdeq, passes that do not agree --------------------------------------------------------


@pytest.mark.parametrize("backward", [GMRES(), BiCGStab(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_torchdeq_gradients_depend_on_the_scale_of_the_loss(backward: Any, scale: float) -> None:
    """The backward tolerance is absolute there: an error of 3e-2 for a loss scaled by 1e-6."""
    live = problem("tanh").differentiable()
    solution = solve(live.f, live.z0, **(TIGHT | {"adjoint": Implicit(backward, rtol=1e-6)}))
    g = torch.randn_like(solution.z)
    wanted = implicit_gradients(live.f, solution.z, g, live.sources)
    found = torch.autograd.grad(solution.z, live.sources, scale * g)
    assert relative_error([t / scale for t in found], wanted) < 1e-4


def test_torchdeq_andersons_ridge_is_absolute() -> None:
    """With |b| = 1e-4 the peer makes 400 evaluations in vain where a scaled ridge needs 69."""
    hard = problem("stiff")
    c = 1e-4 * hard.inputs[1] / hard.inputs[1].norm()
    solution = solve(
        lambda z: hard.map(z, hard.inputs[0], c),
        hard.z0,
        termination=Residual(1e-6, 0.0),
        max_steps=69,
        on_failure="ignore",
    )
    assert bool(solution.converged.all())
    assert solution.num_evals <= 70


@pytest.mark.parametrize("backward", [GMRES(), BiCGStab(), Anderson(), Broyden()], ids=repr)
def test_torchdeq_mean_reduced_losses_get_poor_gradients(backward: Any) -> None:
    """A mean over a large batch makes each cotangent small, which an absolute tolerance accepts."""
    live = problem("tanh").differentiable()
    solution = solve(live.f, live.z0, **(TIGHT | {"adjoint": Implicit(backward, rtol=1e-6)}))
    rows = 2**20  # as if the samples were a few of so many
    mean = torch.autograd.grad(
        solution.z.sum() / rows, live.sources, retain_graph=True, materialize_grads=True
    )
    total = torch.autograd.grad(solution.z.sum(), live.sources)
    assert all(torch.equal(rows * a, b) for a, b in zip(mean, total, strict=True))


def test_torchdeq_a_compiled_solve_breaks_into_many_graphs(x: Tensor) -> None:
    """10 to 22 breaks there, none here; `tests/interplay` has the rest."""
    layer = DEQ(Tanh(), termination=FixedSteps(3)).double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        z = torch.compile(lambda x: layer(x).z, backend=counter, fullgraph=True)(x)
        torch.testing.assert_close(z, layer(x).z)
    assert counter.frame_count == 1


def test_torchdeq_autocast_is_on_in_the_forward_pass_and_off_in_the_backward() -> None:
    """f in bfloat16 forward and in float32 backward is two functions; here it is one.

    Nor does autocast reach the solvers: their own products stay in the precision of the state.
    """
    layer, seen = nn.Linear(4, 4), []
    with torch.no_grad():
        layer.weight.mul_(0.5)
    shift = torch.randn(2, 4, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), z.dtype, layer(z).dtype))
        return torch.tanh(layer(z) + shift)

    def run(adjoint: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return solve(f, torch.zeros(2, 4), adjoint=adjoint, on_failure="ignore")

    gradients = []
    for adjoint in (Implicit(), Unrolled(checkpoint=True), Phantom()):
        solution = run(adjoint)
        solution.z.sum().backward()
        gradients.append(shift.grad)
        shift.grad = None
    solution = run(Implicit())
    with torch.autocast("cpu", torch.bfloat16):  # a backward pass inside the block changes nothing
        solution.z.sum().backward()
    torch.testing.assert_close(shift.grad, gradients[0])
    assert solution.backward.result is not None
    assert solution.backward.result.u.dtype == torch.float32
    (first,) = torch.autograd.grad(run(Implicit()).z.square().sum(), shift, create_graph=True)
    first.sum().backward()
    assert set(seen) == {(True, torch.float32, torch.bfloat16)}


class Noisy(Tanh):
    """Dropout and batch statistics where they do not belong: inside the map."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = VariationalDropout(0.5), nn.BatchNorm1d(6)
        self.num_calls, self.masks = 0, []

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        self.num_calls += 1
        kept = self.dropout(torch.ones_like(z))
        self.masks.append(kept.detach())
        return 0.5 * kept * super().forward(z, injection)


def test_torchdeq_f_runs_again_in_the_backward_with_new_masks_and_statistics(x: Tensor) -> None:
    """J and df/dtheta belong to two functions there. Here the backward never calls f."""
    layer = DEQ(Noisy(), **TIGHT).double()
    solution = layer(x)
    assert isinstance(layer.cell, Noisy)
    assert solution.num_evals == layer.cell.num_calls
    assert all(torch.equal(mask, layer.cell.masks[0]) for mask in layer.cell.masks)
    state = torch.get_rng_state()
    solution.z.sum().backward()
    assert layer.cell.num_calls == solution.num_evals
    assert torch.equal(torch.get_rng_state(), state)
    layer(x)
    assert not torch.equal(layer.cell.masks[-1], layer.cell.masks[0])  # a new one per solve


def test_torchdeq_batch_statistics_are_updated_once_more_by_the_backward_pass() -> None:
    norm = nn.BatchNorm1d(3)
    shift = torch.randn(8, 3)
    solution = solve(
        lambda z: 0.3 * norm(z + shift), torch.zeros(8, 3), termination=Residual(1e-3, 1e-3)
    )
    updates = int(norm.num_batches_tracked)
    solution.z.sum().backward()
    assert int(norm.num_batches_tracked) == updates == solution.num_evals


def test_torchdeq_writing_to_z_star_in_place_corrupts_the_gradient_silently(
    deq: DEQ, x: Tensor
) -> None:
    parameters = list(deq.parameters())
    wanted = torch.autograd.grad(deq(x).z.sum(), parameters)
    z = deq(x).z
    z.mul_(3.0)
    found = torch.autograd.grad(z.sum(), parameters)
    assert relative_error(found, [3.0 * gradient for gradient in wanted]) < 1e-9
    z = deq(x).z
    with torch.no_grad():
        z.mul_(3.0)  # unknown to autograd, so a second derivative cannot be right
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), parameters, create_graph=True)


@pytest.mark.parametrize("backward", [Picard(), Neumann()], ids=repr)
def test_torchdeq_a_backward_solve_on_radius_1_3_fails_silently(backward: Any) -> None:
    """Gradient error 1 with Picard, 2e-2 with Anderson there, and no word about it."""
    turn = torch.tensor([[0.0, -1.3], [1.3, 0.0]], dtype=torch.float64)
    c = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return z @ turn.T + c

    def run(adjoint: Implicit, **settings: Any) -> Any:
        zeros = torch.zeros(3, 2, dtype=torch.float64)
        return solve(f, zeros, **(TIGHT | {"adjoint": adjoint, "solver": Broyden()} | settings))

    with pytest.raises(ConvergenceError, match="the backward solve"):
        run(Implicit(backward)).z.sum().backward()
    with pytest.warns(ConvergenceWarning, match="the backward solve"):
        run(Implicit(backward), on_failure="warn").z.sum().backward()
    for right in (GMRES(), Anderson(), Broyden()):
        z = run(Implicit(right, rtol=1e-10, max_steps=100)).z
        g = torch.ones_like(z)
        found = torch.autograd.grad(z, c, g)
        assert relative_error(found, implicit_gradients(f, z, g, [c])) < 1e-8


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_torchdeq_limited_memory_broyden_turns_to_nan_when_its_memory_is_full(kind: Any) -> None:
    """One factor of a product chain is overwritten there: NaN by step 31 with memory 10."""
    for name in ("convolution", "attention", "non_normal", "expansive_tanh"):
        given = problem(name)
        solution = solve(
            given.f,
            given.z0,
            solver=Broyden(history_size=10, kind=kind),
            termination=Residual(1e-15, 1e-15),
            max_steps=80,
            on_failure="ignore",
            keep="last",
        )
        assert not bool((solution.status == Status.NONFINITE).any())
        assert bool(torch.isfinite(solution.z).all())


def test_torchdeq_the_stagnation_test_looks_along_the_wrong_axis() -> None:
    """Stalling is a matter of each sample over its own steps."""
    factor = torch.tensor([[0.5], [-1.0], [0.9]], dtype=torch.float64)  # the second one oscillates
    solution = solve(
        lambda z: factor * z + 1.0,
        torch.zeros(3, 1, dtype=torch.float64),
        solver=Picard(),
        termination=AnyOf(Residual(1e-9), Stagnation(num_steps=5)),
        max_steps=300,
        on_failure="ignore",
    )
    assert solution.status.tolist() == [Status.SUCCESS, Status.STALLED, Status.SUCCESS]


def test_torchdeq_eval_mode_has_no_graph(deq: DEQ, x: Tensor) -> None:
    live = x.clone().requires_grad_()
    deq.eval()(live).z.sum().backward()
    assert live.grad is not None
    assert bool(live.grad.any())


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (1,)], ids=str)
def test_torchdeq_states_of_no_or_one_dimension_change_shape_and_batch_0_crashes(
    shape: tuple[int, ...],
) -> None:
    z0 = torch.full(shape, 0.5, requires_grad=True)
    c = torch.full(shape, 1.0, requires_grad=True)
    batch_dims = 1 if shape else 0
    solution = solve(
        lambda z: 0.5 * z + c,
        z0,
        batch_dims=batch_dims,
        on_failure="raise",  # type: ignore[arg-type]
    )
    assert solution.z.shape == shape
    solution.z.sum().backward()
    assert c.grad is not None
    assert c.grad.shape == shape
    torch.testing.assert_close(c.grad, torch.full(shape, 2.0), rtol=1e-3, atol=0.0)


def test_torchdeq_channels_last_is_lost_in_flattening() -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    convolution, formats = nn.Conv2d(3, 3, 3, padding=1), []
    with torch.no_grad():
        convolution.weight.mul_(0.2)

    def f(z: Tensor) -> Tensor:
        formats.append(z.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(convolution(z) + images)

    solution = solve(f, torch.zeros_like(images))
    solution.z.sum().backward()
    assert all(formats)
    assert solution.z.is_contiguous(memory_format=torch.channels_last)


def test_torchdeq_z0_gets_no_gradient_and_no_word_about_it(deq: DEQ, x: Tensor) -> None:
    """None in theory, said in the docs of Implicit; under Unrolled it gets that of the steps."""
    z0 = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    deq(x, z0=z0).z.sum().backward()
    assert z0.grad is None or not bool(z0.grad.any())
    assert "`z0` gets none" in " ".join((Implicit.__doc__ or "").split())
    steps = SolveSettings(Picard(), FixedSteps(2), Unrolled(), max_steps=2)
    injection, live = deq.cell.inject(x), z0.detach().requires_grad_()
    by_hand = deq.cell(deq.cell(live, injection), injection)
    (wanted,) = torch.autograd.grad(by_hand.sum(), live)
    (found,) = torch.autograd.grad(deq(x, z0=z0, settings=steps).z.sum(), z0)
    torch.testing.assert_close(found, wanted)


def test_torchdeq_spectral_norm_works_in_float32_on_the_cpu_whatever_the_module() -> None:
    module = nn.Linear(4, 4).double()
    spectral_norm(module)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}
    assert module.weight.dtype == torch.float64
    assert module.to("meta").weight.device.type == "meta"


def test_torchdeq_traces_start_with_1e8_and_are_padded() -> None:
    easy = problem("tanh")
    solution = solve(easy.f, easy.z0, trace=True)
    trace = solution.trace
    assert trace is not None
    image = easy.f(easy.z0)
    torch.testing.assert_close(trace[0], rms(image - easy.z0) / rms(image))
    assert len(trace) == int(solution.num_steps.max()) + 1
    for row, steps in enumerate(solution.num_steps.tolist()):
        assert bool(torch.isfinite(trace[: steps + 1, row]).all())
        assert bool(trace[steps + 1 :, row].isnan().all())


def test_torchdeq_modules_do_not_pickle(deq: DEQ, x: Tensor) -> None:
    deq(x).z.sum().backward()
    torch.testing.assert_close(pickle.loads(pickle.dumps(deq))(x).z, deq(x).z)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_torchdeq_results_depend_on_the_batch(solver: Any) -> None:
    """One residual for the whole batch there, so an easy sample is solved as long as a hard one."""
    easy = problem("tanh")
    together = solve(easy.f, easy.z0, solver=solver)
    assert len(set(together.num_steps.tolist())) > 1
    for row in range(4):
        part = easy.rows(slice(row, row + 1))
        alone = solve(part.f, part.z0, solver=solver)
        assert alone.num_steps[0] == together.num_steps[row]
        torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-10, atol=1e-12)


def test_torchdeq_evaluates_the_whole_batch_until_its_worst_sample_is_done() -> None:
    """1376 rows there where 697 were needed; here finished samples leave."""
    rates = torch.linspace(0.02, 0.95, 32, dtype=torch.float64).unsqueeze(1)
    x = torch.randn(32, 4, dtype=torch.float64)
    evaluated: list[int] = []

    def restricted(rows: Tensor) -> Any:
        def f(z: Tensor) -> Tensor:
            evaluated.append(len(z))
            return torch.sin(rates[rows] * z) + x[rows]

        return f

    with torch.no_grad():
        solution = solve(
            restricted(torch.arange(32)), torch.zeros_like(x), solver=Picard(), select=restricted,
            max_steps=400,
        )  # fmt: skip
    needed = int((solution.num_steps + 1).sum())
    assert needed <= sum(evaluated) <= 1.15 * needed
    assert sum(evaluated) < 0.5 * 32 * len(evaluated)


def test_torchdeq_two_equal_steps_make_the_anderson_system_singular() -> None:
    """A user's complaint: an error of the linear solve. Here the sample takes a plain step."""
    c = torch.ones(2, 3, dtype=torch.float64)
    for solver in (Anderson(ridge=0.0), Anderson(kind="I", ridge=0.0), Anderson(kind="II")):
        for rate in (0.0, 0.5, 1.0):  # images that never, linearly, or not at all come nearer
            solution = solve(
                lambda z, rate=rate: rate * z + c,
                torch.zeros_like(c),
                solver=solver,
                termination=FixedSteps(12),
                on_failure="ignore",
            )
            assert bool(torch.isfinite(solution.z).all())


# --- others ------------------------------------------------------------------------------------


def test_silva_a_closure_without_a_list_of_parameters_loses_its_gradient() -> None:
    live = problem("tanh").differentiable()
    x, weight = live.sources
    solution = solve(lambda z: live.map(z, x, weight), live.z0, **TIGHT)
    assert solution.z.requires_grad
    expect_dense_gradients(live, solution)


def test_silva_broyden_refuses_batches() -> None:
    hard = problem("expansive_tanh", batch=5)
    solution = solve(hard.f, hard.z0, solver=Broyden(), on_failure="raise")
    assert solution.status.tolist() == [Status.SUCCESS] * 5


def test_jaxopt_a_failed_backward_solve_returns_gradients_of_zero() -> None:
    weight = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    for backward in (Picard(), Neumann(), BiCGStab(), GMRES(restart=1)):
        solution = solve(
            lambda z: weight * z + torch.tensor([1.0, 2.0], dtype=torch.float64).sin(),
            torch.zeros(2, 2, dtype=torch.float64),
            solver=Broyden(),
            adjoint=Implicit(backward, rtol=1e-14, max_steps=1),
            on_failure="ignore",
        )
        (gradient,) = torch.autograd.grad(solution.z.sum(), weight)
        report = solution.backward.result
        assert report is not None
        failed = report.status != Status.SUCCESS
        assert bool(gradient.abs() > 0)
        assert bool(failed.all()) or isinstance(backward, GMRES)


def test_xitorch_second_derivatives_are_not_batched(deq: DEQ, x: Tensor) -> None:
    """The Hessian of a batch is that of every sample."""

    def curvature(x: Tensor) -> Tensor:
        live = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(deq(live).z.square().sum(), live, create_graph=True)
        return torch.autograd.grad(first.square().sum(), live)[0]

    alone = torch.cat([curvature(x[row : row + 1]) for row in range(4)])
    torch.testing.assert_close(curvature(x), alone, rtol=1e-8, atol=1e-10)


def test_deepinv_settings_of_the_backward_solve_are_ignored() -> None:
    live = problem("convolution").differentiable()
    num_products = []
    for rtol, max_steps in ((1e-2, 50), (1e-8, 50), (1e-8, 3)):
        adjoint = Implicit(GMRES(), rtol=rtol, max_steps=max_steps)
        settings = TIGHT | {"adjoint": adjoint, "on_failure": "ignore"}
        solution = solve(live.f, live.z0, **settings)
        solution.z.sum().backward()
        report = solution.backward.result
        assert report is not None
        assert bool(((report.relative_residual <= rtol) | (report.num_steps == max_steps)).all())
        num_products.append(int(report.num_steps.max()))
    assert num_products[0] < num_products[1]
    assert num_products[2] == 3


def test_optimistix_the_implicit_gradient_forms_the_dense_jacobian() -> None:
    """30,000 numbers per sample: the matrix would have 7 GB, the solve needs a few vectors."""
    width = 30_000
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, width, dtype=torch.float64)
    num_products = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Tensor:
            nonlocal num_products
            num_products += 1
            return cotangents[0]

    z = solve(lambda z: torch.tanh(weight * Counted.apply(z).roll(1, 1) + c), c, **TIGHT).z
    z.sum().backward()
    assert num_products < 60
    assert weight.grad is not None


def test_optimistix_has_no_anderson() -> None:
    hard = problem("tanh")
    num_evals = [
        solve(hard.f, hard.z0, **(TIGHT | {"solver": solver})).num_evals
        for solver in (Anderson(), Picard())
    ]
    assert num_evals[0] < 0.5 * num_evals[1]


def test_banax_has_no_result_codes_per_sample_or_messages_for_them() -> None:
    """The best of the peers has codes; here they are per sample and say what usually helps."""
    mixed = problem("nan_outside_ball")
    solution = solve(mixed.f, mixed.z0, solver=Picard(), on_failure="ignore")
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE] * 2
    assert "look at the inputs" in Status(int(solution.status[1])).message


# --- what users of today need ------------------------------------------------------------------


def test_users_forces_from_energies_train_a_model(deq: DEQ, x: Tensor) -> None:
    live = x.clone().requires_grad_()
    energy = deq(live).z.square().sum()
    (force,) = torch.autograd.grad(-energy, live, create_graph=True)
    gradients = torch.autograd.grad(force.square().sum(), list(deq.cell.recurrent.parameters()))
    assert all(bool(gradient.any()) for gradient in gradients)


def test_users_a_fixed_point_is_reused_for_the_next_frame(deq: DEQ, x: Tensor) -> None:
    first = deq(x)
    again = deq(x + 1e-6, z0=first.z.detach())
    assert again.num_evals < first.num_evals


def test_users_memory_does_not_grow_with_the_number_of_steps(x: Tensor) -> None:
    """What is saved for the backward pass is one evaluation, however many there were."""

    def saved(max_steps: int, adjoint: Any) -> int:
        layer, sizes = DEQ(Tanh(), solver=Picard(), adjoint=adjoint).double(), []
        settings = SolveSettings(Picard(), FixedSteps(max_steps), adjoint, max_steps)

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x, settings=settings)
        return sum(sizes)

    assert saved(40, Implicit()) == saved(4, Implicit())
    assert saved(40, Phantom()) == saved(4, Phantom())
    assert saved(40, Unrolled()) > 5 * saved(4, Unrolled())


def test_users_a_solve_is_freed_without_the_garbage_collector(x: Tensor) -> None:
    """Hooks that refer to their module keep graphs alive; here nothing does."""
    layer = DEQ(Tanh(), **TIGHT).double()
    gc.collect()
    gc.disable()
    try:
        solution = layer(x)
        alive = weakref.ref(solution.z)
        solution.z.sum().backward()
        del solution
        assert alive() is None
    finally:
        gc.enable()


def test_users_a_deq_inside_gradient_checkpointing(deq: DEQ, x: Tensor) -> None:
    live, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    deq(live).z.sum().backward()
    z = checkpoint(lambda x: deq(x).z, again, use_reentrant=False)
    assert isinstance(z, Tensor)
    z.sum().backward()
    torch.testing.assert_close(again.grad, live.grad)


def test_users_bad_states_are_named_and_not_reshaped() -> None:
    with pytest.raises(StateError, match=r"f\(z\) has shape \(2, 1\), z has \(2, 3\)"):
        solve(lambda z: z[:, :1], torch.ones(2, 3))
    with pytest.raises(UserError, match="max_steps=0"):
        solve(torch.cos, torch.ones(2, 3), max_steps=0)


def test_users_ragged_batches_of_graphs(x: Tensor) -> None:
    """Each graph is solved as if it were alone, in steps and in value."""

    class Messages(Tanh):
        def inject(self, x: Tensor, graph: Tensor) -> Any:  # type: ignore[override]
            same = (graph[:, None] == graph).to(x)
            return same / same.sum(1, keepdim=True), self.input(x)

        def initial_state(self, injection: Any) -> Tensor:
            return torch.zeros_like(injection[1])

        def forward(self, z: Tensor, injection: Any) -> Tensor:
            return super().forward(injection[0] @ z, injection[1])

    layer, graph = DEQ(Messages(), **TIGHT).double(), torch.tensor([1, 0, 1, 1])
    together = layer(x, graph, segments=graph)
    assert together.status.shape == (2,)
    for number in (0, 1):
        rows = graph == number
        alone = layer(x[rows], graph[rows], batch_dims=0)
        assert alone.num_steps[0] == together.num_steps[number]
        torch.testing.assert_close(together.z[rows], alone.z, rtol=1e-10, atol=1e-12)


def test_users_pretrain_unrolled_and_go_on_with_equilibria(x: Tensor) -> None:
    """The same layer and parameters; only the settings of the call differ."""
    layer, target = DEQ(Tanh()).double(), torch.full((4, 6), 0.3, dtype=torch.float64)
    unrolled = SolveSettings(Picard(), FixedSteps(3), Unrolled(), max_steps=3)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.02), []
    for step in range(40):
        solution = layer(x, settings=unrolled if step < 20 else None)
        assert (int(solution.num_steps.max()) == 3) == (step < 20)
        loss = (solution.z - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[19] < 0.5 * losses[0]
    assert losses[39] < 0.5 * losses[20] < losses[0]


def test_users_generate_with_kept_keys_and_values() -> None:
    """A new token is a solve of one position; what it attends to is projected once."""
    sizes: list[tuple[int, int]] = []
    model = DEQTransformerConfig(d_model=8, num_heads=2, d_inner=16).build(5).double()

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        z, injection = arguments
        sizes.append((z.shape[1], injection.memory_k.shape[2]))

    model.cell.register_forward_pre_hook(note)
    generate(model, torch.tensor([3, 1, 4]), 10, SamplingConfig(num_tokens=3))
    assert list(dict.fromkeys(sizes)) == [(3, 0), (1, 3), (1, 4)]
    # `tests/tasks/test_generation.py`: the text is that of solving everything anew
