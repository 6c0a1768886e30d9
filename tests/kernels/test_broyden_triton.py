"""The Triton step of Broyden against the plain one; what all keep is in `test_passes_triton`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria import Broyden
from equilibria.core.iterate import Iterate

pytest.importorskip("triton")

pytestmark = [
    # The interpreter computes with NumPy, which warns of the NaN that some tests are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("without_gradients", "poisoned"),
]
both_kinds = pytest.mark.parametrize("kind", ["good", "bad"])


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
    history_dtype=st.sampled_from([None, "bfloat16"]),
    views=st.booleans(),
)
def test_any_history(
    both, random_iterates, device, batch, size, history_size, rests, kind, relaxation,
    history_dtype, views,
):  # fmt: skip
    solver = Broyden(history_size, relaxation, kind=kind, fused=False, history_dtype=history_dtype)
    iterates = resting(random_iterates(len(rests) + 1, batch, size, device), rests)
    pair = both(solver, iterates[0], views=views)
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    pair.check(iterates[-1])


@both_kinds
@pytest.mark.parametrize("history_size", [35, 50])
def test_more_pairs_than_registers_hold(both, random_iterates, device, kind, history_size):
    rests = [False] * 20 + [True] + [False] * 15 + [True]
    iterates = resting(random_iterates(38, 2, 60, device), rests)
    solver = Broyden(history_size, 0.7, kind=kind, fused=False)
    pair = both(solver, iterates[0], max_steps=60)
    for iterate in iterates[:-2]:
        pair.plain(iterate)
    for iterate in iterates[-2:]:
        pair.check(iterate)


@both_kinds
def test_a_sample_lost_once_finds_back(both, random_iterates, device, kind):
    iterates = random_iterates(5, 2, 30, device)
    iterates[2].fz[0] = float("nan")
    pair = both(Broyden(3, kind=kind, fused=False), iterates[0], views=True)
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    assert torch.equal(pair.fused(iterates[-1])[0], iterates[-1].fz[0])


@both_kinds
@pytest.mark.parametrize("blocks", ["one", "several"])
def test_a_step_too_long_to_measure_is_not_kept(
    both, random_iterates, device, kind, blocks, request
):
    if blocks == "several":
        request.getfixturevalue("small_blocks")
    iterates = random_iterates(4, 2, 30, device)
    iterates[-1].z[0] = 1e200
    pair = both(Broyden(2, kind=kind, fused=False), iterates[0], views=True)
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    pair.check(iterates[-1])


@both_kinds
@pytest.mark.usefixtures("small_blocks")
def test_a_singular_update_takes_the_plain_step(both, device, kind):
    z = torch.arange(40.0, dtype=torch.float64, device=device).view(2, 20)
    iterates = [Iterate(z, z + 1.0), Iterate(2.0 * z, 2.0 * z + 1.0)]
    pair = both(Broyden(3, kind=kind, fused=False), iterates[0], views=True)
    pair.plain(iterates[0])
    assert torch.equal(pair.check(iterates[1]), iterates[1].fz)


STEPS = """
from equilibria.kernels import broyden_triton

def steps(*memory, **options):
    n = memory[-1].shape[-1]
    born = torch.zeros(2, n, dtype=torch.int64)
    for kind in ("good", "bad"):
        for count in (n - 1, n):
            broyden_triton.propose(*memory, born, count=count, kind=kind, **options)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one(compiled_kernels):
    names = ["_fused_kernel", "_gather_kernel", "_lengths_kernel", "_mix_kernel", "_weigh_kernel"]
    assert compiled_kernels(STEPS) == names
