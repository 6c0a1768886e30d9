"""A text of words in three files, encoded once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equilibria import UserError
from equilibria.data.known_texts import KNOWN_TEXTS
from equilibria.data.segments import TrainingSegments, evaluation_segments
from equilibria.data.split_files import LAYOUTS
from equilibria.data.word_corpus import WordCorpusConfig


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, write_text, cache):
    corpus = WordCorpusConfig(folder=write_text(layout)).load()
    text = corpus.vocabulary.decode(corpus.train)
    assert text == "the cat sat\n\nthe dog <unk> sat the\n"
    assert corpus.train.dtype == torch.int32
    assert corpus.num_unknown == {"train": 0, "valid": 1, "test": 2}
    assert corpus.describe()["vocabulary_size"] == 6
    assert corpus.describe()["name"] == "text"


def test_a_text_is_encoded_once(write_text, cache, monkeypatch):
    folder = write_text()
    first = WordCorpusConfig(folder=folder).load()
    monkeypatch.setattr("equilibria.data.word_corpus._encode", None)
    again = WordCorpusConfig(folder=folder).load()
    assert torch.equal(first.train, again.train)
    assert first.vocabulary == again.vocabulary
    assert first.digest == again.digest


def test_what_a_killed_process_left_is_removed(write_text, cache, monkeypatch):
    folder = write_text()
    WordCorpusConfig(folder=folder).load()
    (encoded,) = cache.glob("encoded/*")
    shutil.rmtree(encoded)
    left, being_written = (encoded.with_name(f".{encoded.name}.{name}") for name in ("a", "b"))
    for each in (left, being_written):
        each.mkdir()
        (each / "train.int32").write_bytes(b"0123")
        os.utime(each, (0, 0))
    writer = os.open(being_written, os.O_RDONLY)
    fcntl.flock(writer, fcntl.LOCK_EX)
    WordCorpusConfig(folder=folder).load()
    os.close(writer)
    assert sorted(cache.glob("encoded/*")) == [being_written, encoded]


def test_a_byte_order_mark_is_no_part_of_a_word(write_text, cache):
    folder = write_text()
    plain = WordCorpusConfig(folder=folder).load()
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = WordCorpusConfig(folder=folder).load()
    assert marked.vocabulary == plain.vocabulary
    assert torch.equal(marked.test, plain.test)


def test_another_text_is_another_corpus(write_text, cache):
    one = WordCorpusConfig(folder=write_text()).load()
    other = WordCorpusConfig(
        folder=write_text(name="other", train="a <unk>\n", valid="a a\n", test="a a\n")
    ).load()
    assert one.digest != other.digest
    assert len(other.vocabulary) == 3


def test_splits_are_read_from_the_file(write_text, cache):
    corpus = WordCorpusConfig(folder=write_text()).load()
    (path,) = cache.glob("encoded/*/train.int32")
    assert path.stat().st_size == 4 * len(corpus.train)
    segment = TrainingSegments(corpus.train, 2, 3).next_segment()
    assert segment.inputs.dtype == segment.targets.dtype == torch.int64
    assert segment.inputs[0].tolist() == corpus.train[:3].tolist()
    assert segment.targets[1].tolist() == corpus.train[6:9].tolist()
    evaluated = next(evaluation_segments(corpus.test, 1, 4))
    assert evaluated.targets.tolist() == [corpus.test[1:5].tolist()]


def test_nothing_half_written_is_left(write_text, cache, monkeypatch):
    folder = write_text(train="a b\n", valid="a c\n", test="a b\n")  # c, and no <unk>
    with pytest.raises(UserError, match="'c'"):
        WordCorpusConfig(folder=folder).load()
    assert list((cache / "encoded").iterdir()) == []


def test_a_full_disk_says_so_and_leaves_nothing(write_text, cache, monkeypatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("equilibria.data.word_corpus._write", full)
    with pytest.raises(UserError, match=r"No space left.*EQUILIBRIA_CACHE"):
        WordCorpusConfig(folder=write_text()).load()
    assert list((cache / "encoded").iterdir()) == []


@pytest.mark.parametrize("damage", ["short", "header", "vocabulary", "-1", "9"])
def test_a_damaged_cache_is_noticed(damage, write_text, cache):
    config = WordCorpusConfig(folder=write_text())
    config.load()
    (folder,) = (cache / "encoded").iterdir()
    match damage:
        case "short":
            (folder / "valid.int32").write_bytes(b"1234")
        case "header":
            (folder / "header.json").write_text("{}")
        case "-1" | "9":  # ids of no word
            data = bytearray((folder / "train.int32").read_bytes())
            data[4:8] = int(damage).to_bytes(4, sys.byteorder, signed=True)
            (folder / "train.int32").write_bytes(data)
        case _:
            (folder / "vocabulary.json").unlink()
    with pytest.raises(UserError, match="damaged.*delete that folder"):
        config.load()


def test_a_folder_without_splits(tmp_path, cache):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no split of a text, but notes.md; expected are wiki"):
        WordCorpusConfig(folder=tmp_path).load()
    with pytest.raises(UserError, match="does not exist"):
        WordCorpusConfig(folder=tmp_path / "nowhere").load()
    with pytest.raises(UserError, match="is a file"):
        WordCorpusConfig(folder=tmp_path / "notes.md").load()


def test_a_missing_split(write_text, cache):
    folder = write_text("{}.txt", train="a\n", test="a\n", validation="a\n")
    with pytest.raises(UserError, match=r"but not valid.txt; .*is validation.txt the validation"):
        WordCorpusConfig(folder=folder).load()


def test_files_of_two_texts(write_text, cache):
    write_text("ptb.{}.txt")
    with pytest.raises(UserError, match="files of several texts"):
        WordCorpusConfig(folder=write_text("{}.txt")).load()


def test_what_is_no_utf8_is_found(write_text, cache):
    folder = write_text(train=b"ok\nno\xffpe\n", valid="ok ok\n", test="ok ok\n")
    with pytest.raises(UserError, match=r"byte 5 \(line 2\) is 0xff"):
        WordCorpusConfig(folder=folder).load()


@pytest.mark.parametrize("empty", ["", " \n\n"])
def test_an_empty_split(empty, write_text, cache):
    folder = write_text(train="a b\n", valid=empty, test="a a\n")
    with pytest.raises(UserError, match=r"valid.tokens' is empty or holds only white space"):
        WordCorpusConfig(folder=folder).load()


def test_a_known_text_with_other_counts(write_text, cache):
    with pytest.raises(UserError, match=r"train split of ptb has 11 tokens here and 929,589"):
        WordCorpusConfig("ptb", write_text()).load()


def test_a_known_text_that_is_not_there(cache):
    with pytest.raises(UserError, match="equilibria data get ptb"):
        WordCorpusConfig("ptb").load()
    with pytest.raises(UserError, match="did you mean 'ptb'"):
        WordCorpusConfig("pbt")
    with pytest.raises(UserError, match="give the name of a known text, or the folder"):
        WordCorpusConfig()


@pytest.mark.parametrize("name", ["ptb", "wikitext-2"])
def test_published_counts(name, real_text, cache):
    corpus = WordCorpusConfig(name, real_text(name)).load()
    counts = {"train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)}
    assert counts == KNOWN_TEXTS[name].num_tokens
    assert len(corpus.vocabulary) == KNOWN_TEXTS[name].num_words


def test_two_processes_at_once_are_no_trouble(write_text, cache, monkeypatch):
    """One finishes while the other still writes: the first one's folder stays."""
    from equilibria.data import word_corpus

    config, encode = WordCorpusConfig(folder=write_text()), word_corpus._encode

    def overtaken(files: object, scratch: Path) -> None:
        monkeypatch.setattr(word_corpus, "_encode", encode)
        config.load()
        encode(files, scratch)

    monkeypatch.setattr(word_corpus, "_encode", overtaken)
    assert len(config.load().train) == 11
    assert len(list((cache / "encoded").iterdir())) == 1


@pytest.mark.slow
def test_ten_million_tokens_are_read_in_bounded_memory(tmp_path, cache):
    """In a process of its own, whose resident size is looked at."""
    for split, lines in (("train", 200_000), ("valid", 10), ("test", 10)):
        with (tmp_path / f"{split}.txt").open("w") as file:
            for i in range(lines):
                file.write(" ".join(str((i * 37 + j * j) % 50_000) for j in range(49)) + "\n")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from equilibria.data.word_corpus import WordCorpusConfig\n"
        "from equilibria.data.words import WordVocabulary\n"
        "size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = size()\n"
        "corpus = WordCorpusConfig(folder=Path(sys.argv[1])).load()\n"
        "assert len(corpus.train) == 10_000_000, len(corpus.train)\n"
        "print(size() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # the text has 60 MB and its ids 40: neither is ever held
    assert float(run.stdout) < 40
