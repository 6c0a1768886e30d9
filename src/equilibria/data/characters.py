"""Characters as token ids."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor

from equilibria.core.errors import UserError

_NUM_NAMED = 5  # unknown symbols spelled out in a message; more would bury what to do


@dataclass(frozen=True)
class CharacterVocabulary:
    """A fixed set of characters (Unicode code points), each with its position as id.

    Args:
        symbols: the characters in id order; at least one, no duplicates.

    Raises:
        UserError: when `symbols` is empty, repeats a character or holds anything else.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_symbols(self.symbols)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the vocabulary of `text`: its distinct code points, sorted.

        Sorted, so that the ids depend on which characters occur and not on their order.

        Raises:
            UserError: when `text` is empty.
        """
        return cls(tuple(sorted(set(text))))

    @classmethod
    def from_json(cls, stored: str) -> Self:
        """Read back what `to_json` wrote; the input is checked, since files get damaged.

        Raises:
            UserError: when `stored` is not JSON of the expected form.
        """
        return cls(tuple(_symbols_in(stored)))

    def to_json(self) -> str:
        """Return this vocabulary as one line of ASCII JSON."""
        return json.dumps({"kind": "characters", "symbols": list(self.symbols)})

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> Tensor:
        """Return the ids of the characters of `text`.

        Shape: `(T,)`, int64, on the CPU; `T` may be 0.

        Raises:
            UserError: when `text` has characters outside the vocabulary.
        """
        if not text:
            return torch.empty(0, dtype=torch.int64)  # frombuffer refuses an empty buffer
        try:
            ids = array("q", map(self._ids.__getitem__, text))
        except KeyError:
            raise UserError(self._describe_unknown(text)) from None
        return torch.frombuffer(ids, dtype=torch.int64)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text whose ids are `ids`, shape `(T,)`.

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
        # A negative id would silently count from the end of the tuple.
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise UserError(
                f"ids from {min(ids)} to {max(ids)} do not fit a vocabulary of {len(self)} "
                "characters; decode them with the vocabulary that encoded them"
            )
        return "".join(map(self.symbols.__getitem__, ids))

    def continued(self, text: str, ids: Tensor | Sequence[int]) -> str:
        """`text` and the characters of `ids` after it."""
        return text + self.decode(ids)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: index for index, symbol in enumerate(self.symbols)}

    def _describe_unknown(self, text: str) -> str:
        unknown = list(dict.fromkeys(symbol for symbol in text if symbol not in self._ids))
        named = ", ".join(map(repr, unknown[:_NUM_NAMED]))
        more = f" and {len(unknown) - _NUM_NAMED} more" if len(unknown) > _NUM_NAMED else ""
        return (
            f"the text uses {named}{more}, which the vocabulary of {len(self)} characters does "
            "not have; remove or replace them, or train on a text in which they occur"
        )


def _symbols_in(stored: str) -> Iterable[str]:
    """Return the symbols of a stored vocabulary, of which only the outer form is checked."""
    try:
        content: object = json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"it is not JSON ({error})") from None
    fields = cast(dict[str, object], content) if isinstance(content, dict) else {}
    symbols = fields.get("symbols")
    if fields.get("kind") != "characters" or not isinstance(symbols, list):
        raise _damaged('expected {"kind": "characters", "symbols": [...]}')
    return cast(list[str], symbols)


def _check_symbols(symbols: Sequence[object]) -> None:
    if not symbols:
        raise UserError("a vocabulary needs at least one character; give a text that is not empty")
    seen: set[str] = set()
    for symbol in symbols:
        if not isinstance(symbol, str) or len(symbol) != 1:
            raise _damaged(f"{_shorten(symbol)} is not a single character")
        if "\ud800" <= symbol <= "\udfff":
            # Half of a UTF-16 pair: no text file can hold it and no terminal can print it.
            raise _damaged(f"{symbol!r} is a lone surrogate, not a character")
        if symbol in seen:
            raise _damaged(f"{symbol!r} occurs twice")
        seen.add(symbol)


def _damaged(what: str) -> UserError:
    return UserError(
        f"this is not a usable character vocabulary: {what}; build it from the training text, "
        "or restore the file from the run that wrote it"
    )


def _shorten(value: object, limit: int = 40) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else shown[:limit] + "..."
