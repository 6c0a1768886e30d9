"""Long token sequences as segments for truncated back-propagation.

A model with memory reads a text segment by segment and carries its state from one to the next.
For that, row `b` of each segment has to continue row `b` of the segment before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from equilibria.core.errors import UserError

IGNORE_INDEX = -100
"""Target at which there is nothing to predict; PyTorch's cross entropy skips it by default."""


class Segment(NamedTuple):
    """A piece of `B` parallel streams of text.

    Shape: `inputs` and `targets` are `(B, L)`, int64; `targets[b, t]` is the token that follows
    `inputs[b, t]`, or `IGNORE_INDEX`.
    """

    inputs: Tensor
    targets: Tensor
    starts: bool
    """The streams begin here: memory of what was read before must be cleared."""


class TrainingSegments:
    """Endless segments of `batch_size` contiguous streams cut from `tokens`.

    With `S = (T - 1) // batch_size`, stream `b` predicts tokens `b S + 1` to `(b + 1) S`, and
    segment `i` of a pass its next `length` of them. What does not fill a segment at the end of a
    stream (fewer than `length` tokens) is dropped, so that all segments have one shape.

    Args:
        tokens: `(T,)`, int64, or int32 as in a file mapped into memory; segments are int64.
        batch_size: number of streams `B`.
        length: number of targets `L` per segment, over which gradients flow.

    Raises:
        UserError: when a count is below 1, or the tokens do not fill one segment per stream.
    """

    def __init__(self, tokens: Tensor, batch_size: int, length: int) -> None:
        _check_tokens(tokens)
        _check_count("batch_size", batch_size)
        _check_count("length", length)
        needed = batch_size * length + 1
        if len(tokens) < needed:
            raise UserError(
                f"{len(tokens)} training tokens cannot fill one segment of length {length} for "
                f"each of {batch_size} streams, which takes {needed}; choose a smaller "
                "batch_size or segment length, or a longer text"
            )
        self._num_tokens = len(tokens)
        self._batch_size = batch_size
        self._length = length
        stream_length = (len(tokens) - 1) // batch_size
        used = batch_size * stream_length
        self._inputs = tokens[:used].reshape(batch_size, stream_length)
        self._targets = tokens[1 : used + 1].reshape(batch_size, stream_length)
        self._num_served = 0

    @property
    def num_segments_per_epoch(self) -> int:
        """Number of segments in one pass over the text."""
        return self._inputs.shape[1] // self._length

    @property
    def epoch(self) -> int:
        """Number of complete passes over the text so far."""
        return self._num_served // self.num_segments_per_epoch

    def next_segment(self) -> Segment:
        """Return the next segment, after the last one of a pass the first one again.

        The tensors are copies: changing them leaves the corpus alone.
        """
        position = self._num_served % self.num_segments_per_epoch
        self._num_served += 1
        columns = slice(position * self._length, (position + 1) * self._length)
        return Segment(
            inputs=_copy(self._inputs[:, columns]),
            targets=_copy(self._targets[:, columns]),
            starts=position == 0,
        )

    def state_dict(self) -> dict[str, int]:
        """Return where this iterator stands and how it was cut, as plain integers."""
        return {
            "num_served": self._num_served,
            "num_tokens": self._num_tokens,
            "batch_size": self._batch_size,
            "length": self._length,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken; the memory of the model has to be restored too.

        Raises:
            UserError: when `state` is malformed, or comes from another text or other settings,
                with which the same count would mean another place in the text.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise UserError(
                f"the saved position in the text has the entries {sorted(map(str, state))} "
                f"instead of {sorted(own)}; resume from a checkpoint of this version"
            )
        saved = {name: _saved_count(name, value) for name, value in state.items()}
        for name in ("num_tokens", "batch_size", "length"):
            if saved[name] != own[name]:
                raise UserError(
                    f"the checkpoint was written with {name} = {saved[name]} and this run has "
                    f"{own[name]}; resume with the same text, batch size and segment length"
                )
        self._num_served = saved["num_served"]


def evaluation_segments(tokens: Tensor, num_streams: int, length: int) -> Iterator[Segment]:
    """Iterate once over `tokens` so that every token but the first is a target exactly once.

    The targets are cut into `num_streams` contiguous streams whose sizes differ by at most one;
    the shorter ones end in one input 0 with target `IGNORE_INDEX`. The last segment may be
    shorter than `length`. With fewer targets than streams, each target is a stream.

    More streams are faster, but each begins without context: one stream gives the score of the
    text read from end to end, as published numbers usually are.

    Args:
        tokens: `(T,)`, int64 or int32, at least two.
        num_streams: number of rows of the segments.
        length: number of targets per segment.

    Raises:
        UserError: at the call and not at the first segment, when a count is below 1 or there
            are fewer than two tokens.
    """
    _check_tokens(tokens)
    _check_count("num_streams", num_streams)
    _check_count("length", length)
    if len(tokens) < 2:
        raise UserError(
            f"evaluation needs at least 2 tokens, one to read and one to predict, and got "
            f"{len(tokens)}; give a longer text"
        )
    num_streams = min(num_streams, len(tokens) - 1)
    inputs = _pad(tokens[:-1].tensor_split(num_streams), 0)
    targets = _pad(tokens[1:].tensor_split(num_streams), IGNORE_INDEX)
    return _walk(inputs, targets, length)


def _walk(inputs: Tensor, targets: Tensor, length: int) -> Iterator[Segment]:
    for start in range(0, inputs.shape[1], length):
        columns = slice(start, start + length)
        yield Segment(_copy(inputs[:, columns]), _copy(targets[:, columns]), starts=start == 0)


def _pad(streams: tuple[Tensor, ...], value: int) -> Tensor:
    return pad_sequence(list(streams), batch_first=True, padding_value=value)


def _copy(view: Tensor) -> Tensor:
    # Contiguous, so that callers may flatten with view().
    return view.to(torch.int64, copy=True, memory_format=torch.contiguous_format)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.dim() != 1 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"expected one sequence of int64 or int32 tokens of shape (T,), got shape "
            f"{tuple(tokens.shape)} and {tokens.dtype}; pass what a vocabulary's encode returns"
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}; give a whole number of at least 1")


def _saved_count(name: str, value: object) -> int:
    if type(value) is not int or value < 0:  # type(), because a bool is an int to isinstance
        raise UserError(
            f"the saved position in the text has {name} = {value!r} where a whole number of at "
            "least 0 belongs; the checkpoint is damaged, resume from another one"
        )
    return value
