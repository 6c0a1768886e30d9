"""Copy-memory sequences: the published layout, the same for the same seed, splits apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibria import UserError
from equilibria.data.copy_memory import CopySequences, CopySequencesConfig


def _source(**options: Any) -> CopySequences:
    defaults = {"num_blanks": 6, "num_symbols": 3, "num_valid": 7, "num_test": 9}
    return CopySequencesConfig(**{**defaults, **options}).load()


def test_the_layout() -> None:
    """3 symbols, 5 blanks, a delimiter, 3 more: T + 2 n positions, and T from end to answer."""
    batch = _source().training_batch(0, 50)
    assert batch.inputs.shape == batch.targets.shape == (50, 12)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    symbols = batch.inputs[:, :3]
    assert (symbols.min(), symbols.max()) == (1, 8)
    assert batch.inputs[0, 3:].tolist() == [0, 0, 0, 0, 0, 9, 9, 9, 9]
    assert (batch.inputs[:, 3:] == batch.inputs[0, 3:]).all()
    assert (batch.targets[:, :9] == 0).all()
    assert torch.equal(batch.targets[:, 9:], symbols)


def test_the_published_length() -> None:
    source = CopySequencesConfig().load()
    batch = source.training_batch(0, 2)
    assert source.length == batch.inputs.shape[1] == 420
    assert (batch.inputs[0] == 9).sum() == 11


def test_blanks_may_follow_the_delimiter() -> None:
    batch = _source(fill="blank").training_batch(0, 2)
    assert batch.inputs[0, 3:].tolist() == [0, 0, 0, 0, 0, 9, 0, 0, 0]


def test_one_blank_is_the_delimiter_alone() -> None:
    batch = _source(num_blanks=1, num_symbols=2).training_batch(0, 1)
    assert batch.inputs[0, 2:].tolist() == [9, 9, 9]


def test_a_batch_is_known_by_its_number() -> None:
    first, again = _source().training_batch(3, 4), _source().training_batch(3, 4)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, _source().training_batch(4, 4).inputs)
    assert not torch.equal(first.inputs, _source(seed=1).training_batch(3, 4).inputs)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _source().training_batch(0, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("split", "size"), [("valid", 7), ("test", 9)])
def test_a_split_does_not_depend_on_the_batch_size(split: Any, size: int) -> None:
    source = _source()
    whole = torch.cat([batch.inputs for batch in source.evaluation_batches(split, 100)])
    parts = [batch.inputs for batch in source.evaluation_batches(split, 4)]
    assert len(whole) == size
    assert [len(part) for part in parts[:-1]] == [4] * (len(parts) - 1)
    assert torch.equal(whole, torch.cat(parts))


def test_the_splits_are_different_sequences() -> None:
    source = _source(num_symbols=10, num_valid=64, num_test=64)
    splits = [next(source.evaluation_batches(s, 64)).inputs for s in ("valid", "test")]
    rows = {tuple(row) for split in splits for row in split.tolist()}
    rows |= {tuple(row) for row in source.training_batch(0, 64).inputs.tolist()}
    assert len(rows) == 3 * 64


def test_the_description_tells_sources_apart() -> None:
    described = _source().describe()
    assert described["name"] == "copy-memory"
    assert described["length"] == 12
    assert described["digest"] == _source().describe()["digest"]
    for changes in ({"seed": 1}, {"num_blanks": 7}, {"fill": "blank"}):
        assert _source(**changes).describe()["digest"] != described["digest"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blanks": 0}, "num_blanks=0 must be"),
        ({"num_symbols": 0}, "num_symbols=0 must be"),
        ({"num_valid": 0}, "num_valid=0 must be"),
        ({"num_test": -1}, "num_test=-1 must be"),
        ({"fill": "zero"}, "fill='zero' is neither 'delimiter' nor 'blank'"),
        ({"seed": -1}, "the data's seed=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _source(**options)
