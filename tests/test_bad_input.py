"""What cannot work says so: which argument, what came, and what to do instead.

Settings of single methods are tested beside them; here is what concerns a solve as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    GMRES,
    Adjoint,
    Anderson,
    AnyOf,
    Broyden,
    Cached,
    Cell,
    ConvergenceError,
    ConvergenceWarning,
    Divergence,
    Fallback,
    FixedPoint,
    FixedSteps,
    Implicit,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    Shine,
    Solver,
    SolveSettings,
    Stagnation,
    StateError,
    Status,
    ToleranceSchedule,
    Unrolled,
    UserError,
    solve,
)

Z0 = torch.zeros(2, 3)
IN_PLACE = "f wrote to the state that it was given.*z.clone()"


def contraction(z: Tensor) -> Tensor:
    return 0.5 * z + 1.0


# --- f -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=repr)
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda z: z[:1], r"f\(z\) has shape \(1, 3\), z has \(2, 3\); f must keep the shape"),
        (lambda z: z.T, r"f\(z\) has shape \(3, 2\), z has \(2, 3\)"),
        (lambda z: z.double(), "torch.float64, z is torch.float32; start from a z0 of torch.float"),
        (lambda z: z.long(), "is torch.int64, z is torch.float32"),
        (lambda z: z.to("meta"), r"f\(z\) is on meta, z on cpu; f must keep the device"),
        (
            lambda z: (z, z),
            "f returned the tree .*tuple.* its input is a tensor; f must return a state",
        ),
        (lambda z: {"z": z}, "f returned the tree .*dict"),
        (lambda z: None, r"f\(z\) is a NoneType, expected a tensor"),
        (lambda z: 1.0, r"f\(z\) is a float, expected a tensor"),
    ],
)
def test_f_changes_the_form_of_the_state(
    f: Callable[[Tensor], Any], message: str, with_grad: bool, adjoint: Adjoint
) -> None:
    with torch.set_grad_enabled(with_grad), pytest.raises(StateError, match=message):
        solve(f, Z0, adjoint=adjoint)


def test_f_changes_the_form_of_the_state_at_a_later_step() -> None:
    num_calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return contraction(z) if num_calls < 4 else contraction(z).double()

    with pytest.raises(StateError, match="is torch.float64"):
        solve(f, Z0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize(
    "f",
    [lambda z: z.mul_(0.5).add_(1.0), lambda z: z.add_(1.0) * 0.5],
    ids=["returned", "another returned"],
)
def test_f_writes_to_its_argument(f: Any, solver: Solver, mode: Any) -> None:
    """Then z and f(z) would be one tensor and any point a fixed point: success at nonsense."""
    with mode():
        with pytest.raises(UserError, match=IN_PLACE):
            solve(f, torch.zeros(2, 3), solver=solver)
        fine = solve(lambda z: f(z.clone()), torch.zeros(2, 3), solver=solver)
    assert bool(fine.converged.all())


def test_f_may_return_its_argument_itself() -> None:
    solution = solve(lambda z: z, torch.ones(2, 3), on_failure="raise")
    assert torch.equal(solution.z, torch.ones(2, 3))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (3, "f is a int, expected a function"),
        (None, "f is a NoneType, expected a function"),
        (Z0, "f is a Tensor.*f comes first, then z0"),
    ],
)
def test_f_is_no_function(f: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(f, Z0)


def test_an_error_inside_f_is_passed_on_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        solve(lambda z: z + torch.zeros(5, 3), Z0)


# --- z0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (None, "z0 is a NoneType, expected a tensor"),
        (1.0, "z0 is a float, expected a tensor"),
        ([[0.0, 1.0]], r"z0\[0\]\[0\] is a float, expected a tensor"),
        ({}, "holds no tensors"),
        (torch.zeros(2, 3, dtype=torch.int32), "dtype torch.int32, expected a real floating"),
        (torch.zeros(2, 3, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.view_as_real"),
        (torch.tensor(1.0), r"has no dimensions, expected \(batch, ...\); pass batch_dims=0"),
        (torch.zeros(2, 3).to_sparse(), r"torch.sparse_coo; give a dense tensor, z0.to_dense\(\)"),
        (torch.zeros(2, 3, device="meta"), "meta device and holds no numbers"),
        ((Z0, torch.zeros(3, 3)), r"z0\[1\] has batch size 3.*has 2; every tensor of a state"),
        ({"a": Z0, "b": torch.zeros(2, device="meta")}, r"z0\['b'\] is on meta.*one device"),
    ],
)
def test_z0_is_no_state(z0: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        solve(lambda z: z, z0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()], ids=repr)
def test_z0_is_not_finite(solver: Solver, bad: float) -> None:
    """An error, or a matter of one sample: it says so and stays as it is, the others are solved."""
    z0 = torch.zeros(3, 2, dtype=torch.float64)
    z0[1, 0] = bad
    solution = solve(contraction, z0, solver=solver, on_failure="ignore")
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    assert torch.equal(solution.z[1].nan_to_num(), z0[1].nan_to_num())
    torch.testing.assert_close(
        solution.z[[0, 2]], torch.full((2, 2), 2.0).double(), rtol=1e-3, atol=0
    )
    for policy in ("warn", "raise"):
        with pytest.raises(StateError, match=r"z0 .* in 1 of 3 samples.*sample 1; start from fin"):
            solve(contraction, z0, solver=solver, on_failure=policy)


def test_a_z0_that_is_not_finite_in_places() -> None:
    """Of trees, of one global problem, of a DEQ; where nobody may look, the status tells."""
    bad = torch.tensor([[0.0], [torch.nan], [torch.inf]])
    tree = {"a": torch.zeros(3, 2), "b": bad}
    with pytest.raises(StateError, match="in 2 of 3 samples"):
        solve(lambda z: {name: 0.5 * leaf for name, leaf in z.items()}, tree)
    with pytest.raises(StateError, match="in 1 of 1 samples"):
        solve(contraction, bad, batch_dims=0)
    with pytest.raises(StateError, match="in 2 of 3 samples"):
        DEQ(Plain())(torch.zeros(3, 3), z0=bad.expand(3, 3))
    with pytest.warns(ConvergenceWarning, match="NaN or infinity"):
        solution = solve(contraction, bad, termination=FixedSteps(3))
    assert solution.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.NONFINITE]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_f_is_not_finite(bad: float) -> None:
    factor = torch.tensor([[1.0], [bad]])
    with pytest.raises(ConvergenceError, match="of 2 samples 1 NONFINITE"):
        solve(lambda z: factor * torch.cos(z), Z0, on_failure="raise")


# --- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [0, -3, 2.0, True, "9", None])
def test_step_limits(max_steps: Any) -> None:
    with pytest.raises(UserError, match=f"max_steps={max_steps!r} allows no step; give an integer"):
        solve(contraction, Z0, max_steps=max_steps)
    with pytest.raises(UserError, match=f"max_steps={max_steps!r} must be an integer"):
        Implicit(max_steps=max_steps)


def test_integers_of_numpy_count_steps() -> None:
    settings = {"max_steps": np.int64(7), "states": np.array([2, 3]), "on_failure": "ignore"}
    solution = solve(torch.cos, Z0, termination=Residual(1e-12), **settings)
    assert type(SolveSettings(max_steps=np.int32(7)).max_steps) is int
    assert len(solution.states) == 3
    assert len(solve(torch.cos, Z0, states=np.int64(2)).states) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Picard(np.float32(0.5)), "relaxation=.*is a float32, give float"),
        (lambda: Residual(np.float16(0.5)), "rtol=.*is a float16, give float"),
        (lambda: Residual(torch.tensor(0.5)), "rtol=.*is a Tensor, give float"),
        (lambda: GMRES(np.int64(5)), "restart=.*is a int64, give int"),
        (lambda: NeumannSeries(clip="a"), "clip='a' must be a number above 0, or None.*is a str"),
        (lambda: NeumannSeries(clip=0.0), "clip=0.0 must be a number above 0"),
        (lambda: Shine(max_ratio="a"), "max_ratio='a' must be a number above 0"),
    ],
)
def test_numbers_of_other_types_are_called_what_they_are(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "1e-3", None, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Residual(value), "rtol"),
        (lambda value: Residual(1e-3, value), "atol"),
        (lambda value: Implicit(rtol=value), "rtol"),
        (lambda value: Implicit(atol=value), "atol"),
        (lambda value: ToleranceSchedule(value, 1e-3, num_steps=5), "start_rtol"),
        (lambda value: ToleranceSchedule(1e-3, value, num_steps=5), "end_rtol"),
        (lambda value: Anderson(ridge=value), "ridge"),
        (lambda value: Divergence(residual_factor=value), "residual_factor"),
    ],
    ids=["Residual", "atol", "Implicit", "Implicit-atol", "start", "end", "ridge", "Divergence"],
)
def test_tolerances(make: Callable[[Any], Any], name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name}={value!r} must be a finite number of at least 0"):
        make(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Residual(0.0, 0.0), "both 0, which no solve can reach; .*FixedSteps"),
        (lambda: Implicit(rtol=0.0), "rtol and atol of Implicit are both 0"),
        (lambda: FixedSteps(0), "num_steps=0 must be an integer"),
        (lambda: Stagnation(-1), "num_steps=-1"),
        (lambda: GMRES(restart=0), "restart=0"),
        (lambda: Phantom(0), "num_steps=0"),
        (lambda: NeumannSeries(0), "num_terms=0"),
        (lambda: Picard(relaxation=0.0), "relaxation=0.0 must lie between 0 and 2"),
        (lambda: Reversible(relaxation=1.0), "relaxation=1.0 of Reversible must lie between 0 and"),
        (lambda: AnyOf(), "needs at least one rule"),
        (lambda: Fallback(Anderson()), "got 1 solvers and needs at least 2"),
    ],
)
def test_other_numbers(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# --- pairs that cannot work together -----------------------------------------------------------


@pytest.mark.parametrize(
    "solver", [NewtonKrylov(), Fallback(Picard(), NewtonKrylov(), num_steps=1)]
)
def test_newton_krylov_cannot_be_unrolled(solver: Solver) -> None:
    with pytest.raises(UserError, match=r"cannot be unrolled.*use adjoint=Implicit\(\)"):
        SolveSettings(solver=solver, adjoint=Unrolled())


def test_more_fixed_steps_than_allowed() -> None:
    with pytest.raises(UserError, match=r"FixedSteps\(60\).*max_steps=50; give max_steps=60"):
        SolveSettings(termination=FixedSteps(60))


def test_a_reversible_solve_too_long_for_its_dtype() -> None:
    message = "max_steps=50 steps in torch.float32.*at most 8, start from a float64 z0"
    with pytest.raises(UserError, match=message):
        solve(contraction, Z0, solver=Reversible(), max_steps=50)


def test_segments_and_one_global_problem() -> None:
    with pytest.raises(UserError, match="segments and batch_dims=0 contradict each other"):
        solve(contraction, Z0, segments=torch.tensor([0, 1]), batch_dims=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": GMRES()}, r"solver=GMRES.* is no Solver"),
        ({"solver": Implicit()}, "is no Solver; give for example"),
        ({"adjoint": Anderson()}, "is no Adjoint; give for example"),
        ({"adjoint": "implicit"}, "adjoint='implicit' is no Adjoint"),
        ({"termination": Anderson()}, "is no Termination; give for example"),
        ({"termination": 1e-3}, "termination=0.001 is no Termination"),
        ({"segments": [0, 1]}, "segments is a list, expected a tensor of integers"),
        ({"segments": torch.tensor([0])}, "segments has 1 entries, the state has 2 rows"),
        ({"segments": torch.tensor([True, False])}, "give one integer per row"),
        ({"segments": torch.tensor([0.0, 1.0])}, "torch.float32; give one integer per row"),
        ({"segments": torch.tensor([0j, 1])}, "torch.complex64; give one integer per row"),
        ({"batch_dims": 2}, "batch_dims must be 0 .* or 1, not 2"),
        ({"states": 0}, "states=0 must be an integer of at least 1"),
        ({"states": [99]}, "steps outside 1 to max_steps=50"),
        ({"states": "every"}, "states='every' is no choice"),
        ({"states": 2.5}, "states=2.5 is no choice"),
        ({"inputs": [3]}, "inputs is a list that is no list of tensors"),
        ({"inputs": Z0}, "inputs is a Tensor that is no list of tensors"),
        ({"keep": "first"}, "keep='first' is not one of 'best', 'last'"),
        ({"on_failure": "stop"}, "on_failure='stop' is not one of"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve(contraction, Z0, **arguments)


def test_linear_solvers_and_solvers_are_told_apart() -> None:
    with pytest.raises(UserError, match="neither a fixed-point solver nor a linear one"):
        Implicit(solver=Residual())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is no linear solver; give for example GMRES"):
        NewtonKrylov(linear=Anderson())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_segments_of_any_integers(dtype: torch.dtype) -> None:
    index = torch.tensor([0, 1, 1])
    z0, gain = torch.ones(3, 2), torch.tensor([[0.1], [0.5], [0.6]])
    wanted = solve(lambda z: gain * torch.cos(z), z0, segments=index)
    found = solve(lambda z: gain * torch.cos(z), z0, segments=index.to(dtype))
    assert torch.equal(found.z, wanted.z)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(contraction, Z0, max_step=3), "solve has no option 'max_step'.*'max_steps'"),
        (lambda: solve(contraction, Z0, tol=1e-3), r"that is termination=Residual\(rtol=1e-3\)"),
        (lambda: DEQ(Plain(), max_step=3), "DEQ has no option 'max_step'; did you mean 'max_steps"),
        (lambda: DEQ(Plain(), f_max_iter=3), "'f_max_iter'; that is max_steps=50 here"),
        (lambda: DEQ(Plain(), b_tol=3), r"'b_tol'; that is adjoint=Implicit\(rtol=1e-4\) here"),
        (lambda: DEQ(Plain(), whatever=3), "no option 'whatever'; there are solver, term"),
        (lambda: Anderson(histroy_size=5), "Anderson has no option 'histroy_size'.*'history_size'"),
        (lambda: Anderson(m=5), "'m'; that is history_size=10 here"),
        (lambda: OneStep(num_steps=2), "OneStep has no option 'num_steps'; it has none"),
        (lambda: FixedPoint(Anderson(), tol=1e-3), "FixedPoint has no option 'tol'; there are"),
        (lambda: Fallback(Anderson(), Picard(), num_step=3), "did you mean 'num_steps'"),
        (lambda: SolveSettings(max_step=3), "did you mean 'max_steps'"),
        (lambda: Cached(10, dtyp=None), "Cached has no option 'dtyp'"),
    ],
)
def test_unknown_options_name_the_one_that_was_meant(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


# --- DEQ ---------------------------------------------------------------------------------------


class Plain(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def inject(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return 0.5 * z + injection


class Mixing(Plain):
    """One whose error is that of its own product."""

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.linear(z)) + injection


def test_a_z0_that_does_not_fit_the_cell() -> None:
    deq, x = DEQ(Plain()), torch.randn(2, 3)
    with pytest.raises(StateError, match=r"f\(z\) has shape \(2, 3\), z has \(1, 3\)"):
        deq(x, z0=torch.zeros(1, 3))
    with pytest.raises(StateError, match="is torch.float32, z is torch.bfloat16"):
        deq(x, z0=torch.zeros(2, 3).bfloat16())


class Pair(Plain):
    """A state of two parts, of which the second is narrow."""

    def initial_state(self, injection: Tensor) -> Any:
        return {"a": torch.zeros_like(injection), "b": torch.zeros(len(injection), 2)}

    def forward(self, z: Any, injection: Tensor) -> Any:
        return {"a": super().forward(z["a"], injection), "b": 0.5 * z["b"] + z["a"][:, :2]}


@pytest.mark.parametrize(
    ("cell", "z0", "message"),
    [
        (Mixing, torch.zeros(2, 4), r"z0 has shape \(2, 4\).* Mixing starts from \(2, 3\)"),
        (Mixing, torch.zeros(5, 3), r"z0 has shape \(5, 3\).* Mixing starts from \(2, 3\)"),
        (Mixing, torch.zeros(2, 3).double(), "z0 is torch.float64.*starts from torch.float32"),
        (Mixing, [torch.zeros(2, 3)], "z0 is the tree .*list.* Mixing starts from a tensor"),
        (Pair, torch.zeros(2, 3), "z0 is a tensor.* Pair starts from the tree .*dict"),
        (
            Pair,
            {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)},
            r"z0\['b'\] has shape \(2, 4\).* Pair starts from \(2, 2\)",
        ),
    ],
    ids=str,
)
def test_a_z0_that_the_cell_cannot_take_says_what_it_starts_from(
    cell: Any, z0: Any, message: str
) -> None:
    """Though the error is one inside of f, of a product or a missing key."""
    with pytest.raises(StateError, match=message):
        DEQ(cell())(torch.randn(2, 3), z0=z0)


def test_an_error_of_the_cell_is_its_own_where_z0_fits() -> None:
    class Broken(Plain):
        def forward(self, z: Tensor, injection: Tensor) -> Tensor:
            raise KeyError("mask")

    with pytest.raises(KeyError, match="mask"):
        DEQ(Broken())(torch.randn(2, 3), z0=torch.zeros(2, 3))


def test_a_z0_of_another_form_is_fine_where_the_cell_takes_it() -> None:
    class Wide(Plain):
        def forward(self, z: Tensor, injection: Tensor) -> Tensor:
            return 0.5 * z + injection.mean()

    deq = DEQ(Wide(), on_failure="raise")
    assert deq(torch.randn(2, 3), z0=torch.zeros(2, 7)).z.shape == (2, 7)


def test_an_initial_state_that_is_not_finite() -> None:
    class Spoilt(Plain):
        def initial_state(self, injection: Tensor) -> Tensor:
            start = torch.zeros_like(injection)
            start[1] = torch.nan
            return start

    deq, x = DEQ(Spoilt()), torch.randn(3, 3)
    for mode in (torch.enable_grad, torch.no_grad):
        with (
            mode(),
            pytest.raises(StateError, match=r"initial_state .* in 1 of 3 samples.*sample 1"),
        ):
            deq(x)
    ignored = deq(x, settings=replace(deq.settings, on_failure="ignore"))
    assert ignored.status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS]
    with pytest.warns(ConvergenceWarning, match="the map returned NaN"):  # of another cause
        DEQ(Plain())(torch.full((2, 3), torch.nan))


def test_settings_given_to_a_call() -> None:
    deq, x = DEQ(Plain()), torch.randn(2, 3)
    with pytest.raises(UserError, match=r"max_steps is a setting.*DEQ\(.*replace\(deq.settings, m"):
        deq(x, max_steps=3)
    with pytest.raises(UserError, match=r"settings=Picard.* is no SolveSettings"):
        deq(x, settings=Picard())


@pytest.mark.parametrize(
    "name", ["z0", "settings", "batch_dims", "segments", "states", "trace", "sample_index"]
)
def test_an_input_of_the_cell_that_a_call_keeps_for_itself(name: str) -> None:
    class Named(Plain):
        pass

    scope: dict[str, Any] = {}
    exec(f"def inject(self, x, {name}=None): return x", scope)
    Named.inject = scope["inject"]
    with pytest.raises(UserError, match=f"inject has an input called {name}, which DEQ takes"):
        DEQ(Named())


def test_a_setting_that_is_an_input_of_the_cell() -> None:
    class Damped(Plain):
        def inject(self, x: Tensor, keep: Tensor) -> Tensor:
            return keep * x

    assert DEQ(Damped())(torch.ones(2, 3), keep=torch.tensor(0.5)).z.allclose(torch.ones(2, 3))


def test_an_unknown_input_of_the_cell() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        DEQ(Plain())(torch.randn(2, 3), mask=None)
