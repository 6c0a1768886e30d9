"""Published texts from the hub, which a test stands in for."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import pytest

from equilibria import UserError
from equilibria.data import known_texts, word_corpus
from equilibria.data.downloads import check_split, get
from equilibria.data.known_texts import KNOWN_TEXTS
from equilibria.data.word_corpus import WordCorpusConfig

ROWS = {"train": ["a b", "", "a <unk>"], "valid": ["a b"], "test": ["b"]}
TINY = replace(
    KNOWN_TEXTS["ptb"],
    num_tokens={"train": 7, "valid": 3, "test": 2},
    num_words=4,
    digests={"test": "0263829989b6fd954f72baaf2fc64bc2e2f01d692d4de72986ea808f6e99813f"},
)


def rows(known: object, split: str) -> list[str]:
    return ROWS[split]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(known_texts.KNOWN_TEXTS, "ptb", TINY)
    return TINY


def test_what_is_downloaded_can_be_trained_on(tiny, cache):
    said: list[str] = []
    folder = get(tiny, fetch=rows, say=said.append)
    assert folder == cache / "texts" / "ptb"
    assert (folder / "ptb.train.txt").read_text() == "a b\n\na <unk>\n"
    assert said == [
        "ptb train: 7 tokens, count as published",
        "ptb valid: 3 tokens, count as published",
        "ptb test: 2 tokens, count and digest as published",
    ]
    assert len(WordCorpusConfig("ptb").load().train) == 7


def test_it_is_downloaded_once(tiny, cache):
    get(tiny, fetch=rows, say=str)
    get(tiny, fetch=lambda known, split: pytest.fail("again"), say=str)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_truncated_download_is_refused_and_nothing_stays(split, tiny, cache):
    def cut(known: object, wanted: str) -> list[str]:
        return ROWS[wanted] if wanted != split else ["a"]

    with pytest.raises(UserError, match=f"the {split} split of ptb has 2 tokens here" if split
                       != "test" else "other words"):  # fmt: skip
        get(tiny, fetch=cut, say=str)
    assert list((cache / "texts").iterdir()) == []


def test_an_interrupted_download_can_be_started_again(tiny, cache):
    def dies(known: object, split: str) -> list[str]:
        if split == "valid":
            raise KeyboardInterrupt
        return ROWS[split]

    with pytest.raises(KeyboardInterrupt):
        get(tiny, fetch=dies, say=str)
    assert list((cache / "texts").iterdir()) == []
    assert get(tiny, fetch=rows, say=str).is_dir()


def test_other_words_are_noticed(tiny, tmp_path):
    path = tmp_path / "ptb.test.txt"
    path.write_text("c\n")
    with pytest.raises(UserError, match="as many tokens as published, and other words"):
        check_split(tiny, "test", path)


def test_rows_of_the_library_are_lines(tiny, cache, monkeypatch):
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str, *, split: str, revision: str | None) -> object:
        asked.append((path, name, split, revision))
        return [{"sentence": line} for line in ROWS[split.replace("validation", "valid")]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    get(tiny, say=str)
    repository, configuration = tiny.hub
    assert asked[1] == (repository, configuration, "validation", "refs/convert/parquet")


def test_a_hub_that_does_not_answer(tiny, cache, monkeypatch):
    def load_dataset(*args: object, **options: object) -> object:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"ConnectionError: no route\); check the connection"):
        get(tiny, say=str)
    assert list((cache / "texts").iterdir()) == []


def test_without_the_library(tiny, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'equilibria\[data\]'"):
        get(tiny, say=str)


def test_a_cache_that_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written to"):
        get(tiny, fetch=rows, say=str)
    assert word_corpus.cache_folder() == tmp_path / "file"
