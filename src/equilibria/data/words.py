"""Words as token ids."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor

from equilibria.core.errors import UserError

END_OF_LINE = "<eos>"
"""The token at the end of every line, empty ones included, as in the published sets."""
UNKNOWN = "<unk>"
"""What published sets have in the place of rare words."""

_NUM_NAMED = 5  # foreign words spelled out in a message


@dataclass(frozen=True)
class WordVocabulary:
    """A fixed set of words, each with its position as id.

    Args:
        words: in id order, `END_OF_LINE` among them.

    Raises:
        UserError: no words, one that occurs twice or has white space in it, no `END_OF_LINE`.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(word, str) and word for word in self.words):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _damaged("a word is empty or no text")
        if len(self.ids) != len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise _damaged(f"{twice!r} occurs twice")
        if END_OF_LINE not in self.ids:
            raise _damaged(f"{END_OF_LINE} is not among its words")

    @classmethod
    def from_lines(cls, lines: Iterable[str]) -> Self:
        """`END_OF_LINE` and the words of a text, most frequent first, of equals the first to occur.

        The order of Transformer-XL, whose checkpoints can be read because of that. From the
        training split only: what occurs in others alone is unknown to the model.
        """
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(line.split())
        counts.pop(END_OF_LINE, None)
        # sorted() keeps the order of equals, which is that of their first occurrence
        return cls((END_OF_LINE, *sorted(counts, key=counts.__getitem__, reverse=True)))

    @classmethod
    def from_json(cls, stored: str) -> Self:
        """Read back what `to_json` wrote; the input is checked, since files get damaged.

        Raises:
            UserError: when `stored` is not JSON of the expected form.
        """
        try:
            content: object = json.loads(stored)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"it is not JSON ({error})") from None
        fields = cast(dict[str, object], content) if isinstance(content, dict) else {}
        words = fields.get("words")
        if fields.get("kind") != "words" or not isinstance(words, list):
            raise _damaged('expected {"kind": "words", "words": [...]}')
        return cls(tuple(cast(list[str], words)))

    def to_json(self) -> str:
        """Return this vocabulary as one line of ASCII JSON."""
        return json.dumps({"kind": "words", "words": list(self.words)})

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every word's id."""
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> Tensor:
        """Return the ids of the words of `text`, with `END_OF_LINE` for every line break.

        Shape: `(T,)`, int64, on the CPU; `T` may be 0. Foreign words are `UNKNOWN` where the
        vocabulary has that.

        Raises:
            UserError: foreign words, and no `UNKNOWN` among the known ones.
        """
        encoder = Encoder(self, "the text")
        first, *others = text.split("\n")
        ids = encoder.words(first)
        for line in others:
            ids.append(self.ids[END_OF_LINE])
            ids.extend(encoder.words(line))
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the words whose ids are `ids`, shape `(T,)`, with a blank between two of them.

        `END_OF_LINE` becomes a line break.

        Raises:
            UserError: when `ids` is not one-dimensional or holds an id outside the vocabulary.
        """
        if isinstance(ids, Tensor):
            if ids.dim() != 1:
                raise UserError(
                    f"decode expects ids of shape (T,) and got {tuple(ids.shape)}; "
                    "decode the rows of a batch one by one"
                )
            ids = cast(list[int], ids.tolist())  # pyright: ignore[reportUnknownMemberType]
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise UserError(
                f"ids from {min(ids)} to {max(ids)} do not fit a vocabulary of {len(self)} "
                "words; decode them with the vocabulary that encoded them"
            )
        lines: list[list[str]] = [[]]
        for word in map(self.words.__getitem__, ids):
            if word == END_OF_LINE:
                lines.append([])
            else:
                lines[-1].append(word)
        return "\n".join(map(" ".join, lines))

    def continued(self, text: str, ids: Tensor | Sequence[int]) -> str:
        """`text` and the words of `ids` after it, with a blank between them where it needs one."""
        more = self.decode(ids)
        apart = not text or text[-1].isspace() or more[:1] in ("", "\n")
        return text + more if apart else f"{text} {more}"


class Encoder:
    """Encodes line by line, and counts what the vocabulary does not have.

    Args:
        vocabulary: of the ids.
        source: what the text is called in messages.
    """

    def __init__(self, vocabulary: WordVocabulary, source: str) -> None:
        self.num_unknown = 0
        self._ids, self._source = vocabulary.ids, source
        self._unknown = vocabulary.ids.get(UNKNOWN)
        self._line = 0

    def words(self, line: str) -> list[int]:
        """Ids of the words of a line, without its end."""
        self._line += 1
        words = line.split()
        try:
            return list(map(self._ids.__getitem__, words))
        except KeyError:
            return self._with_unknown(words)

    def chunks(self, lines: Iterable[str], size: int = 2**20) -> Iterator[array[int]]:
        """Ids of all lines with their ends, some `size` at a time, as 32-bit integers."""
        end, chunk = self._ids[END_OF_LINE], array("i")
        for line in lines:
            chunk.extend(self.words(line))
            chunk.append(end)
            if len(chunk) >= size:
                yield chunk
                chunk = array("i")
        if chunk:
            yield chunk

    def _with_unknown(self, words: list[str]) -> list[int]:
        foreign = [word for word in words if word not in self._ids]
        if self._unknown is None:
            named = ", ".join(map(repr, list(dict.fromkeys(foreign))[:_NUM_NAMED]))
            raise UserError(
                f"line {self._line} of {self._source} has words that the vocabulary of "
                f"{len(self._ids)} words does not have ({named}), and {UNKNOWN} is none of its "
                f"words; replace rare words by {UNKNOWN} in all splits, or take them from the "
                "training text"
            )
        self.num_unknown += len(foreign)
        return [self._ids.get(word, self._unknown) for word in words]


def _damaged(what: str) -> UserError:
    return UserError(
        f"this is not a usable vocabulary of words: {what}; build it from the training text, or "
        "restore the file from the run that wrote it"
    )
