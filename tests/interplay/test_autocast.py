"""Autocast is for f, in every pass; solvers keep the precision of the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Cell,
    Fallback,
    Implicit,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    StateError,
    Unrolled,
    solve,
)
from equilibria.core.status import Status
from equilibria.linear.bicgstab import BiCGStab

SOLVERS = [
    Picard(),
    Anderson(),
    Anderson(kind="II"),
    Broyden(),
    Broyden(kind="bad"),
    Broyden(line_search=True),
    NewtonKrylov(),
    Reversible(reconstruction_tolerance=None),
    Fallback(Anderson(), Picard()),
]
BF16_RESOLUTION = torch.finfo(torch.bfloat16).eps


class Watched(Cell):
    """tanh(W z + x), keeping autocast and dtype of every evaluation and of its backward pass."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        with torch.no_grad():
            self.hidden.weight.mul_(0.5 / torch.linalg.matrix_norm(self.hidden.weight, 2))
        self.forward_dtypes: list[torch.dtype] = []
        self.backward_dtypes: list[torch.dtype] = []

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        product = self.hidden(z)
        self.forward_dtypes.append(product.dtype)
        if product.requires_grad:
            product.register_hook(lambda g: self.backward_dtypes.append(g.dtype))
        return torch.tanh(product + injection)


