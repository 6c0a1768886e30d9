"""Characters to ids and back, and vocabularies read from files that cannot be trusted."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.core.errors import UserError
from equilibria.data.characters import CharacterVocabulary

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


@given(TEXTS)
def test_decode_inverts_encode(text: str) -> None:
    vocabulary = CharacterVocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(text),)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(ids.tolist()) == text


@given(TEXTS)
def test_json_round_trip_gives_the_same_ids(text: str) -> None:
    vocabulary = CharacterVocabulary.from_text(text)
    restored = CharacterVocabulary.from_json(vocabulary.to_json())
    assert restored == vocabulary
    assert torch.equal(restored.encode(text), vocabulary.encode(text))


def test_ids_are_sorted_code_points_and_do_not_depend_on_order() -> None:
    vocabulary = CharacterVocabulary.from_text("cab\nab")
    assert vocabulary.symbols == ("\n", "a", "b", "c")
    assert vocabulary == CharacterVocabulary.from_text("bac\n")
    assert len(vocabulary) == 4
    assert vocabulary.encode("cab").tolist() == [3, 1, 2]


def test_empty_text_encodes_to_an_empty_tensor() -> None:
    vocabulary = CharacterVocabulary.from_text("a")
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode(vocabulary.encode("")) == ""


def test_unknown_symbols_are_named_five_at_most_and_in_printable_form() -> None:
    vocabulary = CharacterVocabulary.from_text("ab")
    with pytest.raises(UserError, match=r"'\\udcff', which .* 2 characters .* remove or replace"):
        vocabulary.encode("a\udcffb")  # what a terminal hands over for a byte that is not UTF-8
    with pytest.raises(UserError, match="'1', '2', '3', '4', '5' and 2 more") as caught:
        vocabulary.encode("a12345671")
    assert "'6'" not in str(caught.value)


@pytest.mark.parametrize(
    "ids", [[-1], [2], [0, 1, 99], torch.tensor([-1]), torch.zeros(1, 1).long()]
)
def test_decode_refuses_ids_that_do_not_exist(ids: torch.Tensor | list[int]) -> None:
    with pytest.raises(UserError):
        CharacterVocabulary.from_text("ab").decode(ids)


def _stored(symbols: object, kind: object = "characters") -> str:
    return json.dumps({"kind": kind, "symbols": symbols})


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "{",
        "null",
        "[]",
        '["a", "b"]',
        "{}",
        "[" * 100_000,
        _stored(None),
        _stored("ab"),
        _stored({"a": 0}),
        _stored([]),
        _stored(["a", "bc"]),
        _stored(["a", ""]),
        _stored(["a", 1]),
        _stored(["a", None]),
        _stored(["a", ["b"]]),
        _stored(["a", "b", "a"]),
        _stored(["a", "\ud800"]),
        _stored(["a", "x" * 10_000]),
        _stored(["a"], kind="words"),
        _stored(["a"], kind=["characters"]),
    ],
)
def test_damaged_json_is_refused_in_one_short_sentence(stored: str) -> None:
    with pytest.raises(UserError) as caught:
        CharacterVocabulary.from_json(stored)
    message = str(caught.value)
    assert len(message) < 300
    assert "\n" not in message
    message.encode("utf-8")  # printable


def test_the_constructor_checks_too() -> None:
    with pytest.raises(UserError, match="twice"):
        CharacterVocabulary(("a", "a"))
    with pytest.raises(UserError, match="at least one"):
        CharacterVocabulary.from_text("")
