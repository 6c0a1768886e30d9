"""The defects that `test_peer_defects.py` tests on our side, shown on torchdeq 0.1.0 itself.

Only those that are quick to show. A failure here is good news: the defect is gone there, and
`docs/peers.md` has to say so.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from equilibria.testing import implicit_gradients, problem
from equilibria.testing.dense import relative_error

torchdeq = pytest.importorskip("torchdeq")
if version("torchdeq") != "0.1.0":
    pytest.skip("written for torchdeq 0.1.0", allow_module_level=True)

from torchdeq.dropout import VariationalDropout1d  # noqa: E402
from torchdeq.loss import power_method  # noqa: E402
from torchdeq.norm import apply_norm  # noqa: E402
from torchdeq.solver.anderson import anderson_solver  # noqa: E402
from torchdeq.solver.broyden import broyden_solver  # noqa: E402
from torchdeq.solver.fp_iter import fixed_point_iter  # noqa: E402

# the best that it can do, so that nothing is blamed on loose tolerances
TIGHT: dict[str, Any] = {
    "f_solver": "broyden",
    "b_solver": "broyden",
    "f_max_iter": 100,
    "b_max_iter": 100,
    "f_tol": 1e-12,
    "b_tol": 1e-12,
    "ift": True,
}


def cosine(z: Tensor) -> Tensor:
    return 0.5 * torch.cos(z)


@pytest.fixture
def weight() -> Tensor:
    return 0.5 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


@pytest.fixture
def layer(weight: Tensor) -> Callable[..., Tensor]:
    """z* of tanh(z W + x), by options of torchdeq that replace the tight ones."""

    def run(x: Tensor, **options: Any) -> Tensor:
        deq = torchdeq.get_deq(**(TIGHT | options))
        return deq(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x))[0][-1]

    return run


def gradient(layer: Callable[..., Tensor], x: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
    live = x.clone().requires_grad_()
    return torch.autograd.grad(scale * layer(live, **options).sum(), live)[0] / scale


# --- gradients ---------------------------------------------------------------------------------


def test_second_derivatives_are_silently_wrong(layer: Any, weight: Tensor, x: Tensor) -> None:
    def unrolled(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(60):
            z = torch.tanh(z @ weight + x)
        return z

    def hessian(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x[:1])

    assert relative_error([hessian(layer)], [hessian(unrolled)]) > 0.5


def test_the_default_gradient_is_one_step(layer: Any, x: Tensor) -> None:
    live = x.clone().requires_grad_()
    z = layer(live, ift=False)
    z.sum().backward()
    torch.testing.assert_close(live.grad, 1 - z.detach() ** 2, rtol=1e-6, atol=1e-9)
    assert relative_error([live.grad], [gradient(layer, x)]) > 0.2


def test_the_gradient_depends_on_the_scale_of_the_loss(layer: Any, x: Tensor) -> None:
    options = {"b_solver": "anderson", "b_tol": 1e-6}
    exact = gradient(layer, x)
    assert relative_error([gradient(layer, x, **options)], [exact]) < 1e-5
    assert relative_error([gradient(layer, x, scale=1e-6, **options)], [exact]) > 1e-2


def test_a_backward_solve_that_fails_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    turn = torch.tensor([[0.0, -1.3], [1.3, 0.0]], dtype=torch.float64)
    c = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return z @ turn.T + c

    deq = torchdeq.get_deq(**(TIGHT | {"b_solver": "fixed_point_iter"}))
    z = deq(f, torch.zeros_like(c))[0][-1]
    found = torch.autograd.grad(z.sum(), c)
    assert relative_error(found, implicit_gradients(f, z, torch.ones_like(z), [c])) > 0.5
    assert not recwarn.list


def test_a_backward_solver_of_its_own_list_raises(layer: Any, x: Tensor) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        gradient(layer, x, b_solver="simple_fixed_point_iter")


def test_there_is_no_gradient_in_eval_mode(x: Tensor) -> None:
    live = x.clone().requires_grad_()
    deq = torchdeq.get_deq(**TIGHT).eval()
    assert not deq(lambda z: torch.tanh(0.5 * z + live), torch.zeros_like(x))[0][-1].requires_grad


def test_func_grad_raises(layer: Any, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: layer(x).sum())(x)


def test_f_runs_again_in_the_backward_pass_with_another_update_of_statistics() -> None:
    norm, c = nn.BatchNorm1d(4), torch.randn(8, 4, requires_grad=True)
    deq = torchdeq.get_deq(**(TIGHT | {"f_max_iter": 9, "b_max_iter": 9}))
    z = deq(lambda z: 0.3 * norm(z + c), torch.zeros(8, 4))[0][-1]
    updates = int(norm.num_batches_tracked)
    z.sum().backward()
    assert int(norm.num_batches_tracked) > updates


def test_autocast_is_on_forward_and_off_backward() -> None:
    linear, seen = nn.Linear(4, 4), []

    def f(z: Tensor) -> Tensor:
        seen.append(linear(z).dtype)
        return torch.tanh(0.3 * linear(z).float())

    deq = torchdeq.get_deq(**(TIGHT | {"f_max_iter": 9, "b_max_iter": 9}))
    with torch.autocast("cpu", torch.bfloat16):
        z = deq(f, torch.zeros(2, 4))[0][-1]
    assert set(seen) == {torch.bfloat16}
    z.sum().backward()
    assert torch.float32 in seen


# --- solvers -----------------------------------------------------------------------------------


def test_a_nan_destroys_the_best_iterate_of_its_sample() -> None:
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        spoilt = torch.where(torch.arange(3)[:, None] == 1, torch.nan, 0.0)
        return cosine(z) + spoilt if calls > 3 else cosine(z)

    best = fixed_point_iter(f, torch.zeros(3, 2), max_iter=8)[0]
    assert best.isnan().any(1).tolist() == [False, True, False]


def test_damped_iteration_reports_the_damped_residual() -> None:
    z, _, info = fixed_point_iter(torch.cos, torch.zeros(1, 1), max_iter=1, tau=0.01)
    assert float(info["abs_lowest"]) < 0.011
    assert float((torch.cos(z) - z).abs()) > 0.98


def test_the_power_method_finds_radius_zero_for_a_rotation() -> None:
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    turn = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    assert float(power_method(z @ turn.T, z)[1]) < 1e-9


@pytest.mark.parametrize(
    ("z0", "options", "error"),
    [
        (torch.zeros(2, 3, dtype=torch.bfloat16), {}, NotImplementedError),
        (torch.zeros(2, 3), {"m": 1}, IndexError),
    ],
    ids=["bf16", "m = 1"],
)
def test_anderson_fails(z0: Tensor, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        anderson_solver(cosine, z0, **options)


def test_anderson_returns_z0_for_few_steps() -> None:
    assert not anderson_solver(cosine, torch.zeros(2, 3), max_iter=2)[0].any()


def test_andersons_ridge_is_absolute() -> None:
    hard = problem("stiff")
    c = 1e-4 * hard.inputs[1] / hard.inputs[1].norm()
    _, _, info = anderson_solver(
        lambda z: hard.map(z, hard.inputs[0], c), hard.z0, max_iter=400, tol=1e-6, stop_mode="rel"
    )
    assert bool((info["rel_lowest"] > 1e-5).all())


def test_limited_memory_broyden_turns_to_nan_when_its_memory_is_full() -> None:
    given = problem("non_normal", dtype=torch.float32)
    z, _, info = broyden_solver(given.f, given.z0, max_iter=80, tol=1e-15, LBFGS_thres=10)
    assert bool(info["abs_trace"][:, 1:11].isfinite().all())
    assert bool(z.isnan().any())


def test_the_batch_runs_to_its_worst_sample() -> None:
    factor, rows = torch.tensor([[0.1], [0.9]]), 0

    def f(z: Tensor) -> Tensor:
        nonlocal rows
        rows += len(z)
        return factor * torch.cos(z)

    _, _, info = fixed_point_iter(f, torch.zeros(2, 1), max_iter=100, tol=1e-6)
    assert rows > 1.3 * int(info["nstep"].sum())


def test_traces_start_with_1e8_and_are_padded() -> None:
    trace = fixed_point_iter(cosine, torch.zeros(2, 1), max_iter=50)[2]["abs_trace"]
    assert trace.shape == (2, 51)
    assert bool((trace[:, 0] == 1e8).all())


def test_intermediate_states_lose_z_star_when_the_solve_ends_early(x: Tensor) -> None:
    """With indexing=[5, 50], and done before step 50: one state comes back, that of step 5."""
    options = {"f_solver": "fixed_point_iter", "f_max_iter": 60, "f_tol": 1e-6}
    deq = torchdeq.get_deq(**options, indexing=[5, 50], core="indexing")

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + x)

    (only,) = deq(f, torch.zeros_like(x))[0]
    assert float((f(only) - only).norm()) > 1e-3


# --- states and modules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "z0"),
    [
        (lambda z: {"a": 0.5 * z["a"] + 1.0}, {"a": torch.zeros(2, 3)}),
        (lambda a: ((0.5 * a[0] + 1.0,),), ((torch.zeros(2, 3),),)),
    ],
    ids=["dict", "nested"],
)
def test_trees_fail(f: Any, z0: Any) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        torchdeq.get_deq()(f, z0)


def test_an_empty_batch_crashes_and_a_scalar_changes_shape() -> None:
    deq = torchdeq.get_deq(f_solver="fixed_point_iter")
    with pytest.raises(RuntimeError):
        deq(cosine, torch.zeros(0, 3))
    assert deq(cosine, torch.zeros(()))[0][-1].shape == (1,)


def test_channels_last_is_lost_in_flattening() -> None:
    images, seen = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), []

    def f(z: Tensor) -> Tensor:
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return cosine(z) + images

    torchdeq.get_deq(f_solver="anderson")(f, torch.zeros_like(images))
    assert not any(seen)


def test_unknown_options_are_ignored_and_the_callers_object_is_changed() -> None:
    options = {"f_max_iter": 3}
    deq = torchdeq.get_deq(options, f_max_itre=7, whatever=5, f_tol=1e-2)
    assert deq.f_max_iter == 3
    assert options != {"f_max_iter": 3}


def test_modules_do_not_pickle() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(torchdeq.get_deq(**TIGHT))


def test_normalised_modules_cannot_be_copied_and_need_a_reset() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    apply_norm(linear, "weight_norm")
    linear(x).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(linear)
    with pytest.raises(RuntimeError, match="a second time"):
        linear(x).sum().backward()


def test_norms_skip_subclasses_and_the_inprojections_of_attention() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"special": Special(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    apply_norm(model, "weight_norm")
    names = {name for name, _ in model.named_parameters()}
    assert {"special.weight", "attention.in_proj_weight"} <= names  # as they were


def test_dropout_masks_are_float32() -> None:
    assert VariationalDropout1d()(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_compiled_solve_breaks_into_many_graphs() -> None:
    deq, x = torchdeq.get_deq(f_max_iter=3).eval(), torch.randn(2, 4)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    torch.compile(
        lambda x: deq(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x))[0][-1],
        backend=counter,
    )(x)
    assert counter.frame_count >= 5
