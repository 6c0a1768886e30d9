"""What the tests of the Triton steps share: where they run, and a solver beside its kernel.

Without a GPU the kernels run in Triton's interpreter, as Python, and that they compile is tested
on its own. With one they are compiled, and the interpreter is not asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, Solver
from equilibria.core.history import Ring
from equilibria.core.iterate import Iterate

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: on the GPU if there is one."""
    has_gpu = torch.cuda.is_available()
    if request.param == "cuda" and not has_gpu:
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and has_gpu:
        pytest.skip("kernels are compiled where there is a GPU")
    return request.param


@pytest.fixture
def without_gradients() -> Generator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel does not write shows up as NaN."""
    nan = float("nan")
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, nan))

    def new_empty(x: Tensor, *shape: int, **options: torch.device) -> Tensor:
        return x.new_full(shape, nan if x.is_floating_point() else -1, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small states into blocks, one kernel for each pass."""
    monkeypatch.setattr("equilibria.kernels.passes_triton.FUSED_SIZE", 0)
    monkeypatch.setattr("equilibria.kernels.passes_triton.BLOCK", 16)


@pytest.fixture(scope="session")
def random_iterates() -> Callable[..., list[Iterate]]:
    def draw(
        number: int, batch: int, size: int, device: str, dtype: torch.dtype = torch.float64
    ) -> list[Iterate]:
        draws = (torch.randn(2, batch, size, dtype=dtype, device=device) for _ in range(number))
        return [Iterate(*pair) for pair in draws]

    return draw


# --- A solver beside its kernel ----------------------------------------------------------------


class Both(ABC):
    """A plain state, and a copy of its memory for the kernel, poisoned where nothing is yet."""

    poisoned = slice(4)
    """What of the memory may hold anything where nothing has been written."""

    def __init__(self, solver: Any, iterate: Iterate, max_steps: int, views: bool) -> None:
        self.solver, self.views = solver, views
        self.state = solver.init(iterate, max_steps)
        self.memory: list[Tensor] = []

    def plain(self, iterate: Iterate) -> Tensor:
        z, self.state = self.solver.propose(iterate, self.state)
        return z

    def fused(self, iterate: Iterate) -> Tensor:
        """The kernel's point, from a copy of the memory before `plain`."""
        count, size = self.ring.num_pushed, self.ring.size
        self.memory = self.memory or self.copies(len(self.ring))
        filled = min(count + 1, size)
        if not self.views:
            return self.step(iterate, count, filled)
        return self.propose(iterate, self.leading(self.memory, filled), count % size, count)

    def check(self, iterate: Iterate) -> Tensor:
        """Both points agree, and so does what has been written; the plain point."""
        found, wanted = self.fused(iterate), self.plain(iterate)
        tolerance = TOLERANCE[wanted.dtype]
        finite = wanted.isfinite().all(1)
        step = torch.linalg.vector_norm(wanted - iterate.z, dim=1)
        error = torch.linalg.vector_norm(found - wanted, dim=1)
        assert (error <= tolerance * step)[finite].all(), (error / step, self.solver)
        # A NaN in f(z) is a NaN in the point; otherwise a step that is not finite may be mended.
        assert found[~iterate.fz.isfinite().all(1)].isnan().any(1).all()
        filled = len(self.ring)
        mine, plain = (self.leading(x, filled) for x in (self.memory, self.originals()))
        for i in range(len(mine)):
            if i in self.matrices:
                scale = plain[i].nan_to_num(0.0).abs().amax()
                same = (mine[i] - plain[i]).abs() <= tolerance * scale
                assert (same | (mine[i].isnan() & plain[i].isnan())).all()
            elif i not in (2, 3):
                assert torch.equal(mine[i].nan_to_num(7.0), plain[i].nan_to_num(7.0))
        for tensor in self.memory[self.poisoned]:
            assert tensor[:, filled:].isnan().all()
        return wanted

    def copies(self, filled: int) -> list[Tensor]:
        copies = [tensor.clone() for tensor in self.originals()]
        for tensor in copies[self.poisoned]:
            tensor[:, filled:] = float("nan")
        for matrix in copies[2:4]:
            matrix[:, :, filled:] = float("nan")
        return copies

    @staticmethod
    def leading(memory: list[Tensor], filled: int) -> list[Tensor]:
        return [
            x[:, :filled, :filled] if i in (2, 3) else x[:, :filled] for i, x in enumerate(memory)
        ]

    @property
    @abstractmethod
    def matrices(self) -> tuple[int, ...]:
        """Which small matrices are used: their places in the memory, out of 2 and 3."""

    @property
    @abstractmethod
    def ring(self) -> Ring: ...

    @abstractmethod
    def originals(self) -> list[Tensor]:
        """The memory of the plain state: two rings, two small matrices, and what else there is."""

    @abstractmethod
    def step(self, iterate: Iterate, count: int, filled: int) -> Tensor:
        """The point that `Step` makes, on the whole memory."""

    @abstractmethod
    def propose(self, iterate: Iterate, memory: list[Tensor], slot: int, count: int) -> Tensor:
        """The point that `propose` makes, on filled slots only."""


