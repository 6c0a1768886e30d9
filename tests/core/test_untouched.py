"""Maps that use their memory again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, Picard, Solver, UserError, solve

WEIGHT, X = 0.1 * torch.randn(5, 5), torch.randn(3, 5)


class Buffered:
    """Writes its images into buffers that take turns."""

    def __init__(self, num_buffers: int) -> None:
        self.buffers = [torch.empty(3, 5) for _ in range(num_buffers)]
        self.num_calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        out = self.buffers[self.num_calls % len(self.buffers)]
        self.num_calls += 1
        return torch.mul(z, 0.3, out=out).add_(X).tanh_()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("num_buffers", [1, 2])
def test_a_map_that_returns_its_own_buffer_is_refused(
    num_buffers: int, solver: Solver, mode: type
) -> None:
    """The images that a solver looks back at would all be the last one."""
    with mode(), pytest.raises(UserError, match=r"returned before.*clone"):
        solve(Buffered(num_buffers), torch.zeros(3, 5), solver=solver)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_that_return_the_same_tensor_without_writing_are_fine(mode: type) -> None:
    with mode():
        assert solve(lambda z: X, torch.zeros(3, 5)).converged.all()
        assert solve(lambda z: z, X).converged.all()
        assert solve(lambda z: (z @ WEIGHT).tanh_(), torch.zeros(3, 5)).converged.all()
