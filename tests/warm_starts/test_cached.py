"""Starting every sample where it was when last seen."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria import Cached, FixedSteps, Picard, UserError, WarmStartMemory, solve


def test_a_second_pass_in_another_order_finds_every_sample(loop, tanh_map, data):
    run = loop(Cached(8))
    cold = {}
    for i in torch.arange(8).split(2):
        cold.update(
            zip(i.tolist(), run(tanh_map(data[i]), 0 * data[i], sample_index=i).z, strict=True)
        )
    for i in torch.tensor([5, 0, 7, 2, 1, 3, 6, 4]).split(4):
        solution = run(tanh_map(data[i]), 0 * data[i], sample_index=i)
        assert bool(solution.warm_started.all())
        assert not solution.num_steps.any()
        torch.testing.assert_close(solution.z, torch.stack([cold[k] for k in i.tolist()]))


def test_samples_that_are_not_there_start_cold_beside_those_that_are(loop, tanh_map, data):
    run = loop(Cached(8))
    run(tanh_map(data[:3]), 0 * data[:3], sample_index=[0, 1, 2])
    x = data[[4, 1, 5]]
    solution = run(tanh_map(x), 0 * x, sample_index=[4, 1, 5])
    assert solution.warm_started.tolist() == [False, True, False]
    assert solution.num_steps[1] == 0
    assert bool(solution.converged.all())


@given(
    num_entries=st.integers(1, 6),
    batches=st.lists(st.lists(st.integers(0, 9), unique=True, max_size=5), max_size=12),
)
def test_it_is_a_bounded_least_recently_used_cache(num_entries, batches):
    """Against a list of keys, the last used at the end."""
    memory, model = WarmStartMemory(), []
    for keys in batches:
        solution = solve(
            lambda z: 0.5 * z + 1.0,
            torch.ones(len(keys), 2),
            solver=Picard(),
            termination=FixedSteps(1),
            warm_start=Cached(num_entries),
            memory=memory,
            sample_index=keys,
        )
        assert solution.warm_started.tolist() == [key in model for key in keys]
        model = [key for key in model if key not in keys] + keys
        model = model[-num_entries:]
    assert list(memory.of("forward", Cached(num_entries))) == model


def test_memory_is_that_of_its_entries(loop):
    """No entry keeps its batch alive."""
    run = loop(Cached(10), solver=Picard(), termination=FixedSteps(1))
    for first in range(0, 1000, 100):
        run(lambda z: 0.5 * z + 1.0, torch.ones(100, 50), sample_index=range(first, first + 100))
    entries = run.memory.of("forward", Cached(10)).values()
    gc.collect()
    assert sum(e.numbers.untyped_storage().nbytes() for e in entries) == 10 * 50 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "float32"])
def test_a_narrower_dtype_costs_digits_of_the_start_only(dtype, loop, tanh_map, data):
    warm_start = Cached(8, dtype=dtype)
    run = loop(warm_start)
    cold = run(tanh_map(data), 0 * data, sample_index=range(8))
    warm = run(tanh_map(data), 0 * data, sample_index=range(8))
    assert 1 < warm.num_evals < cold.num_evals
    assert warm.z.dtype == torch.float64
    torch.testing.assert_close(warm.z, cold.z, rtol=0.0, atol=1e-7)
    entry = next(iter(run.memory.of("forward", warm_start).values()))
    assert str(entry.numbers.dtype).endswith(str(dtype).removeprefix("torch."))


def test_what_overflows_the_narrower_dtype_is_not_kept(loop):
    run = loop(Cached(8, dtype=torch.float16))
    f = lambda z: 0.5 * z + torch.tensor([[1.0], [1e6]])  # noqa: E731
    for warm in (False, True):
        solution = run(f, torch.zeros(2, 1), sample_index=["small", "large"])
        assert solution.warm_started.tolist() == [warm, False]


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([3, 4]),
        torch.tensor([3, 4], dtype=torch.int32),
        [3, 4],
        (3, 4),
        range(3, 5),
        list(np.array([3, 4])),
    ],
    ids=repr,
)
def test_every_way_to_write_an_integer_is_the_same_key(index, loop):
    run = loop(Cached(8))
    run(torch.cos, torch.ones(2, 1), sample_index=[3, 4])
    assert bool(run(torch.cos, torch.ones(2, 1), sample_index=index).warm_started.all())


def test_a_sample_twice_in_a_batch(loop):
    run = loop(Cached(8))
    for warm in (False, True):
        solution = run(torch.cos, torch.ones(3, 1), sample_index=["a", "a", "b"])
        assert solution.warm_started.tolist() == [warm] * 3


def test_another_form_starts_cold_and_takes_the_place(loop):
    run = loop(Cached(8))
    for shape, warm in (((2, 6), False), ((2, 2, 3), False), ((2, 2, 3), True)):
        assert run(torch.cos, torch.ones(shape), sample_index=[0, 1]).warm_started.all() == warm


def test_one_global_problem_has_one_key(loop):
    run = loop(Cached(8))
    z0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for key, warm in (("a", False), ("b", False), ("a", True)):
        solution = run(torch.cos, z0, batch_dims=0, sample_index=[key])
        assert solution.warm_started.tolist() == [warm]


def test_graphs_are_found_in_whatever_batch_they_are(loop):
    """Graphs of 1, 2 and 3 nodes; padding depends on the batch, the graph does not."""
    run = loop(Cached(8))
    nodes = {1: torch.tensor([[0.1]]), 2: torch.tensor([[0.2], [0.3]]), 3: torch.ones(3, 1)}

    def batch(*graphs):
        x = torch.cat([nodes[g] for g in graphs]).double()
        segments = torch.cat([torch.full((g,), i) for i, g in enumerate(graphs)])
        return run(lambda z: torch.cos(z + x), 0 * x, segments=segments, sample_index=graphs)

    cold = batch(1, 2)
    assert not cold.warm_started.any()
    warm = batch(3, 2, 1)
    assert warm.warm_started.tolist() == [False, True, True]
    assert warm.num_steps.tolist()[1:] == [0, 0]
    torch.testing.assert_close(warm.z[3:5], cold.z[1:3])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no sample_index was given"),
        (torch.tensor([0.0, 1.0]), r"sample_index is torch.float32; give integers"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([0, 1, 2]), r"sample_index has shape \(3,\), the solve has 2 samples"),
        (torch.tensor([[0], [1]]), r"shape \(2, 1\)"),
        ([0], r"shape \(1,\)"),
        ("ab", "sample_index is a str"),
        (7, "sample_index is a int"),
        ([[0], [1]], "holds a list, which cannot be looked up"),
        ([torch.tensor(0), torch.tensor(1)], "holds a Tensor"),
    ],
)
def test_an_index_of_the_wrong_kind(index, message, loop):
    with pytest.raises(UserError, match=message):
        loop(Cached(8))(torch.cos, torch.ones(2, 1), sample_index=index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_entries": 0}, "num_entries=0 must be an integer of at least 1"),
        ({"num_entries": 1e4}, "num_entries=10000.0"),
        ({"num_entries": 1, "dtype": torch.int8}, "dtype=torch.int8 is no floating-point dtype"),
        ({"num_entries": 1, "dtype": "half a byte"}, "dtype='half a byte' is no"),
        ({"num_entries": 1, "device": "toaster"}, "device='toaster' is no device"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Cached(**arguments)


def test_spellings_of_device_and_dtype_are_one():
    assert Cached(3, torch.device("cpu"), torch.bfloat16) == Cached(3, "cpu", "bfloat16")
