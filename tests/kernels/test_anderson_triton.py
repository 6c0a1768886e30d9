"""The Triton step of Anderson against the plain one: in the interpreter, and on a GPU if there is.

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

from equilibria import Anderson
from equilibria.core.iterate import Iterate

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before that
pytest.importorskip("triton")

from equilibria.kernels import anderson_triton  # noqa: E402

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
    monkeypatch.setattr(anderson_triton, "_FUSED_SIZE", 0)
    monkeypatch.setattr(anderson_triton, "_BLOCK", 16)


class Both:
    """A plain state, and a copy of its memory for the kernel, poisoned where nothing is yet."""

    def __init__(self, solver: Anderson, iterate: Iterate, max_steps: int, views: bool) -> None:
        self.solver, self.views = solver, views
        self.state = solver.init(iterate, max_steps)
        self.memory: list[Tensor] | None = None

    def plain(self, iterate: Iterate) -> Tensor:
        z, self.state = self.solver.propose(iterate, self.state)
        return z

    def fused(self, iterate: Iterate) -> Tensor:
        """The kernel's point, from a copy of the memory before `plain`."""
        ring, previous = self.state.test_differences, self.state.previous
        if self.memory is None:
            self.memory = self.copies(len(ring))
        slot, filled = ring.num_pushed % ring.size, min(ring.num_pushed + 1, ring.size)
        names = ("kind", "ridge", "min_angle", "relaxation")
        options = {name: getattr(self.solver, name) for name in names}
        if not self.views:
            step = anderson_triton.Step(*self.memory, **options)
            return step.propose(iterate, previous, slot, filled)
        memory = self.leading(self.memory, filled)
        return anderson_triton.propose(*iterate, *previous, *memory, slot=slot, **options)

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
        filled = len(self.state.test_differences)
        *rings, squares, gram = zip(
            self.leading(self.memory, filled), self.leading(self.originals(), filled), strict=True
        )
        for mine, plain in rings:
            assert torch.equal(mine.nan_to_num(7.0), plain.nan_to_num(7.0))
        for mine, plain in [gram, squares] if self.solver.kind == "I" else [gram]:
            scale = plain.nan_to_num(0.0).abs().amax()
            same = (mine - plain).abs() <= tolerance * scale
            assert (same | (mine.isnan() & plain.isnan())).all()
        for tensor in self.memory:
            assert tensor[:, filled:].isnan().all()
        return wanted

    def originals(self) -> list[Tensor]:
        state = self.state
        rings = [state.test_differences.buffer, state.image_differences.buffer]
        return [*rings, state.squares.whole, state.gram.whole]

    def copies(self, filled: int) -> list[Tensor]:
        copies = [tensor.clone() for tensor in self.originals()]
        for tensor in copies:
            tensor[:, filled:] = float("nan")
        for matrix in copies[2:]:
            matrix[:, :, filled:] = float("nan")
        return copies

    @staticmethod
    def leading(memory: list[Tensor], filled: int) -> list[Tensor]:
        return [x[:, :filled] if i < 2 else x[:, :filled, :filled] for i, x in enumerate(memory)]


