"""Memories and states on different devices."""

from __future__ import annotations

import pytest
import torch

from equilibria import Cached, Implicit, Previous, Random, WarmStartMemory, solve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "warm_start",
    [Previous(), Cached(8), Cached(8, device=None), Cached(8, "cuda", torch.bfloat16)],
    ids=repr,
)
def test_a_solve_on_the_gpu_starts_warm_both_ways(warm_start):
    memory = WarmStartMemory()
    weight = (0.1 * torch.randn(16, 16)).cuda().requires_grad_()
    x = torch.randn(8, 16, device="cuda")
    for warm in (False, True):
        solution = solve(
            lambda z: torch.tanh(z @ weight + x),
            torch.zeros_like(x),
            warm_start=warm_start,
            adjoint=Implicit(warm_start=warm_start),
            memory=memory,
            sample_index=torch.arange(8, device="cuda"),
        )
        solution.z.sum().backward()
        assert solution.z.is_cuda
        assert bool(solution.warm_started.all()) is warm
        assert (solution.backward.result.num_steps.max() < 2) == warm


def test_a_memory_made_on_another_device():
    memory = WarmStartMemory()
    settings = {"warm_start": Previous(), "memory": memory}
    solve(torch.cos, torch.ones(2, 1), **settings)
    solution = solve(torch.cos, torch.ones(2, 1, device="cuda"), **settings)
    assert solution.warm_started.is_cuda
    assert solution.warm_started.all()


def test_seeded_noise_on_the_gpu():
    starts = []
    for _ in range(2):
        settings = {"warm_start": Random(seed=1), "memory": WarmStartMemory()}
        starts.append(solve(torch.cos, torch.ones(2, 1, device="cuda"), **settings).z)
    assert torch.equal(*starts)