class BothAndersons(Both):
    @property
    def matrices(self) -> tuple[int, ...]:
        return (2, 3) if self.solver.kind == "I" else (3,)

    @property
    def ring(self) -> Ring:
        return self.state.test_differences

    def originals(self) -> list[Tensor]:
        state = self.state
        rings = [state.test_differences.buffer, state.image_differences.buffer]
        return [*rings, state.squares.whole, state.gram.whole]

    @property
    def options(self) -> dict[str, Any]:
        return {
            name: getattr(self.solver, name)
            for name in ("kind", "ridge", "min_angle", "relaxation")
        }

    def step(self, iterate: Iterate, count: int, filled: int) -> Tensor:
        from equilibria.kernels import anderson_triton

        step = anderson_triton.Step(*self.memory, **self.options)
        return step.propose(iterate, self.state.previous, count % self.ring.size, filled)

    def propose(self, iterate: Iterate, memory: list[Tensor], slot: int, count: int) -> Tensor:
        from equilibria.kernels import anderson_triton

        pair = (*iterate, *self.state.previous)
        return anderson_triton.propose(*pair, *memory, slot=slot, **self.options)


class BothBroydens(Both):
    def __init__(self, solver: Any, iterate: Iterate, max_steps: int, views: bool) -> None:
        super().__init__(solver, iterate, max_steps, views)
        if solver.kind == "bad":
            # What is in an unused slot is used: a sample that rests keeps it.
            self.poisoned = slice(2, 4)

    @property
    def matrices(self) -> tuple[int, ...]:
        return (2, 3) if self.solver.kind == "good" else (2,)

    @property
    def ring(self) -> Ring:
        return self.state.vectors

    def originals(self) -> list[Tensor]:
        state = self.state
        rings = [state.vectors.buffer, state.image_differences.buffer]
        return [*rings, state.squares.whole, state.by_images.whole, state._born]

    @property
    def options(self) -> dict[str, Any]:
        return {"kind": self.solver.kind, "relaxation": self.solver.relaxation}

    def step(self, iterate: Iterate, count: int, filled: int) -> Tensor:
        from equilibria.kernels import broyden_triton

        step = broyden_triton.Step(*self.memory, **self.options)
        return step.propose(iterate, self.state.previous, count)

    def propose(self, iterate: Iterate, memory: list[Tensor], slot: int, count: int) -> Tensor:
        from equilibria.kernels import broyden_triton

        pair = (*iterate, *self.state.previous)
        return broyden_triton.propose(*pair, *memory, slot=slot, count=count, **self.options)


@pytest.fixture(scope="session")
def both() -> Callable[..., Both]:
    """Makes a `Both` of a solver and its first iterate."""

    def make(solver: Solver, iterate: Iterate, *, max_steps: int = 20, views: bool = False) -> Both:
        one = {Anderson: BothAndersons, Broyden: BothBroydens}[type(solver)]
        return one(solver, iterate, max_steps, views)

    return make


# --- Compilation without a GPU -----------------------------------------------------------------

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
compiled = set()

def compile_only(kernel, grid):
    def launch(*args, **options):
        assert kernel.warmup(*args, grid=grid, **options).asm["cubin"]
        compiled.add(kernel.fn.__name__)
    return launch

JITFunction.__getitem__ = compile_only

for dtype, size, relaxation in ((torch.float32, 5000, 0.7), (torch.float64, 300, 1.0)):
    for n in (1, 20):
        pairs = torch.zeros(4, 2, size, dtype=dtype)
        rings = torch.zeros(2, 2, n, size, dtype=dtype)
        small = torch.zeros(2, 2, n, n, dtype=torch.float64)
        steps(*pairs, *rings, *small, relaxation=relaxation)
print(*sorted(compiled))
"""


@pytest.fixture
def compiled_kernels() -> Callable[[str], list[str]]:
    """Names of the kernels that `steps`, a function in the given code, has compiled for an H100.

    It gets pairs, rings and small matrices for a few sizes and precisions, and the relaxation.
    """

    def names(steps: str) -> list[str]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", steps + COMPILE],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    return names