class DtypesOfProducts(TorchFunctionMode):
    """Notes the result of every batched product, which here only solvers make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.bmm, torch.baddbmm):
            self.seen.add(result.dtype)
        return result


@pytest.mark.parametrize(
    "adjoint",
    [Implicit(), Implicit(BiCGStab()), Implicit(Broyden()), OneStep(), Phantom(), Unrolled()],
    ids=str,
)
def test_f_runs_under_the_callers_autocast_in_every_pass(adjoint: Any) -> None:
    """Though `backward` is called outside of the block."""
    cell = Watched()
    deq = DEQ(cell, adjoint=adjoint, termination=Residual(1e-2))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        z = deq(x).z
    z.square().sum().backward()
    assert z.dtype == torch.float32
    assert set(cell.forward_dtypes) == {torch.bfloat16}
    assert set(cell.backward_dtypes) == {torch.bfloat16}
    assert cell.hidden.weight.grad is not None
    assert cell.hidden.weight.grad.dtype == torch.float32


def test_an_autocast_around_backward_alone_does_not_reach_the_backward_solve() -> None:
    """What PyTorch does after it, on the way to the parameters, is not ours and is rounded."""
    deq, x = DEQ(Watched(), termination=Residual(1e-5)), torch.randn(3, 6)
    outside, inside = deq(x), deq(x)
    outside.z.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        inside.z.square().sum().backward()
    assert outside.backward.result is not None
    assert inside.backward.result is not None
    assert torch.equal(outside.backward.result.u, inside.backward.result.u)


@pytest.mark.parametrize("solver", [Anderson(fused=False), Broyden(fused=False)], ids=str)
def test_the_products_of_solvers_stay_in_single_precision(solver: Any) -> None:
    deq = DEQ(Watched(), solver=solver, adjoint=Implicit(solver, max_steps=6), on_failure="ignore")
    with DtypesOfProducts() as products, torch.autocast("cpu", torch.bfloat16):
        deq(torch.randn(3, 6)).z.sum().backward()
    assert products.seen == {torch.float32}


def test_the_gradient_is_that_of_the_function_that_was_solved() -> None:
    """To the precision of bfloat16, and not to that of another function."""
    deq, x = DEQ(Watched(), termination=Residual(1e-2)), torch.randn(64, 6)
    parameters = list(deq.parameters())
    expected = torch.autograd.grad(deq(x).z.square().mean(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = deq(x).z.square().mean()
    for found, wanted in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (found - wanted).norm() <= 4 * BF16_RESOLUTION * wanted.norm()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_half_precision_states_are_solved_to_their_own_precision(solver: Any) -> None:
    cell = Watched().bfloat16()
    x = torch.randn(8, 6).bfloat16()
    solution = DEQ(cell, solver=solver, termination=Residual(2 * BF16_RESOLUTION))(x)
    assert solution.z.dtype == torch.bfloat16
    assert solution.converged.all()
    true = _reference(cell, x)
    error = (solution.z.double() - true).norm(dim=1) / true.norm(dim=1)
    assert (error <= 8 * BF16_RESOLUTION).all()  # condition 1 / (1 - 0.5), and rounding


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_tolerance_beyond_half_precision_is_not_claimed(solver: Any) -> None:
    """What is reported is the residual of the returned state, as f sees it, rounded."""
    cell = Watched().bfloat16()
    x = torch.randn(8, 6).bfloat16()
    solution = DEQ(cell, solver=solver, termination=Residual(1e-6, atol=0.0), on_failure="ignore")(
        x
    )
    z = solution.z
    with torch.no_grad():
        true = (cell(z, x).float() - z.float()).square().mean(1).sqrt()
    torch.testing.assert_close(solution.residual, true, rtol=1e-3, atol=1e-6)
    tolerance = 1e-6 * cell(z, x).float().square().mean(1).sqrt()
    assert torch.equal(solution.converged, solution.residual <= tolerance)
    assert (solution.status[~solution.converged] == Status.MAX_STEPS).all()


def test_gradients_of_half_precision_states(x: Tensor) -> None:
    cell = Watched().bfloat16()
    twin = Watched()
    twin.load_state_dict(cell.state_dict())
    inputs = torch.randn(64, 6).bfloat16()

    def gradient(cell: Watched, inputs: Tensor) -> Tensor:
        deq = DEQ(cell, termination=Residual(1e-2), adjoint=Implicit(rtol=1e-2))
        return torch.autograd.grad(deq(inputs).z.float().square().mean(), cell.hidden.weight)[0]

    found, expected = gradient(cell, inputs), gradient(twin, inputs.float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
def test_mixed_precision_trees(solver: Any) -> None:
    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        wide, narrow = state["wide"], state["narrow"]
        return {
            "wide": 0.5 * torch.cos(wide + narrow.float()),
            "narrow": 0.3 * torch.sin(narrow + wide.bfloat16()) + 1,
        }

    z0 = {"wide": torch.zeros(2, 3), "narrow": torch.zeros(2, 3, dtype=torch.bfloat16)}
    solution = solve(f, z0, solver=solver, termination=Residual(1e-2))
    assert solution.z["wide"].dtype == torch.float32
    assert solution.z["narrow"].dtype == torch.bfloat16
    assert solution.converged.all()


def _reference(cell: Watched, x: Tensor) -> Tensor:
    """The fixed point of the map with the same rounded weights, in double precision."""
    weight, bias, x = (t.detach().double() for t in (cell.hidden.weight, cell.hidden.bias, x))
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(z @ weight.T + bias + x)
    return z


def test_the_injection_may_be_half_precision_and_the_state_wide(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    """A z0 of float32 is enough; what f returns under autocast is cast back."""
    deq = make_deq(termination=Residual(1e-2), adjoint=Implicit()).float()
    with torch.autocast("cpu", torch.bfloat16):
        solution = deq(x.float(), z0=torch.zeros(4, 5))
    assert solution.z.dtype == torch.float32
    assert solution.converged.all()


class Projected(Watched):
    """The cell of the README: under autocast its injection is bfloat16."""

    def __init__(self, state: torch.dtype | None) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(3, 6), state

    def inject(self, x: Tensor) -> Tensor:
        return self.inputs(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection, dtype=self.state)


@pytest.mark.parametrize("state", [None, torch.float32])
def test_the_state_is_what_the_cell_says_and_f_rounds_either_way(
    state: torch.dtype | None,
) -> None:
    deq, x = DEQ(Projected(state), on_failure="ignore"), torch.randn(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        tight = deq(x)
        loose = deq(x, settings=replace(deq.settings, termination=Residual(1e-2)))
    assert tight.z.dtype == loose.z.dtype == (state or torch.bfloat16)
    assert not tight.converged.all()  # 1e-4 is beyond what f returns
    assert tight.num_evals > 50
    assert loose.converged.all()
    assert loose.num_evals < 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_image_that_autocast_does_not_explain(dtype: torch.dtype) -> None:
    """Only its own dtype and float32 are its doing; another dtype is f's mistake."""
    with torch.autocast("cpu", torch.bfloat16):
        for explained in (torch.bfloat16, torch.float32):
            solution = solve(
                lambda z, to=explained: (0.5 * torch.cos(z)).to(to),
                torch.zeros(2, 3),
                termination=Residual(1e-2),
            )
            assert solution.z.dtype == torch.float32
        with pytest.raises(StateError, match=f"is {dtype}, z is torch.float32"):
            solve(lambda z: (0.5 * torch.cos(z)).to(dtype), torch.zeros(2, 3))
        with pytest.raises(StateError, match="is torch.bfloat16, z is torch.float64"):
            solve(lambda z: (0.5 * torch.cos(z)).bfloat16(), torch.zeros(2, 3).double())
