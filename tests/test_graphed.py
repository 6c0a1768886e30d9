"""Replayed blocks of steps, on the CPU: a recorder takes the place of CUDA graphs.

It has their semantics. Every operation is kept with the tensors it was given and the one it made;
to replay is to do all of them again on the same memory, and no Python in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria import Anderson, Broyden, Picard, UserError, solve
from equilibria.core.solver import Solver
from equilibria.graphed import GraphedSolve, capture_cuda
from equilibria.terminations.fixed_steps import FixedSteps

SYNCHRONISING = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}


class Recorder(TorchDispatchMode):
    """Keeps operations, and refuses those that wait for the device, as CUDA does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in SYNCHRONISING:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(run: Callable[[], None]) -> Callable[[], None]:
    run()  # warms up
    recorder = Recorder()
    with recorder:
        run()
    return recorder.replay


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64)
    return 0.7 * weight / torch.linalg.matrix_norm(weight, 2)


def batch(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    "solver",
    [Picard(), Anderson(4), Anderson(4, kind="II"), Broyden(4)],
    ids=["picard", "anderson", "anderson-2", "broyden"],
)
def test_blocks_find_the_fixed_points_of_other_inputs(solver: Solver, weight: Tensor) -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    graphed = GraphedSolve(
        f, torch.zeros_like(batch(0)), [batch(0)], solver=solver, block=5, rtol=1e-9,
        max_steps=200, capture=record,
    )  # fmt: skip
    for seed in (1, 2, 3):
        x = batch(seed, scale=seed)
        found = graphed(x)
        assert found.converged.all()
        assert (found.relative_residual <= 1e-9).all()
        assert set(found.num_steps.tolist()) <= set(range(5, 205, 5))
        residual = (f(found.z, x) - found.z).norm(dim=1) / f(found.z, x).norm(dim=1)
        torch.testing.assert_close(residual, found.relative_residual, rtol=1e-3, atol=1e-14)
        exact = solve(lambda z, x=x: f(z, x), torch.zeros_like(x), max_steps=200).z
        torch.testing.assert_close(found.z, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(4, fused=False), Broyden(4, fused=False)], ids=["p", "a", "b"]
)
def test_a_block_is_the_plain_solve_of_its_steps(solver: Solver, weight: Tensor) -> None:
    """Bit for bit, block after block."""

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    x = batch(4)
    for blocks in (1, 2, 3):
        graphed = GraphedSolve(
            f, torch.zeros_like(x), [batch(0)], solver=solver, block=4, rtol=0.0,
            max_steps=4 * blocks, capture=record,
        )  # fmt: skip
        found = graphed(x)
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(blocks):
                plain = solve(
                    lambda z: f(z, x), z, solver=solver, termination=FixedSteps(4), max_steps=4
                )
                z = plain.z
        assert torch.equal(found.z, z)
        assert torch.equal(found.relative_residual, plain.relative_residual)
        assert found.num_evals == blocks * plain.num_evals
        assert not found.converged.any()


def test_a_sample_that_is_done_keeps_its_state(weight: Tensor) -> None:
    """An easy sample among hard ones: its steps are its own, and a later block changes nothing."""

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(1.3 * (z @ weight) + x)

    x = batch(5)
    x[0] = 40.0  # saturated: one step
    graphed = GraphedSolve(
        f, torch.zeros_like(x), [x], solver=Picard(), block=3, rtol=1e-8, max_steps=600,
        capture=record,
    )  # fmt: skip
    found = graphed(x)
    assert found.converged.all()
    assert found.num_steps[0] == 3
    assert found.num_steps.max() > 3


def test_what_is_not_finite_is_said(weight: Tensor) -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    x = batch(6)
    graphed = GraphedSolve(f, torch.zeros_like(x), [x], block=4, rtol=1e-8, capture=record)
    x[2] = torch.nan
    found = graphed(x)
    assert [i for i, ok in enumerate(found.converged.tolist()) if not ok] == [2]
    assert found.z.isfinite().all()
    again = graphed(batch(7))
    assert again.converged.all()


def test_states_may_be_trees_and_weights_may_change_in_place(weight: Tensor) -> None:
    own = weight.clone()

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": torch.tanh(z["b"] @ own + 0.3), "b": torch.tanh(z["a"] @ own - 0.2)}

    z0 = {"a": torch.zeros(3, 6).double(), "b": torch.zeros(3, 6).double()}
    graphed = GraphedSolve(f, z0, block=6, rtol=1e-9, max_steps=120, capture=record)
    before = graphed()
    own.mul_(-0.5)
    after = graphed()
    assert after.converged.all()
    assert not torch.allclose(before.z["a"], after.z["a"])
    torch.testing.assert_close(f(after.z), after.z, rtol=1e-7, atol=1e-8)


def test_maps_that_look_at_numbers_are_refused(weight: Tensor) -> None:
    def f(z: Tensor) -> Tensor:
        return z @ weight if float(z.sum()) > 0.0 else torch.tanh(z @ weight)

    with pytest.raises(UserError, match="cannot be recorded.*look at no number"):
        GraphedSolve(f, batch(0), capture=record)


def test_bad_input(weight: Tensor) -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    with pytest.raises(UserError, match="on one CUDA device"):
        GraphedSolve(f, batch(0), [batch(0)])
    with pytest.raises(UserError, match="block"):
        GraphedSolve(f, batch(0), [batch(0)], block=0, capture=record)
    graphed = GraphedSolve(f, batch(0), [batch(0)], capture=record)
    with pytest.raises(UserError, match="0 inputs given, 1 were recorded"):
        graphed()
    with pytest.raises(UserError, match=r"input 0 is \(2, 6\)"):
        graphed(batch(0)[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=["p", "a", "b"])
def test_on_a_gpu(solver: Solver, weight: Tensor) -> None:
    weight = weight.float().cuda()

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    x = batch(1).float().cuda()
    graphed = GraphedSolve(f, torch.zeros_like(x), [x], solver=solver, capture=capture_cuda)
    for seed in (2, 3):
        x = batch(seed).float().cuda()
        found = graphed(x)
        assert found.converged.all()
        torch.testing.assert_close(f(found.z, x), found.z, rtol=1e-3, atol=1e-3)
