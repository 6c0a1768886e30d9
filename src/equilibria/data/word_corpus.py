"""A text of words in three files, as token ids that stay on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.data.cache import cache_folder, written_whole
from equilibria.data.known_texts import KnownText, known_text
from equilibria.data.split_files import SPLITS, SplitFiles, digest_of, find_splits, lines_of
from equilibria.data.words import Encoder, WordVocabulary

_FORMAT = 2
"""Of the encoded files and of what ids mean; with another number they are made anew."""
_CHECKED_AT_ONCE = 2**20
_MIN_SPLIT = 2  # one token to read and one to predict


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class WordCorpus:
    """Three splits as token ids, mapped into memory from one file each.

    Shape: `train`, `valid` and `test` are `(T,)`, int32, on the CPU. Pages are read as they are
    needed and given back when memory is short: a hundred million tokens take none to speak of.

    Args:
        vocabulary: the words of the training split.
        name: what to call the corpus in reports.
        digest: SHA-256 over those of the three files and the way ids are given, by which two runs
            can tell that they read the same.
        num_unknown: words of each split that the vocabulary does not have.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: WordVocabulary
    name: str
    digest: str
    num_unknown: dict[str, int]

    def describe(self) -> dict[str, object]:
        """Return what identifies the corpus, ready for JSON: name, digest and sizes."""
        return {
            "name": self.name,
            "digest": self.digest,
            "num_train": len(self.train),
            "num_valid": len(self.valid),
            "num_test": len(self.test),
            "vocabulary_size": len(self.vocabulary),
            "num_unknown": sum(self.num_unknown.values()),
        }


@dataclass(frozen=True)
class WordCorpusConfig:
    """Which text to learn, word by word."""

    name: str | None = None
    """ptb, wikitext-2 or wikitext-103: its counts are checked. None for a text of your own."""
    folder: Path | None = None
    """Where its three files are; None for where 'equilibria data get NAME' puts them."""
    cache: Path | None = None
    """Where encoded texts are kept; None for $EQUILIBRIA_CACHE or the user's cache folder."""

    def __post_init__(self) -> None:
        if self.name is not None:
            known_text(self.name)
        for field in ("folder", "cache"):
            path: Path | None = getattr(self, field)
            if path is not None:
                # absolute, so that a saved run finds its text from any working directory
                object.__setattr__(self, field, path.expanduser().absolute())
        if self.name is None and self.folder is None:
            raise UserError("give the name of a known text, or the folder of one of your own")

    def load(self) -> WordCorpus:
        """Open the text, which is encoded the first time.

        Raises:
            UserError: files that are missing or no text, foreign words without `<unk>`, a known
                text with other counts than published, a cache that cannot be written to.
        """
        files = find_splits(self._source())
        known = None if self.name is None else known_text(self.name)
        name = self.name or files.train.parent.name
        return open_corpus(files, name, cache_folder(self.cache), known)

    def _source(self) -> Path:
        if self.folder is not None:
            return self.folder
        folder = downloaded(self.name or "", self.cache)
        if not folder.is_dir():
            raise UserError(
                f"{self.name} is not on this machine; 'equilibria data get {self.name}' downloads "
                "it, or give the folder of its files (--data.folder)"
            )
        return folder


def downloaded(name: str, cache: Path | None = None) -> Path:
    """Where a known text is once it has been downloaded."""
    return cache_folder(cache) / "texts" / name


def open_corpus(
    files: SplitFiles, name: str, cache: Path, known: KnownText | None = None
) -> WordCorpus:
    """Encode three files, or find them encoded; checked against what is known of them."""
    digests = {split: digest_of(path) for split, path in zip(SPLITS, files, strict=True)}
    parts = "".join((str(_FORMAT), *digests.values()))
    digest = hashlib.sha256(parts.encode()).hexdigest()
    folder = cache / "encoded" / digest[:24]
    if not folder.is_dir():
        with written_whole(folder) as scratch:
            _encode(files, scratch)
    corpus = _opened(folder, name, digest)
    if known is not None:
        splits = (corpus.train, corpus.valid, corpus.test)
        found = {split: len(tokens) for split, tokens in zip(SPLITS, splits, strict=True)}
        check_counts(known, found, len(corpus.vocabulary))
    return corpus


def check_counts(known: KnownText, num_tokens: dict[str, int], num_words: int | None) -> None:
    """Compare with what is published.

    Raises:
        UserError: they differ.
    """
    for split, found in num_tokens.items():
        wanted = known.num_tokens[split]
        if found != wanted:
            raise UserError(
                f"the {split} split of {known.name} has {found:,} tokens here and {wanted:,} as "
                "published (words, and one <eos> per line); the file is truncated or another "
                "version: get it again, or take it as a text of your own, without a name "
                "(--data.name None)"
            )
    if num_words is not None and num_words != known.num_words:
        raise UserError(
            f"{known.name} has {num_words:,} different words here and {known.num_words:,} as "
            "published; it is another version of the text"
        )


def _encode(files: SplitFiles, folder: Path) -> None:
    """Two passes over the training split, one over the others; never more than a piece at once."""
    vocabulary = WordVocabulary.from_lines(lines_of(files.train))
    header: dict[str, Any] = {"num_tokens": {}, "num_unknown": {}}
    for split, path in zip(SPLITS, files, strict=True):
        encoder = Encoder(vocabulary, f"'{path}'")
        count = _write(encoder.chunks(lines_of(path)), folder / f"{split}.int32")
        if count < _MIN_SPLIT:
            raise UserError(f"'{path}' has {count} tokens, and a split needs at least {_MIN_SPLIT}")
        header["num_tokens"][split] = count
        header["num_unknown"][split] = encoder.num_unknown
    (folder / "vocabulary.json").write_text(vocabulary.to_json(), encoding="utf-8")
    (folder / "header.json").write_text(json.dumps(header), encoding="utf-8")


def _write(chunks: Iterable[Any], path: Path) -> int:
    count = 0
    with path.open("wb") as file:
        for chunk in chunks:
            chunk.tofile(file)
            count += len(chunk)
    return count


def _opened(folder: Path, name: str, digest: str) -> WordCorpus:
    """Map what `_encode` wrote; sizes and ids are checked, since disks fail."""
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        vocabulary = WordVocabulary.from_json(
            (folder / "vocabulary.json").read_text(encoding="utf-8")
        )
        num_unknown = {str(split): int(count) for split, count in header["num_unknown"].items()}
        train, valid, test = (
            _mapped(folder / f"{split}.int32", header["num_tokens"][split], len(vocabulary))
            for split in SPLITS
        )
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
        RecursionError,
    ) as error:  # fmt: skip
        raise UserError(
            f"the encoded text in '{folder}' is damaged ({error}); delete that folder, and it is "
            "made anew from the text"
        ) from error
    return WordCorpus(train, valid, test, vocabulary, name, digest, num_unknown)


def _mapped(path: Path, count: int, num_words: int) -> Tensor:
    size = path.stat().st_size
    if size != 4 * count:
        raise ValueError(f"{path.name} has {size} bytes instead of {4 * count}")
    with path.open("rb") as file:  # read, and not mapped: pages looked at would stay in memory
        while piece := file.read(4 * _CHECKED_AT_ONCE):
            ids = np.frombuffer(piece, np.int32)
            if ids.min() < 0 or ids.max() >= num_words:
                raise ValueError(f"{path.name} has ids that are none of {num_words} words")
    return torch.from_file(str(path), shared=False, size=count, dtype=torch.int32)
