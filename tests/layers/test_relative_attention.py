"""Relative attention, term by term against the published formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equilibria.layers.relative_attention import (
    future_mask,
    relative_attention,
    relative_attention_of_next,
    relative_shift,
    sinusoids,
)


def _arguments(batch: int, heads: int, queries: int, memory: int, width: int) -> list[Tensor]:
    """Random q, k, v, positions and biases in float64, in the order of `relative_attention`."""
    generator = torch.Generator().manual_seed(0)
    keys = memory + queries
    shapes = [
        (batch, heads, queries, width),
        (batch, heads, keys, width),
        (batch, heads, keys, width),
        (heads, keys, width),
        (heads, width),
        (heads, width),
    ]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def _by_the_formula(arguments: list[Tensor], window: int | None = None) -> Tensor:
    """The four terms (a) to (d) of Transformer-XL, one score at a time; nothing is shifted."""
    q, k, v, positions, u, w = arguments
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    memory = keys - queries
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                here = memory + i
                visible = range(0 if window is None else max(here + 1 - window, 0), here + 1)
                scores = []
                for j in visible:
                    p = positions[h, keys - 1 - (memory + i - j)]  # row of distance i - j
                    terms = q[b, h, i] @ k[b, h, j] + q[b, h, i] @ p + u[h] @ k[b, h, j] + w[h] @ p
                    scores.append(terms / math.sqrt(width))
                weights = torch.stack(scores).softmax(0)
                out[b, h, i] = sum(w_ * v[b, h, j] for w_, j in zip(weights, visible, strict=True))
    return out


@given(st.integers(1, 6), st.integers(0, 5))
def test_relative_shift_is_an_index_loop(num_queries: int, memory: int) -> None:
    num_keys = num_queries + memory
    by_distance = torch.randn(2, 3, num_queries, num_keys)
    shifted = relative_shift(by_distance)
    assert shifted.shape == by_distance.shape
    for i in range(num_queries):
        for j in range(memory + i + 1):  # what lies in the future is masked and means nothing
            distance = memory + i - j
            expected = by_distance[:, :, i, num_keys - 1 - distance]
            assert torch.equal(shifted[:, :, i, j], expected)


def test_future_mask_hides_exactly_what_comes_later() -> None:
    assert future_mask(3, 5, torch.device("cpu")).tolist() == [
        [False, False, False, True, True],
        [False, False, False, False, True],
        [False, False, False, False, False],
    ]


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "memory"),
    [(2, 3, 4, 5), (1, 1, 5, 0), (2, 2, 1, 6), (1, 4, 1, 0)],
)
def test_attention_is_the_published_formula(
    batch: int, heads: int, queries: int, memory: int
) -> None:
    arguments = _arguments(batch, heads, queries, memory, width=6)
    future = future_mask(queries, memory + queries, torch.device("cpu"))
    out = relative_attention(*arguments, future)
    torch.testing.assert_close(out, _by_the_formula(arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 4, 6, 20])
@pytest.mark.parametrize("memory", [0, 5])
def test_a_window_is_the_formula_over_fewer_keys(window: int, memory: int) -> None:
    """Which reach into the memory where the window does; also where weights are dropped by ones."""
    arguments = _arguments(2, 2, 4, memory, width=6)
    future = future_mask(4, memory + 4, torch.device("cpu"), window)
    wanted = _by_the_formula(arguments, window)
    out = relative_attention(*arguments, future)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    ones = torch.ones(2, 2, 4, memory + 4, dtype=torch.float64)
    out = relative_attention(*arguments, future, ones)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_attention() -> None:
    arguments = [a.requires_grad_() for a in _arguments(1, 2, 3, 2, width=2)]
    future = future_mask(3, 5, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda *a: relative_attention(*a, future), arguments)


def test_gradients_of_attention_with_a_window_and_dropped_weights() -> None:
    arguments = [a.requires_grad_() for a in _arguments(1, 2, 3, 2, width=2)]
    future = future_mask(3, 5, torch.device("cpu"), 2)
    generator = torch.Generator().manual_seed(1)
    mask = 2.0 * torch.randint(2, (1, 2, 3, 5), generator=generator).double()
    assert torch.autograd.gradcheck(lambda *a: relative_attention(*a, future, mask), arguments)


def test_second_derivatives_of_attention() -> None:
    """A backward solve differentiates attention; a penalty on its Jacobian does so twice."""
    arguments = [a.requires_grad_() for a in _arguments(1, 1, 2, 1, width=2)]
    future = future_mask(2, 3, torch.device("cpu"))
    assert torch.autograd.gradgradcheck(lambda *a: relative_attention(*a, future), arguments)


def test_sinusoids_are_sines_then_cosines_of_falling_distances() -> None:
    num_positions, width = 5, 6
    table = sinusoids(num_positions, width, torch.empty(0, dtype=torch.float64))
    assert table.dtype == torch.float64
    for row in range(num_positions):
        distance = num_positions - 1 - row
        angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_sinusoids_have_the_width_asked_for(width: int) -> None:
    assert sinusoids(3, width, torch.empty(0)).shape == (3, width)


def test_sinusoids_of_near_positions_do_not_depend_on_how_many_there_are() -> None:
    """The last rows are the small distances, so a longer memory only adds rows in front."""
    like = torch.empty(0)
    assert torch.equal(sinusoids(50, 8, like)[-10:], sinusoids(10, 8, like))


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("memory", [0, 1, 6])
def test_attention_of_the_next_position_copies_nothing_and_is_the_same(
    memory: int, window: int | None
) -> None:
    q, k, v, *about = _arguments(batch=2, heads=3, queries=1, memory=memory, width=4)
    future = future_mask(1, memory + 1, torch.device("cpu"), window)
    found = relative_attention_of_next(
        q, k[:, :, -1:], v[:, :, -1:], k[:, :, :-1], v[:, :, :-1], *about, future
    )
    torch.testing.assert_close(found, relative_attention(q, k, v, *about, future))