def solve_both(
    solver: Anderson, batch: int, size: int, num_steps: int, dtype: torch.dtype, device: str
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
@pytest.mark.parametrize("kind", ["I", "II"])
def test_one_kernel_follows_a_solve(device, kind, relaxation):
    solver = Anderson(3, relaxation, kind=kind, fused=False)
    solve_both(solver, 3, 37, 5, torch.float64, device)


@pytest.mark.parametrize("relaxation", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.usefixtures("small_blocks")
def test_three_kernels_follow_a_solve(device, kind, relaxation):
    solver = Anderson(3, relaxation, kind=kind, fused=False)
    solve_both(solver, 3, 37, 5, torch.float64, device)


@pytest.mark.parametrize(("kind", "relaxation"), [("I", 0.7), ("II", 1.0)])
def test_single_precision(device, kind, relaxation):
    solve_both(Anderson(2, relaxation, kind=kind, fused=False), 1, 50, 4, torch.float32, device)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_state_of_several_blocks(device, kind):
    solve_both(Anderson(2, kind=kind, fused=False), 1, 5000, 3, torch.float32, device)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [4096, 4097, 1_000_000])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_large_states(device, kind, dtype, size):
    iterates = [random_iterate(3, size, dtype, device) for _ in range(14)]
    both = Both(Anderson(10, 0.7, kind=kind, fused=False), iterates[0], 20, views=False)
    both.plain(iterates[0])
    for iterate in iterates[1:]:
        both.check(iterate)


def random_iterate(batch: int, size: int, dtype: torch.dtype, device: str) -> Iterate:
    return Iterate(*torch.randn(2, batch, size, dtype=dtype, device=device))


@settings(max_examples=20)
@given(
    batch=st.integers(1, 2),
    size=st.integers(1, 40),
    history_size=st.integers(1, 5),
    num_before=st.integers(0, 8),
    settings_=st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["I", "II"]),
            "relaxation": st.sampled_from([1.0, 0.7]),
            "min_angle": st.sampled_from([0.0, 0.01, 0.5]),
            "ridge": st.sampled_from([1e-8, 1e-3]),
        }
    ),
    views=st.booleans(),
)
def test_any_history(device, batch, size, history_size, num_before, settings_, views):
    # Dependent columns that are not left out are solved only up to the ridge.
    if size < history_size and settings_["min_angle"] == 0.0:
        settings_["ridge"] = 1e-3
    solver = Anderson(history_size, fused=False, **settings_)
    iterates = [random_iterate(batch, size, torch.float64, device) for _ in range(num_before + 2)]
    both = Both(solver, iterates[0], 20, views)
    for iterate in iterates[:-1]:
        both.plain(iterate)
    both.check(iterates[-1])


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize(("history_size", "min_angle"), [(35, 0.0), (50, 0.01)])
def test_windows_that_registers_do_not_hold(device, kind, history_size, min_angle):
    iterates = [random_iterate(2, 60, torch.float64, device) for _ in range(38)]
    solver = Anderson(history_size, 0.7, kind=kind, min_angle=min_angle, fused=False)
    both = Both(solver, iterates[0], 60, views=False)
    for iterate in iterates[:-2]:
        both.plain(iterate)
    for iterate in iterates[-2:]:
        both.check(iterate)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_sample_lost_once_finds_back(device, kind):
    iterates = [random_iterate(2, 30, torch.float64, device) for _ in range(5)]
    iterates[2].fz[0] = float("nan")
    solver = Anderson(3, 0.7, kind=kind, fused=False)
    both, fresh = (Both(solver, start, 10, views=True) for start in (iterates[0], iterates[3]))
    for iterate in iterates[:-1]:
        both.plain(iterate)
    found = both.fused(iterates[-1])[0]
    # Type II sees which differences were lost and goes on with the newer ones, type I does not.
    fresh.plain(iterates[3])
    wanted = fresh.plain(iterates[4])[0]
    if kind == "I":
        wanted = (iterates[4].z + 0.7 * iterates[4].residual)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_nearly_parallel_differences_get_no_weight(device, kind):
    first = random_iterate(1, 30, torch.float64, device)
    shifts = random_iterate(2, 30, torch.float64, device)
    lengths = [1.0, 2.0, 2.1, 5.0]
    iterates = [
        Iterate(
            first.z + t * shifts.z[:1] + 1e-4 * t * t * shifts.z[1:], first.fz + t * shifts.fz[:1]
        )
        for t in lengths
    ]
    both = Both(Anderson(4, kind=kind, fused=False), first, 10, views=False)
    both.plain(first)
    for iterate in iterates:
        both.check(iterate)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["I", "II"])
def test_a_singular_system_takes_the_plain_step(device, kind):
    origin = torch.zeros(1, 20, dtype=torch.float64, device=device)
    along = torch.ones_like(origin)
    iterates = [Iterate(t * along, 2.0 * t * along + 1.0) for t in (0.0, 1.0, 2.0)]
    both = Both(
        Anderson(3, kind=kind, ridge=0.0, min_angle=0.0, fused=False), iterates[0], 10, views=True
    )
    for iterate in iterates[:-1]:
        both.plain(iterate)
    assert torch.equal(both.check(iterates[-1]), iterates[-1].fz)


@pytest.mark.usefixtures("small_blocks")
def test_a_sample_gives_the_same_bits_whatever_it_is_batched_with(device):
    iterates = [random_iterate(2, 70, torch.float32, device) for _ in range(5)]
    points = []
    for rows in (slice(0, 2), slice(1, 2), slice(1, 2)):
        chosen = [Iterate(iterate.z[rows], iterate.fz[rows]) for iterate in iterates]
        both = Both(Anderson(3, fused=False), chosen[0], 10, views=False)
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
from equilibria.kernels import anderson_triton as kernels

for kind in ("I", "II"):
    for dtype, size, relaxation in ((torch.float32, 5000, 0.7), (torch.float64, 300, 1.0)):
        for n in (1, 20):
            pairs = torch.zeros(4, 2, size, dtype=dtype)
            rings = torch.zeros(2, 2, n, size, dtype=dtype)
            small = torch.zeros(2, 2, n, n, dtype=torch.float64)
            kernels.propose(
                *pairs, *rings, *small, slot=0, kind=kind, ridge=1e-8, min_angle=0.01,
                relaxation=relaxation,
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
        "_mix_kernel",
        "_weigh_kernel",
    ], run.stderr
