"""Corpora: fixed splits by position that together are the text."""

import json
import math
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.core.errors import UserError
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.data.text import digest, pydoc_topics


def _file(folder: Path, text: str) -> Path:
    path = folder / "corpus.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_splits_follow_each_other_and_are_the_whole_text(tmp_path: Path) -> None:
    text = "".join(chr(0x100 + i) for i in range(200))  # every character says where it was
    corpus = CharacterCorpusConfig(_file(tmp_path, text), 0.1, 0.2).load()
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (140, 20, 40)
    assert corpus.train_text + corpus.valid_text + corpus.test_text == text
    ids = torch.cat([corpus.train, corpus.valid, corpus.test])
    assert ids.dtype == torch.int64
    assert torch.equal(ids, torch.arange(200))


def test_description_of_a_file(tmp_path: Path) -> None:
    text = "abcd" * 25
    description = CharacterCorpusConfig(_file(tmp_path, text)).load().describe()
    assert description == {
        "name": "corpus.txt",
        "digest": digest(text),
        "num_characters": 100,
        "num_train": 90,
        "num_valid": 5,
        "num_test": 5,
        "vocabulary_size": 4,
    }


def test_default_is_the_corpus_inside_python() -> None:
    corpus = CharacterCorpusConfig().load()
    text = pydoc_topics()
    assert corpus.train_text + corpus.valid_text + corpus.test_text == text
    description = corpus.describe()
    assert description["python_version"] == platform.python_version()
    assert description["digest"] == digest(text)
    assert description["num_test"] == round(len(text) * 0.05)
    assert json.loads(json.dumps(description)) == description


@given(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(1, 300),
)
def test_every_split_has_two_characters_or_the_text_is_refused(
    tmp_path_factory: pytest.TempPathFactory, valid: float, test: float, size: int
) -> None:
    path = _file(tmp_path_factory.getbasetemp(), "x" * size)
    try:
        corpus = CharacterCorpusConfig(path, valid, test).load()
    except UserError:
        return
    sizes = [len(corpus.train), len(corpus.valid), len(corpus.test)]
    assert min(sizes) >= 2
    assert sum(sizes) == size


def test_text_too_short_to_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"20 characters .* 18 .* 1 .* 1 .* longer text"):
        CharacterCorpusConfig(_file(tmp_path, "x" * 20)).load()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_fractions_are_checked_before_anything_is_read(fraction: float) -> None:
    with pytest.raises(UserError, match="valid_fraction is"):
        CharacterCorpusConfig(valid_fraction=fraction)
    with pytest.raises(UserError, match="test_fraction is"):
        CharacterCorpusConfig(test_fraction=fraction)


def test_fractions_must_leave_text_to_train_on() -> None:
    with pytest.raises(UserError, match="no text to train on"):
        CharacterCorpusConfig(valid_fraction=0.5, test_fraction=0.5)


def test_problems_of_the_file_reach_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        CharacterCorpusConfig(tmp_path / "absent.txt").load()
