"""The Triton step of Anderson against the plain one; what all keep is in `test_passes_triton`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria import Anderson
from equilibria.core.iterate import Iterate

pytest.importorskip("triton")

pytestmark = [
    # The interpreter computes with NumPy, which warns of the NaN that some tests are about.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("without_gradients", "poisoned"),
]
both_kinds = pytest.mark.parametrize("kind", ["I", "II"])


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
            "history_dtype": st.sampled_from([None, "bfloat16"]),
        }
    ),
    views=st.booleans(),
)
def test_any_history(
    both, random_iterates, device, batch, size, history_size, num_before, settings_, views
):
    # Dependent columns that are not left out are solved only up to the ridge.
    if size < history_size and settings_["min_angle"] == 0.0:
        settings_["ridge"] = 1e-3
    solver = Anderson(history_size, fused=False, **settings_)
    iterates = random_iterates(num_before + 2, batch, size, device)
    pair = both(solver, iterates[0], views=views)
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    pair.check(iterates[-1])


@both_kinds
@pytest.mark.parametrize(("history_size", "min_angle"), [(35, 0.0), (50, 0.01)])
def test_windows_that_registers_do_not_hold(
    both, random_iterates, device, kind, history_size, min_angle
):
    iterates = random_iterates(38, 2, 60, device)
    solver = Anderson(history_size, 0.7, kind=kind, min_angle=min_angle, fused=False)
    pair = both(solver, iterates[0], max_steps=60)
    for iterate in iterates[:-2]:
        pair.plain(iterate)
    for iterate in iterates[-2:]:
        pair.check(iterate)


@both_kinds
def test_a_sample_lost_once_finds_back(both, random_iterates, device, kind):
    iterates = random_iterates(5, 2, 30, device)
    iterates[2].fz[0] = float("nan")
    solver = Anderson(3, 0.7, kind=kind, fused=False)
    pair, fresh = (both(solver, start, views=True) for start in (iterates[0], iterates[3]))
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    found = pair.fused(iterates[-1])[0]
    # Type II sees which differences were lost and goes on with the newer ones, type I does not.
    fresh.plain(iterates[3])
    wanted = fresh.plain(iterates[4])[0]
    if kind == "I":
        wanted = (iterates[4].z + 0.7 * iterates[4].residual)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@both_kinds
def test_nearly_parallel_differences_get_no_weight(both, random_iterates, device, kind):
    (first,), (shifts,) = random_iterates(1, 1, 30, device), random_iterates(1, 2, 30, device)
    pair = both(Anderson(4, kind=kind, fused=False), first)
    pair.plain(first)
    for t in (1.0, 2.0, 2.1, 5.0):
        z = first.z + t * shifts.z[:1] + 1e-4 * t * t * shifts.z[1:]
        pair.check(Iterate(z, first.fz + t * shifts.fz[:1]))


@both_kinds
@pytest.mark.usefixtures("small_blocks")
def test_a_singular_system_takes_the_plain_step(both, device, kind):
    origin = torch.zeros(1, 20, dtype=torch.float64, device=device)
    along = torch.ones_like(origin)
    iterates = [Iterate(t * along, 2.0 * t * along + 1.0) for t in (0.0, 1.0, 2.0)]
    solver = Anderson(3, kind=kind, ridge=0.0, min_angle=0.0, fused=False)
    pair = both(solver, iterates[0], views=True)
    for iterate in iterates[:-1]:
        pair.plain(iterate)
    assert torch.equal(pair.check(iterates[-1]), iterates[-1].fz)


STEPS = """
from equilibria.kernels import anderson_triton

def steps(*memory, **options):
    for kind in ("I", "II"):
        anderson_triton.propose(
            *memory, slot=0, kind=kind, ridge=1e-8, min_angle=0.01, **options
        )
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one(compiled_kernels):
    names = ["_fused_kernel", "_gather_kernel", "_mix_kernel", "_weigh_kernel"]
    assert compiled_kernels(STEPS) == names
