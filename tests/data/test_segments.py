"""Segments: every token predicted once and in order, streams that continue, exact resumption."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.core.errors import UserError
from equilibria.data.segments import (
    IGNORE_INDEX,
    Segment,
    TrainingSegments,
    evaluation_segments,
)

COUNTS = st.integers(1, 8)


def _tokens(num: int) -> torch.Tensor:
    return torch.arange(num) + 1000  # a token is its position: no two alike, none is padding


def _streams(segments: Iterable[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    segments = list(segments)
    inputs = torch.cat([segment.inputs for segment in segments], dim=1)
    return inputs, torch.cat([segment.targets for segment in segments], dim=1)


def _take(iterator: TrainingSegments, num: int) -> list[Segment]:
    return [iterator.next_segment() for _ in range(num)]


def _same(left: list[Segment], right: list[Segment]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and a.starts == b.starts
        for a, b in zip(left, right, strict=True)
    )


@given(batch_size=COUNTS, length=COUNTS, extra=st.integers(0, 100))
def test_one_training_pass(batch_size: int, length: int, extra: int) -> None:
    tokens = _tokens(batch_size * length + 1 + extra)
    segments = TrainingSegments(tokens, batch_size, length)
    passed = _take(segments, segments.num_segments_per_epoch)
    assert [segment.starts for segment in passed] == [True] + [False] * (len(passed) - 1)
    assert all(segment.inputs.shape == (batch_size, length) for segment in passed)

    inputs, targets = _streams(passed)
    assert torch.equal(targets, inputs + 1), "a target is the token after its input"
    assert torch.equal(inputs.diff(dim=1), torch.ones_like(inputs[:, 1:])), "streams continue"
    assert len(targets.unique()) == targets.numel(), "no target twice in a pass"
    dropped = len(tokens) - 1 - targets.numel()
    assert dropped < batch_size * length + batch_size, "less than a segment and a row"


@given(batch_size=COUNTS, length=COUNTS, extra=st.integers(0, 50), passes=st.integers(1, 3))
def test_passes_repeat_and_are_counted(
    batch_size: int, length: int, extra: int, passes: int
) -> None:
    segments = TrainingSegments(_tokens(batch_size * length + 1 + extra), batch_size, length)
    assert segments.epoch == 0
    first = _take(segments, segments.num_segments_per_epoch)
    for epoch in range(1, passes + 1):
        assert segments.epoch == epoch
        assert _same(_take(segments, segments.num_segments_per_epoch), first)


@given(
    batch_size=COUNTS,
    length=COUNTS,
    extra=st.integers(0, 50),
    before=st.integers(0, 40),
    after=st.integers(1, 40),
)
def test_resumed_segments_are_the_same(
    batch_size: int, length: int, extra: int, before: int, after: int
) -> None:
    tokens = _tokens(batch_size * length + 1 + extra)
    uninterrupted = TrainingSegments(tokens, batch_size, length)
    _take(uninterrupted, before)
    state = uninterrupted.state_dict()
    assert all(type(value) is int for value in state.values())

    resumed = TrainingSegments(tokens, batch_size, length)
    resumed.load_state_dict(state)
    assert resumed.epoch == uninterrupted.epoch
    assert _same(_take(resumed, after), _take(uninterrupted, after))


@given(num=st.integers(2, 200), num_streams=st.integers(1, 20), length=st.integers(1, 20))
def test_evaluation_predicts_every_token_but_the_first_once(
    num: int, num_streams: int, length: int
) -> None:
    tokens = _tokens(num)
    segments = list(evaluation_segments(tokens, num_streams, length))
    assert [segment.starts for segment in segments] == [True] + [False] * (len(segments) - 1)
    assert all(segment.inputs.shape == segment.targets.shape for segment in segments)
    assert all(segment.inputs.shape[1] == length for segment in segments[:-1])

    inputs, targets = _streams(segments)
    assert len(inputs) == min(num_streams, num - 1)
    real = targets != IGNORE_INDEX
    assert torch.equal(targets[real], tokens[1:]), "row by row, the targets are the text"
    assert torch.equal(inputs[real], tokens[:-1])
    assert (inputs[~real] == 0).all()
    assert real[:, :-1].all(), "only the last column is padded, so no row is ever all padding"
    assert real[:, 0].all()


def test_changing_a_segment_leaves_the_corpus_alone() -> None:
    tokens = _tokens(5)
    TrainingSegments(tokens, 1, 4).next_segment().inputs.zero_()
    next(evaluation_segments(tokens, 1, 4)).targets.zero_()
    assert torch.equal(tokens, _tokens(5))


def test_segments_are_contiguous_so_that_they_can_be_flattened() -> None:
    segment = TrainingSegments(_tokens(50), 4, 3).next_segment()
    assert segment.targets.view(-1).shape == (12,)


def test_text_shorter_than_one_segment_per_stream() -> None:
    TrainingSegments(_tokens(41), 4, 10)
    with pytest.raises(UserError, match=r"40 training tokens .*length 10 .* 4 streams.* 41; .*sma"):
        TrainingSegments(_tokens(40), 4, 10)


def test_evaluation_of_too_little_fails_at_the_call() -> None:
    for num in (0, 1):
        with pytest.raises(UserError, match="at least 2 tokens"):
            evaluation_segments(_tokens(num), 1, 1)


@pytest.mark.parametrize("count", [0, -1])
def test_counts_are_positive(count: int) -> None:
    for make in (TrainingSegments, evaluation_segments):
        with pytest.raises(UserError, match="at least 1"):
            make(_tokens(50), count, 4)
        with pytest.raises(UserError, match="at least 1"):
            make(_tokens(50), 4, count)


@pytest.mark.parametrize("tokens", [torch.zeros(4, 5).long(), torch.zeros(50)])
def test_tokens_are_one_sequence_of_ids(tokens: torch.Tensor) -> None:
    for make in (TrainingSegments, evaluation_segments):
        with pytest.raises(UserError, match="int64"):
            make(tokens, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"num_served": -1},
        {"num_served": True},
        {"num_served": 1.0},
        {"num_served": "1"},
        {"num_served": None},
        {"batch_size": 3},
        {"length": 6},
        {"num_tokens": 102},
        {"surplus": 0},
    ],
)
def test_saved_positions_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    segments = TrainingSegments(_tokens(101), 4, 5)
    segments.next_segment()
    before = segments.state_dict()
    with pytest.raises(UserError, match="resume"):
        segments.load_state_dict({**before, **change})
    with pytest.raises(UserError, match="resume"):
        segments.load_state_dict({})
    assert segments.state_dict() == before
