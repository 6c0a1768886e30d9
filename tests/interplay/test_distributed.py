"""DistributedDataParallel over gloo, on the CPU, in processes of its own."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from equilibria import DEQ, Cell, Implicit, OneStep, Phantom, Residual, Unrolled
from equilibria.core.adjoint import Adjoint
from equilibria.normalizations.weight_norm import weight_norm


class TanhCell(Cell):
    """Here and not in a fixture, because other processes have to find it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.input = nn.Linear(3, 4)
        with torch.no_grad():
            self.hidden.weight.mul_(0.5)

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.hidden(z) + injection)


class Twice(nn.Module):
    """The same layer two times, with another in between."""

    def __init__(self, adjoint: Adjoint) -> None:
        super().__init__()
        cell = TanhCell()
        weight_norm(cell.hidden)
        self.deq = DEQ(cell, adjoint=adjoint, termination=Residual(1e-10), max_steps=100)
        self.back = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(self.back(self.deq(x).z)).z


def make_model(adjoint: Adjoint) -> Twice:
    torch.manual_seed(0)
    return Twice(adjoint).double()


def batch() -> Tensor:
    """Samples that take very different numbers of steps: the ranks stop at different times."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    return x * torch.tensor([[1e-3], [1.0], [10.0], [100.0]], dtype=torch.float64)


@contextmanager
def process_group(rank: int, world_size: int, folder: str) -> Generator[None]:
    """Until what is made inside, and holds the group, is gone again.

    Its threads may be about to drop Python objects, for which they need the lock that is held while
    the group is destroyed, which waits for them: PyTorch 2.13 hung there, once in many runs.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    try:
        yield
    finally:
        time.sleep(0.2)
        dist.destroy_process_group()


def train(rank: int, world_size: int, folder: str, adjoint: Adjoint, static_graph: bool) -> None:
    """Two steps on this rank's share of the batch; the gradients of the last go to a file."""
    with process_group(rank, world_size, folder):
        gradients = trained_gradients(batch().chunk(world_size)[rank], adjoint, static_graph)
        torch.save(gradients, f"{folder}/gradients{rank}.pt")


def trained_gradients(share: Tensor, adjoint: Adjoint, static_graph: bool) -> dict[str, Any]:
    model = DistributedDataParallel(make_model(adjoint), static_graph=static_graph)
    for _ in range(2):
        model.zero_grad()
        model(share).square().mean().backward()
    time.sleep(0.2)  # see above: the model holds the group, too
    return {name: p.grad for name, p in model.module.named_parameters()}


def expected_gradients(adjoint: Adjoint) -> dict[str, Tensor | None]:
    model = make_model(adjoint)
    model(batch()).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_process(tmp_path: Path) -> None:
    """In this very process."""
    adjoint = Implicit(rtol=1e-10)
    train(0, 1, str(tmp_path), adjoint, static_graph=False)
    found = torch.load(tmp_path / "gradients0.pt", weights_only=True)
    torch.testing.assert_close(found, expected_gradients(adjoint))


@pytest.mark.slow
@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize(
    "adjoint", [Implicit(rtol=1e-10), OneStep(), Phantom(), Unrolled()], ids=str
)
def test_two_processes(tmp_path: Path, adjoint: Adjoint, static_graph: bool) -> None:
    mp.spawn(train, args=(2, str(tmp_path), adjoint, static_graph), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected_gradients(adjoint))


class PyramidCell(Cell):
    """Two resolutions that see each other, as in a multiscale DEQ; the state is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.down, self.up = nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Conv2d(3, 3, 1)
        self.input = nn.Conv2d(2, 3, 3, padding=1)
        with torch.no_grad():
            for layer in (self.fine, self.coarse, self.down, self.up):
                layer.weight.mul_(0.4)

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(injection), torch.zeros_like(injection[:, :, ::2, ::2])

    def forward(self, z: tuple[Tensor, Tensor], injection: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = z
        up = nn.functional.interpolate(self.up(coarse), scale_factor=2)
        return (
            torch.tanh(self.fine(fine) + up + injection),
            torch.tanh(self.coarse(coarse) + self.down(fine)),
        )


class Pyramid(nn.Module):
    """The cell at its equilibrium, and a mean of both resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.deq = DEQ(
            PyramidCell(),
            adjoint=Implicit(rtol=1e-10),
            termination=Residual(1e-10),
            max_steps=100,
        )

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.deq(x).z
        return fine.mean((2, 3)) + coarse.square().mean((2, 3))


def make_pyramid() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid().double()


def images() -> Tensor:
    """Easy ones and hard ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64, generator=generator)
    return x * torch.tensor([1e-3, 1.0, 3.0, 10.0], dtype=torch.float64)[:, None, None, None]


def train_pyramid(rank: int, world_size: int, folder: str, strategy: str) -> None:
    """Two steps of gradient descent on this rank's share; the weights go to a file."""
    with process_group(rank, world_size, folder):
        weights = trained_weights(images().chunk(world_size)[rank], strategy)
        torch.save(weights, f"{folder}/weights{rank}.pt")


def trained_weights(share: Tensor, strategy: str) -> dict[str, Any]:
    model: nn.Module = make_pyramid()
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard

        called: nn.Module = fully_shard(model, reshard_after_forward=False)
    else:
        called = DistributedDataParallel(model)
    descend(model, called, share)
    time.sleep(0.2)  # see above: the model holds the group, too
    return {
        name: weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        for name, weight in model.state_dict().items()
    }


def descend(model: nn.Module, called: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        called(x).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_multiscale_cell_in_two_processes(tmp_path: Path, strategy: str) -> None:
    """Ranks make different numbers of evaluations, and nobody waits for ever."""
    model = make_pyramid()
    descend(model, model, images())
    mp.spawn(train_pyramid, args=(2, str(tmp_path), strategy), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"weights{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, dict(model.state_dict()))
