"""Starting where the previous call ended."""

from __future__ import annotations

import pytest
import torch

from equilibria import FixedSteps, Picard, Previous, UserError


def test_the_same_problem_is_solved_already(loop, tanh_map, data):
    run, f, z0 = loop(Previous()), tanh_map(data), torch.zeros_like(data)
    first = run(f, z0)
    assert not first.warm_started.any()
    second = run(f, z0)
    assert bool(second.warm_started.all())
    assert not second.num_steps.any()
    torch.testing.assert_close(second.z, first.z, rtol=0.0, atol=1e-7)


def test_a_problem_that_moves_slowly_is_followed(loop, tanh_map, data):
    run, z0 = loop(Previous()), torch.zeros_like(data)
    cold = run(tanh_map(data), z0).num_evals
    for frame in range(1, 4):
        solution = run(tanh_map(data + 1e-4 * frame), z0)
        assert solution.num_evals < 0.8 * cold
        assert bool(solution.converged.all())


@pytest.mark.parametrize("sizes", [(8, 5), (5, 8), (8, 0), (0, 8)])
def test_another_batch_size_starts_cold(sizes, loop, tanh_map, data):
    run = loop(Previous())
    for size in sizes:
        x = data[:size]
        solution = run(tanh_map(x), torch.zeros_like(x))
        assert not solution.warm_started.any()
    assert solution.z.shape[0] == sizes[1]


@pytest.mark.parametrize(("before", "now"), [(8, 5), (5, 8)])
def test_overlap_lets_the_common_rows_start_warm(before, now, loop, tanh_map, data):
    run = loop(Previous(on_change="overlap"))
    run(tanh_map(data[:before]), torch.zeros_like(data[:before]))
    solution = run(tanh_map(data[:now]), torch.zeros_like(data[:now]))
    assert solution.warm_started.tolist() == [True] * 5 + [False] * (now - 5)
    assert solution.num_steps[:5].tolist() == [0] * 5


def test_raise_is_for_who_relies_on_it(loop, tanh_map, data):
    run = loop(Previous(on_change="raise"))
    run(tanh_map(data), torch.zeros_like(data))
    with pytest.raises(UserError, match=r"8 samples .* 3 .*on_change='raise'.*clear\(\)"):
        run(tanh_map(data[:3]), torch.zeros_like(data[:3]))
    run.memory.clear()
    assert not run(tanh_map(data[:3]), torch.zeros_like(data[:3])).warm_started.any()


def test_another_form_starts_cold_whatever_the_sizes(loop, data):
    """(B, 24) and (B, 4, 6) have as many numbers, which mean other things."""
    for policy in ("cold", "overlap"):
        run = loop(Previous(on_change=policy))
        run(torch.cos, data)
        assert not run(torch.cos, data.view(8, 4, 6)).warm_started.any()
        assert not run(torch.cos, data[:3]).warm_started.any()


def test_another_order_in_memory_starts_cold(loop):
    run = loop(Previous())
    z0 = torch.randn(2, 3, 4, 4)
    run(torch.cos, z0)
    assert not run(torch.cos, z0.to(memory_format=torch.channels_last)).warm_started.any()


def test_another_dtype_does_not_matter(loop, tanh_map, data):
    run = loop(Previous())
    run(torch.cos, data)
    solution = run(torch.cos, data.float(), termination=FixedSteps(1), solver=Picard())
    assert bool(solution.warm_started.all())
    assert solution.z.dtype == torch.float32
    assert solution.residual.max() < 1e-6


def test_trees_and_ragged_batches(loop):
    run = loop(Previous())
    z0 = {"a": torch.zeros(4, 2), "b": torch.zeros(4, 3)}
    index = torch.tensor([0, 1, 1, 1])
    halve = {"a": 0.5, "b": 0.25}
    f = lambda z: {name: halve[name] * z[name] + 1.0 for name in z}  # noqa: E731
    for warm in (False, True):
        assert run(f, z0, segments=index).warm_started.tolist() == [warm] * 2
    # as many problems, as many rows, but other rows: not the same batch
    assert not run(f, z0, segments=torch.tensor([0, 0, 1, 1])).warm_started.any()


def test_one_global_problem(loop):
    run = loop(Previous())
    z0 = torch.tensor(1.0, dtype=torch.float64)
    for warm in (False, True):
        assert run(torch.cos, z0, batch_dims=0).warm_started.tolist() == [warm]


def test_what_is_remembered_cannot_be_written_to(loop):
    """Not through the solution, and not through z0 when the solve needed no step."""
    run = loop(Previous())
    z0 = torch.zeros(3, 2)
    solution = run(lambda z: 0.5 * z, z0)
    solution.z.fill_(9.0)
    z0.fill_(9.0)
    assert not run(lambda z: 0.5 * z, z0).num_steps.any()


def test_an_unknown_policy():
    with pytest.raises(UserError, match="on_change='colt' is not one of .*did you mean 'cold'"):
        Previous(on_change="colt")
