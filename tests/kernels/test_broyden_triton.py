"""The Triton step of Broyden against the plain one: in the interpreter, and on a GPU if there is.

Without a GPU the kernels run in Triton's interpreter, as Python. Whether they compile is the last
test here, which needs no GPU either.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equilibria import Broyden
from equilibria.core.iterate import Iterate

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before that
pytest.importorskip("triton")

from equilibria.kernels import broyden_triton  # noqa: E402

# The interpreter computes with NumPy, which warns of the NaN that some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device"),
]
interpreted = pytest.mark.skipif(HAS_GPU, reason="kernels are compiled where there is a GPU")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel does not write shows up as NaN."""
    nan = float("nan")
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, nan))

    def new_empty(x: Tensor, *shape: int, **options: torch.device) -> Tensor:
        return x.new_full(shape, nan if x.is_floating_point() else -1, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut even small states into blocks, one kernel for each pass."""
    monkeypatch.setattr(broyden_triton, "_FUSED_SIZE", 0)
    monkeypatch.setattr(broyden_triton, "_BLOCK", 16)


class Both:
    """A plain state, and a copy of its memory for the kernel, poisoned where nothing is yet."""

    def __init__(self, solver: Broyden, iterate: Iterate, max_steps: int, views: bool) -> None:
        self.solver, self.views = solver, views
        self.state = solver.init(iterate, max_steps)
        self.memory: list[Tensor] | None = None

    def plain(self, iterate: Iterate) -> Tensor:
        z, self.state = self.solver.propose(iterate, self.state)
        return z

    def fused(self, iterate: Iterate) -> Tensor:
        """The kernel's point, from a copy of the memory before `plain`."""
        ring, previous = self.state.vectors, self.state.previous
        if self.memory is None:
            self.memory = self.copies(len(ring))
        options = {"kind": self.solver.kind, "relaxation": self.solver.relaxation}
        count = ring.num_pushed
        if not self.views:
            return broyden_triton.Step(*self.memory, **options).propose(iterate, previous, count)
        memory = self.leading(self.memory, min(count + 1, ring.size))
        slot = count % ring.size
        return broyden_triton.propose(
            *iterate, *previous, *memory, slot=slot, count=count, **options
        )

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
        filled = len(self.state.vectors)
        *rings, squares, by_images, born = zip(
            self.leading(self.memory, filled), self.leading(self.originals(), filled), strict=True
        )
        for mine, plain in [*rings, born]:
            assert torch.equal(mine.nan_to_num(7.0), plain.nan_to_num(7.0))
        for mine, plain in [squares, by_images] if self.solver.kind == "good" else [squares]:
            scale = plain.nan_to_num(0.0).abs().amax()
            same = (mine - plain).abs() <= tolerance * scale
            assert (same | (mine.isnan() & plain.isnan())).all()
        for tensor in self.poisoned(self.memory):
            assert tensor[:, filled:].isnan().all()
        return wanted

    def originals(self) -> list[Tensor]:
        state = self.state
        rings = [state.vectors.buffer, state.image_differences.buffer]
        return [*rings, state.squares.whole, state.by_images.whole, state._born]

    def copies(self, filled: int) -> list[Tensor]:
        copies = [tensor.clone() for tensor in self.originals()]
        for tensor in self.poisoned(copies):
            tensor[:, filled:] = float("nan")
        for matrix in copies[2:4]:
            matrix[:, :, filled:] = float("nan")
        return copies

    def poisoned(self, memory: list[Tensor]) -> list[Tensor]:
        # What is in an unused slot of the bad method is used: a sample that rests keeps it.
        return memory[2:4] if self.solver.kind == "bad" else memory[:4]

    @staticmethod
    def leading(memory: list[Tensor], filled: int) -> list[Tensor]:
        vectors, images, squares, by_images, born = (tensor[:, :filled] for tensor in memory)
        return [vectors, images, squares[:, :, :filled], by_images[:, :, :filled], born]


def solve_both(
    solver: Broyden, batch: int, size: int, num_steps: int, dtype: torch.dtype, device: str
) -> None:
    """A solve of the plain solver, checked step by step; what samples 1 and 2 do is below."""
    weight = torch.randn(size, size, dtype=dtype, device=device) / size**0.5
    shift = torch.randn(batch, size, dtype=dtype, device=device)
    row = torch.arange(batch, device=device).unsqueeze(1)

    def evaluate(z: Tensor, k: int) -> Iterate:
        fz = torch.tanh(z @ weight + shift)
        # Sample 2 is lost in the fourth evaluation and for good.
        return Iterate(z, torch.where((row == 2) & (k >= 4), float("nan"), fz))

    iterate = evaluate(torch.zeros_like(shift), 0)
    both = Both(solver, iterate, num_steps + 1, views=True)
    z = both.plain(iterate)
    for k in range(1, num_steps + 1):
        # Sample 1 is finished after two steps and rests.
        rests = (row == 1) & (k >= 3)
        latest = evaluate(z, k)
        iterate = Iterate(
            torch.where(rests, iterate.z, latest.z), torch.where(rests, iterate.fz, latest.fz)
        )
        z = both.check(iterate)


@pytest.mark.parametrize("relaxation", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_one_kernel_follows_a_solve(device, kind, relaxation):
    solver = Broyden(3, relaxation, kind=kind, fused=False)
    solve_both(solver, 3, 37, 5, torch.float64, device)


@pytest.mark.parametrize("relaxation", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.usefixtures("small_blocks")
def test_a_kernel_for_each_pass_follows_a_solve(device, kind, relaxation):
    solver = Broyden(3, relaxation, kind=kind, fused=False)
    solve_both(solver, 3, 37, 5, torch.float64, device)


@pytest.mark.parametrize(("kind", "relaxation"), [("good", 0.7), ("bad", 1.0)])
def test_single_precision(device, kind, relaxation):
    solve_both(Broyden(2, relaxation, kind=kind, fused=False), 1, 50, 4, torch.float32, device)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_state_of_several_blocks(device, kind):
    solve_both(Broyden(2, kind=kind, fused=False), 1, 5000, 3, torch.float32, device)


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [4096, 4097, 1_000_000])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_large_states(device, kind, dtype, size):
    iterates = [random_iterate(3, size, dtype, device) for _ in range(14)]
    both = Both(Broyden(10, 0.7, kind=kind, fused=False), iterates[0], 20, views=False)
    both.plain(iterates[0])
    for iterate in iterates[1:]:
        both.check(iterate)


def random_iterate(batch: int, size: int, dtype: torch.dtype, device: str) -> Iterate:
    return Iterate(*torch.randn(2, batch, size, dtype=dtype, device=device))


def resting(iterates: list[Iterate], rests: list[bool]) -> list[Iterate]:
    """The same, but the first sample stays where it was at the marked places."""
    found = iterates[:1]
    for latest, stays in zip(iterates[1:], rests, strict=True):
        row = torch.arange(len(latest.z), device=latest.z.device).unsqueeze(1)
        keep, before = (row == 0) & stays, found[-1]
        # Its image may differ in rounding, which the bad method must not take for news.
        image = before.fz * (1.0 + 1e-15)
        found.append(
            Iterate(torch.where(keep, before.z, latest.z), torch.where(keep, image, latest.fz))
        )
    return found


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    size=st.integers(1, 40),
    history_size=st.integers(1, 5),
    rests=st.lists(st.booleans(), min_size=1, max_size=9),
    kind=st.sampled_from(["good", "bad"]),
    relaxation=st.sampled_from([1.0, 0.7]),
    views=st.booleans(),
)
def test_any_history(device, batch, size, history_size, rests, kind, relaxation, views):
    solver = Broyden(history_size, relaxation, kind=kind, fused=False)
    iterates = [random_iterate(batch, size, torch.float64, device) for _ in range(len(rests) + 1)]
    iterates = resting(iterates, rests)
    both = Both(solver, iterates[0], 20, views)
    for iterate in iterates[:-1]:
        both.plain(iterate)
    both.check(iterates[-1])


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("history_size", [35, 50])
def test_more_pairs_than_registers_hold(device, kind, history_size):
    iterates = [random_iterate(2, 60, torch.float64, device) for _ in range(38)]
    iterates = resting(iterates, [False] * 20 + [True] + [False] * 15 + [True])
    both = Both(Broyden(history_size, 0.7, kind=kind, fused=False), iterates[0], 60, views=False)
    for iterate in iterates[:-2]:
        both.plain(iterate)
    for iterate in iterates[-2:]:
        both.check(iterate)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_sample_lost_once_finds_back(device, kind):
    iterates = [random_iterate(2, 30, torch.float64, device) for _ in range(5)]
    iterates[2].fz[0] = float("nan")
    both = Both(Broyden(3, kind=kind, fused=False), iterates[0], 10, views=True)
    for iterate in iterates[:-1]:
        both.plain(iterate)
    assert torch.equal(both.fused(iterates[-1])[0], iterates[-1].fz[0])


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("blocks", ["one", "several"])
def test_a_step_too_long_to_measure_is_not_kept(device, kind, blocks, request):
    if blocks == "several":
        request.getfixturevalue("small_blocks")
    iterates = [random_iterate(2, 30, torch.float64, device) for _ in range(4)]
    iterates[-1].z[0] = 1e200
    both = Both(Broyden(2, kind=kind, fused=False), iterates[0], 10, views=True)
    for iterate in iterates[:-1]:
        both.plain(iterate)
    both.check(iterates[-1])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_a_singular_update_takes_the_plain_step(device, kind):
    z = torch.arange(40.0, dtype=torch.float64, device=device).view(2, 20)
    iterates = [Iterate(z, z + 1.0), Iterate(2.0 * z, 2.0 * z + 1.0)]
    both = Both(Broyden(3, kind=kind, fused=False), iterates[0], 10, views=True)
    both.plain(iterates[0])
    assert torch.equal(both.check(iterates[1]), iterates[1].fz)


@pytest.mark.usefixtures("small_blocks")
def test_a_sample_gives_the_same_bits_whatever_it_is_batched_with(device):
    iterates = [random_iterate(2, 70, torch.float32, device) for _ in range(5)]
    points = []
    for rows in (slice(0, 2), slice(1, 2), slice(1, 2)):
        chosen = [Iterate(iterate.z[rows], iterate.fz[rows]) for iterate in iterates]
        both = Both(Broyden(3, fused=False), chosen[0], 10, views=False)
        for iterate in chosen[:-1]:
            both.plain(iterate)
        points.append(both.fused(chosen[-1])[-1])
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[1], points[2])


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
from equilibria.kernels import broyden_triton as kernels

for kind in ("good", "bad"):
    for dtype, size, relaxation in ((torch.float32, 5000, 0.7), (torch.float64, 300, 1.0)):
        for n in (1, 20):
            pairs = torch.zeros(4, 2, size, dtype=dtype)
            rings = torch.zeros(2, 2, n, size, dtype=dtype)
            small = torch.zeros(2, 2, n, n, dtype=torch.float64)
            born = torch.zeros(2, n, dtype=torch.int64)
            for count in (n - 1, n):
                kernels.propose(
                    *pairs, *rings, *small, born, count=count, kind=kind, relaxation=relaxation
                )
print(*sorted(compiled))
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.split() == [
        "_fused_kernel",
        "_gather_kernel",
        "_lengths_kernel",
        "_mix_kernel",
        "_weigh_kernel",
    ], run.stderr
