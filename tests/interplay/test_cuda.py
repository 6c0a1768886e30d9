"""On a CUDA device: autocast, nothing that waits, CUDA graphs, compiled cells. `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    FixedSteps,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Unrolled,
    solve,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("fresh_compiler"),
]

SOLVERS = [
    Picard(),
    Anderson(),
    Anderson(kind="II", safeguard=2.0),
    Broyden(),
    Broyden(kind="bad"),
]
IN_ONE_GRAPH = [OneStep(), Phantom(), Unrolled()]
FIXED = {"termination": FixedSteps(6), "on_failure": "ignore"}


@contextmanager
def nothing_waits() -> Generator[None]:
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def gradients(layer: Callable[[Tensor], Tensor], deq: DEQ, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    z = layer(x)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [*deq.parameters(), x])]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fixed_steps_wait_for_nothing_in_inference(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any
) -> None:
    deq, x = make_deq(solver=solver, **FIXED).cuda(), x.cuda()
    with torch.no_grad():
        expected = deq(x).z  # once before: libraries wait while they are loaded
        with nothing_waits():
            found = deq(x).z
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("adjoint", IN_ONE_GRAPH, ids=str)
def test_fixed_steps_wait_for_nothing_in_training(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    deq, x = make_deq(adjoint=adjoint, **FIXED).cuda(), x.cuda()
    expected = gradients(lambda x: deq(x).z, deq, x)
    with nothing_waits():
        found = gradients(lambda x: deq(x).z, deq, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_cuda_graph_of_an_inference_solve(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any
) -> None:
    deq, static = make_deq(solver=solver, **FIXED).cuda(), x.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            deq(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        z = deq(static).z
    for scale in (1.0, -0.5):
        static.copy_(scale * x.cuda())
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(z, deq(static).z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_in_every_pass(make_deq: Callable[..., DEQ], x: Tensor, dtype: Any) -> None:
    deq = make_deq(termination=Residual(1e-2), adjoint=Implicit()).float().cuda()
    x = x.float().cuda()
    seen: list[torch.dtype] = []
    deq.cell.recurrent.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    expected = gradients(lambda x: deq(x, z0=torch.zeros(4, 5, device="cuda")).z, deq, x)
    seen.clear()

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype):
            return deq(x, z0=torch.zeros(4, 5, device="cuda")).z

    found = gradients(under_autocast, deq, x)
    assert set(seen) == {dtype}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.1 * other.norm()


def test_a_gradient_scaler_changes_nothing(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq, x = make_deq(adjoint=Implicit()).float().cuda(), x.float().cuda()
    loss = deq(x).z.square().mean()
    plain = torch.autograd.grad(loss, list(deq.parameters()), retain_graph=True)
    scaled = torch.autograd.grad(2.0**16 * loss, list(deq.parameters()))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / 2.0**16, one)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_a_compiled_cell(make_deq: Callable[..., DEQ], x: Tensor, mode: str) -> None:
    """reduce-overhead writes every image to the same memory: what the solver keeps are copies."""
    deq, x = make_deq().cuda(), x.cuda()
    expected = gradients(lambda x: deq(x).z, deq, x)
    deq.cell.compile(mode=mode, fullgraph=True)
    for _ in range(4):  # warm-up, recording, replay
        torch.testing.assert_close(gradients(lambda x: deq(x).z, deq, x), expected)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(deq(x).z, expected[0])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("adjoint", IN_ONE_GRAPH, ids=str)
def test_a_compiled_solve(make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any, mode: str) -> None:
    deq, x = make_deq(adjoint=adjoint, **FIXED).cuda(), x.cuda()
    expected = gradients(lambda x: deq(x).z, deq, x)
    layer = torch.compile(lambda x: deq(x).z, fullgraph=True, mode=mode)
    for _ in range(4):
        found = gradients(lambda x: layer(x).clone(), deq, x)
        torch.testing.assert_close(found, expected)


def test_channels_last(x: Tensor) -> None:
    kernel = nn.Conv2d(3, 3, 3, padding=1).cuda().to(memory_format=torch.channels_last)
    with torch.no_grad():
        kernel.weight.mul_(0.2)
    injection = torch.randn(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    seen: list[bool] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.is_contiguous(memory_format=torch.channels_last))
        return torch.tanh(kernel(z) + injection)

    z = solve(f, torch.zeros_like(injection), termination=Residual(1e-3)).z
    assert all(seen)
    assert z.is_contiguous(memory_format=torch.channels_last)


def test_a_state_on_another_device_than_the_default(x: Tensor) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x = x.to(device)
    solution = solve(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x))
    assert solution.z.device == device
    assert solution.status.device == device
