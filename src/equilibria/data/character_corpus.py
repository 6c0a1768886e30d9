"""Any text file, or Python's own language reference, as a character-level corpus."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.data.characters import CharacterVocabulary
from equilibria.data.text import digest, pydoc_topics, read_text

_MIN_SPLIT = 2  # one character to read and one to predict


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class TextCorpus:
    """A text as token ids, cut by position: training text first, then validation, then test.

    Shape: `train`, `valid` and `test` are `(T,)`, int64, on the CPU; together they are the text.

    Args:
        vocabulary: the characters of the whole text, as `CharacterCorpusConfig.load` explains.
        name: what to call the corpus in reports.
        digest: SHA-256 of the whole text, by which two runs can tell that they read the same.
        python_version: set when the text comes from Python itself and varies with its version.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: CharacterVocabulary
    name: str
    digest: str
    python_version: str | None = None

    @property
    def train_text(self) -> str:
        """The training split as text, decoded anew at each access."""
        return self.vocabulary.decode(self.train)

    @property
    def valid_text(self) -> str:
        """The validation split as text, decoded anew at each access."""
        return self.vocabulary.decode(self.valid)

    @property
    def test_text(self) -> str:
        """The test split as text, decoded anew at each access."""
        return self.vocabulary.decode(self.test)

    def describe(self) -> dict[str, object]:
        """Return what identifies the corpus, ready for JSON: name, digest and sizes."""
        description: dict[str, object] = {
            "name": self.name,
            "digest": self.digest,
            "num_characters": len(self.train) + len(self.valid) + len(self.test),
            "num_train": len(self.train),
            "num_valid": len(self.valid),
            "num_test": len(self.test),
            "vocabulary_size": len(self.vocabulary),
        }
        if self.python_version is not None:
            description["python_version"] = self.python_version
        return description


@dataclass(frozen=True)
class CharacterCorpusConfig:
    """Which text to learn, character by character, and how to split it.

    Args:
        path: a UTF-8 text file; None for the language reference inside CPython, which needs
            no download.
        valid_fraction: share of the characters for validation.
        test_fraction: share of the characters for the test, taken from the end of the text.
            The 5% of each default follows enwik8's and text8's 90/5/5 convention.

    Raises:
        UserError: when a fraction is not strictly between 0 and 1, or nothing is left to train on.
    """

    path: Path | None = None
    valid_fraction: float = 0.05
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.path is not None:
            # absolute, so that a saved run finds its text from any working directory
            object.__setattr__(self, "path", self.path.expanduser().absolute())
        _check_fraction("valid_fraction", self.valid_fraction)
        _check_fraction("test_fraction", self.test_fraction)
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} "
                "leave no text to train on; make them sum to less than 1"
            )

    def load(self) -> TextCorpus:
        """Read, encode and split the text.

        The vocabulary is that of the whole file, test split included, as is the convention for
        character-level sets (enwik8, text8): which characters exist is taken as
        given, so that every test character has a probability and results compare.

        Raises:
            UserError: when the text cannot be read, or a split has fewer than 2 characters.
        """
        text = pydoc_topics() if self.path is None else read_text(self.path)
        vocabulary = CharacterVocabulary.from_text(text)
        train, valid, test = torch.split(vocabulary.encode(text), self._split_sizes(len(text)))
        return TextCorpus(
            train=train,
            valid=valid,
            test=test,
            vocabulary=vocabulary,
            name="pydoc-topics" if self.path is None else self.path.name,
            digest=digest(text),
            python_version=platform.python_version() if self.path is None else None,
        )

    def _split_sizes(self, num_characters: int) -> list[int]:
        num_valid = round(num_characters * self.valid_fraction)
        num_test = round(num_characters * self.test_fraction)
        sizes = [num_characters - num_valid - num_test, num_valid, num_test]
        if min(sizes) < _MIN_SPLIT:
            raise UserError(
                f"a text of {num_characters} characters splits into {sizes[0]} for training, "
                f"{num_valid} for validation and {num_test} for the test, and each needs at least "
                f"{_MIN_SPLIT}; give a longer text or change valid_fraction and test_fraction"
            )
        return sizes


def _check_fraction(name: str, fraction: float) -> None:
    if not 0 < fraction < 1:  # also refuses NaN
        raise UserError(f"{name} is {fraction}; give a share between 0 and 1, such as 0.05")
