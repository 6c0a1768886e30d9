"""Reading text: exactly what is in the file, or one sentence that says why not."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from equilibria.core.errors import UserError
from equilibria.data.text import digest, pydoc_topics, read_text


def _write(folder: Path, content: bytes) -> Path:
    path = folder / "corpus.txt"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one\ntwo\n", "one\ntwo\n"),
        (b"\xef\xbb\xbfone\r\ntwo\r\n", "one\ntwo\n"),
        (b"lone \r stays, as do \t and  spaces \n\n", "lone \r stays, as do \t and  spaces \n\n"),
        (
            "composed \u00e9, decomposed e\u0301, \u2028".encode(),
            "composed é, decomposed e\u0301, \u2028",
        ),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),
    ],
)
def test_only_the_mark_and_line_ends_change(tmp_path: Path, content: bytes, text: str) -> None:
    assert read_text(_write(tmp_path, content)) == text


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"caf\xe9 au lait", 3), (b"\xef\xbb\xbfcaf\xe9", 6), (b"\xff\xfea\0", 0)],
)
def test_the_first_byte_that_is_not_utf8_is_named(
    tmp_path: Path, content: bytes, offset: int
) -> None:
    with pytest.raises(UserError, match=rf"not UTF-8 text: byte {offset} is 0x.*iconv"):
        read_text(_write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "is empty"), (b"\xef\xbb\xbf", "is empty"), (b" \r\n\t\n", "only white")],
)
def test_nothing_to_learn_from(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(UserError, match=what):
        read_text(_write(tmp_path, content))


def test_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    _write(tmp_path, b"text")
    with pytest.raises(UserError, match=r"no file .*did you mean 'corpus\.txt'"):
        read_text(tmp_path / "corpsu.txt")
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / "no" / "folder.txt")
    assert "did you mean" not in str(caught.value)


def test_relative_paths_are_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file") as caught:
        read_text(Path("absent.txt"))
    assert str(tmp_path) in str(caught.value)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        read_text(tmp_path)


def test_unreadable(tmp_path: Path) -> None:
    file = _write(tmp_path, b"text")
    for path in (file / "below", Path("null\0byte"), tmp_path / ("x" * 5000)):
        with pytest.raises(UserError, match="cannot be read"):
            read_text(path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user whom permissions bind"
)
def test_no_permission(tmp_path: Path) -> None:
    path = _write(tmp_path, b"text")
    path.chmod(0)
    with pytest.raises(UserError, match=r"Permission denied.*check the path and its permissions"):
        read_text(path)


def test_pydoc_topics_are_english_text_in_a_fixed_order() -> None:
    text = pydoc_topics()
    assert text == pydoc_topics()
    assert 300_000 < len(text) < 1_000_000
    assert "\r\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert text.index('The "assert" statement') < text.index('The "while" statement')


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("around", ["", "\n", "\n\n"])
def test_topics_are_joined_alike_whatever_newlines_python_stores(
    monkeypatch: pytest.MonkeyPatch, newline: str, around: str
) -> None:
    stored = {
        name: f"{around}{body}{around}".replace("\n", newline)
        for name, body in {"b": "second\n  line", "a": "first"}.items()
    }
    monkeypatch.setattr("pydoc_data.topics.topics", stored)
    assert pydoc_topics() == "first\n\nsecond\n  line\n"


def test_python_without_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # import then fails
    with pytest.raises(UserError, match="without `pydoc_data`"):
        pydoc_topics()


def test_digest_is_sha256_of_utf8() -> None:
    assert digest("é") == hashlib.sha256("é".encode()).hexdigest()
