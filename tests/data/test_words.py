"""Words as token ids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria import UserError
from equilibria.data.characters import CharacterVocabulary
from equilibria.data.words import END_OF_LINE, UNKNOWN, Encoder, WordVocabulary

LINES = ["the cat sat\n", "\n", "the dog <unk> sat the\n"]
WORDS = st.lists(st.sampled_from(["a", "bb", "c,", "ü", "<unk>"]), max_size=6)


def test_most_frequent_first_and_ties_by_first_occurrence():
    vocabulary = WordVocabulary.from_lines(LINES)
    assert vocabulary.words == ("<eos>", "the", "sat", "cat", "dog", "<unk>")
    assert WordVocabulary.from_lines(["a <eos> b b\n"]).words == ("<eos>", "b", "a")


def test_every_line_ends_with_a_token():
    vocabulary = WordVocabulary.from_lines(LINES)
    (chunk,) = Encoder(vocabulary, "x").chunks(LINES)
    words = [vocabulary.words[i] for i in chunk]
    text = "the cat sat <eos> <eos> the dog <unk> sat the <eos>"
    assert words == text.split()


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(1, 9))
def test_chunks_join_to_the_whole(lines, size):
    text = [" ".join(words) + "\n" for words in lines]
    vocabulary = WordVocabulary.from_lines(text)
    whole = [i for chunk in Encoder(vocabulary, "x").chunks(text) for i in chunk]
    parts = [list(chunk) for chunk in Encoder(vocabulary, "x").chunks(text, size)]
    assert [i for part in parts for i in part] == whole
    assert len(whole) == sum(len(words) + 1 for words in lines)


@given(st.lists(WORDS.filter(bool), min_size=1, max_size=5))
def test_decoding_undoes_encoding(lines):
    text = "\n".join(" ".join(words) for words in lines)
    vocabulary = WordVocabulary.from_lines(text.split("\n"))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_foreign_words_are_unknown_and_counted():
    vocabulary = WordVocabulary.from_lines(LINES)
    encoder = Encoder(vocabulary, "x")
    unknown = vocabulary.ids["<unk>"]
    assert encoder.words("the end is the end") == [1, unknown, unknown, 1, unknown]
    assert encoder.num_unknown == 3
    assert vocabulary.encode("the end").tolist() == [1, unknown]


def test_foreign_words_without_a_token_for_them_are_named():
    vocabulary = WordVocabulary.from_lines(["a b\n"])
    with pytest.raises(UserError, match=r"line 2 of 'x' .* 3 words .*\('end', 'is'\).*<unk>"):
        list(Encoder(vocabulary, "'x'").chunks(["a\n", "a end is end\n"]))


def test_json_round_trip():
    vocabulary = WordVocabulary.from_lines(LINES)
    assert WordVocabulary.from_json(vocabulary.to_json()) == vocabulary


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        ("{", "it is not JSON"),
        ("[]", "expected"),
        ('{"kind": "characters", "words": ["a"]}', "expected"),
        ('{"kind": "words", "words": ["a"]}', END_OF_LINE),
        ('{"kind": "words", "words": ["<eos>", "a", "a"]}', "'a' occurs twice"),
        ('{"kind": "words", "words": ["<eos>", 3]}', "no text"),
        ('{"kind": "words", "words": ["<eos>", ""]}', "empty"),
    ],
)
def test_a_damaged_vocabulary_is_refused(stored, what):
    with pytest.raises(UserError, match=what):
        WordVocabulary.from_json(stored)


def test_ids_that_do_not_exist():
    vocabulary = WordVocabulary.from_lines(LINES)
    with pytest.raises(UserError, match="ids from -1 to 2 do not fit a vocabulary of 6 words"):
        vocabulary.decode([2, -1])
    with pytest.raises(UserError, match=r"shape \(T,\)"):
        vocabulary.decode(torch.zeros(1, 2, dtype=torch.int64))


@given(st.text(alphabet="ab\n ", max_size=20))
def test_decoding_gives_back_the_lines(text):
    vocabulary = WordVocabulary((END_OF_LINE, "a", "b", "aa", "ab", "ba", "bb", UNKNOWN))
    ids = vocabulary.encode(text)
    decoded = vocabulary.decode(ids)
    assert torch.equal(vocabulary.encode(decoded), ids)
    assert decoded.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "ids", "wanted"),
    [
        ("a", [2, 1], "a b a"),
        ("a ", [2], "a b"),
        ("a\n", [2], "a\nb"),
        ("a", [0, 2], "a\nb"),
        ("", [2], "b"),
        ("a", [], "a"),
    ],
)
def test_a_text_goes_on_with_a_blank_where_it_needs_one(text, ids, wanted):
    assert WordVocabulary((END_OF_LINE, "a", "b")).continued(text, ids) == wanted


def test_a_text_of_characters_goes_on_as_it_is():
    vocabulary = CharacterVocabulary.from_text("ab")
    assert vocabulary.continued("a", [1, 0]) == "aba"
