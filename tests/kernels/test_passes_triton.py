"""The Triton steps of all solvers against the plain ones: what each of them has to keep."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden
from equilibria.core.iterate import Iterate

pytest.importorskip("triton")

pytestmark = [
    # The interpreter computes with NumPy, which warns of the NaN that some tests are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("without_gradients", "poisoned"),
]
every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(partial(Anderson, kind="I", fused=False), id="anderson-I"),
        pytest.param(partial(Anderson, kind="II", fused=False), id="anderson-II"),
        pytest.param(partial(Broyden, kind="good", fused=False), id="broyden-good"),
        pytest.param(partial(Broyden, kind="bad", fused=False), id="broyden-bad"),
    ],
)
with_and_without_relaxation = pytest.mark.parametrize("relaxation", [1.0, 0.7])


@pytest.fixture
def solve_both(both, device):
    """A solve of the plain solver, checked step by step; what samples 1 and 2 do is below."""

    def follow(solver, batch: int, size: int, num_steps: int, dtype: torch.dtype) -> None:
        weight = torch.randn(size, size, dtype=dtype, device=device) / size**0.5
        shift = torch.randn(batch, size, dtype=dtype, device=device)
        row = torch.arange(batch, device=device).unsqueeze(1)

        def evaluate(z: Tensor, k: int) -> Iterate:
            fz = torch.tanh(z @ weight + shift)
            # Sample 2 is lost in the fourth evaluation and for good.
            return Iterate(z, torch.where((row == 2) & (k >= 4), float("nan"), fz))

        iterate = evaluate(torch.zeros_like(shift), 0)
        pair = both(solver, iterate, max_steps=num_steps + 1, views=True)
        z = pair.plain(iterate)
        for k in range(1, num_steps + 1):
            # Sample 1 is finished after two steps and rests.
            rests = (row == 1) & (k >= 3)
            latest = evaluate(z, k)
            iterate = Iterate(
                torch.where(rests, iterate.z, latest.z), torch.where(rests, iterate.fz, latest.fz)
            )
            z = pair.check(iterate)

    return follow


@every_method
@with_and_without_relaxation
def test_one_kernel_follows_a_solve(solve_both, method, relaxation):
    solve_both(method(3, relaxation), 3, 37, 5, torch.float64)


@every_method
@with_and_without_relaxation
@pytest.mark.usefixtures("small_blocks")
def test_a_kernel_for_each_pass_follows_a_solve(solve_both, method, relaxation):
    solve_both(method(3, relaxation), 3, 37, 5, torch.float64)


@every_method
@with_and_without_relaxation
def test_single_precision(solve_both, method, relaxation):
    solve_both(method(2, relaxation), 1, 50, 4, torch.float32)


@every_method
def test_a_state_of_several_blocks(solve_both, method):
    solve_both(method(2), 1, 5000, 3, torch.float32)


@pytest.mark.gpu
@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [4096, 4097, 1_000_000])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_large_states(both, random_iterates, device, method, dtype, size):
    first, *others = random_iterates(14, 3, size, device, dtype)
    pair = both(method(10, 0.7), first)
    pair.plain(first)
    for iterate in others:
        pair.check(iterate)


@every_method
@pytest.mark.usefixtures("small_blocks")
def test_a_sample_gives_the_same_bits_whatever_it_is_batched_with(
    both, random_iterates, device, method
):
    iterates = random_iterates(5, 2, 70, device, torch.float32)
    points = []
    for rows in (slice(0, 2), slice(1, 2), slice(1, 2)):
        chosen = [Iterate(iterate.z[rows], iterate.fz[rows]) for iterate in iterates]
        pair = both(method(3), chosen[0])
        for iterate in chosen[:-1]:
            pair.plain(iterate)
        points.append(pair.fused(chosen[-1])[-1])
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[1], points[2])
