"""Baselines: real probabilities, known answers on known sources, figures on the real corpus."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria.core.errors import UserError
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.tasks.compression_baselines import (
    WittenBellNgrams,
    baselines,
    ngram_bits_per_token,
    xz_bits_per_character,
    xz_standalone_bits_per_character,
)

VOCABULARY_SIZE = 5
IDS = st.lists(st.integers(0, VOCABULARY_SIZE - 1), max_size=60)


@given(train=IDS, context=IDS, order=st.integers(1, 6))
def test_probabilities_are_positive_and_sum_to_one(
    train: list[int], context: list[int], order: int
) -> None:
    model = WittenBellNgrams.fit(train, order, VOCABULARY_SIZE)
    probabilities = [model.probability(symbol, context) for symbol in range(VOCABULARY_SIZE)]
    assert min(probabilities) > 0
    assert math.isclose(sum(probabilities), 1, rel_tol=1e-12)


@given(train=IDS, test=IDS.filter(lambda ids: len(ids) >= 2))
def test_unigram_is_the_closed_form(train: list[int], test: list[int]) -> None:
    counts = Counter(train)
    seen = len(counts)

    def probability(symbol: int) -> float:
        if not train:
            return 1 / VOCABULARY_SIZE
        return (counts[symbol] + seen / VOCABULARY_SIZE) / (len(train) + seen)

    expected = -sum(math.log2(probability(symbol)) for symbol in test[1:]) / (len(test) - 1)
    bits = ngram_bits_per_token(train, test, 1, VOCABULARY_SIZE)
    assert math.isclose(bits, expected, rel_tol=1e-12)


def test_bigram_by_hand() -> None:
    # Training text 0 1 0 1 0 2, V = 3: c(0) = 3, c(1) = 2, c(2) = 1, three distinct symbols.
    unigram = [(3 + 3 / 3) / 9, (2 + 3 / 3) / 9, (1 + 3 / 3) / 9]
    # After 0 come 1, 1 and 2 (two distinct); after 1 comes 0 twice (one distinct).
    after_0 = [(count + 2 * p) / (3 + 2) for count, p in zip([0, 2, 1], unigram, strict=True)]
    after_1 = [(count + 1 * p) / (2 + 1) for count, p in zip([2, 0, 0], unigram, strict=True)]
    model = WittenBellNgrams.fit([0, 1, 0, 1, 0, 2], 2, 3)
    for symbol in range(3):
        assert model.probability(symbol, [0]) == pytest.approx(after_0[symbol])
        assert model.probability(symbol, [1]) == pytest.approx(after_1[symbol])
        assert model.probability(symbol, [2]) == pytest.approx(unigram[symbol]), (
            "2 had no successor"
        )
        assert model.probability(symbol, []) == pytest.approx(unigram[symbol])


@given(train=IDS, test=IDS.filter(lambda ids: len(ids) >= 2), order=st.integers(1, 5))
def test_a_smaller_order_of_a_fitted_model_is_that_model(
    train: list[int], test: list[int], order: int
) -> None:
    large = WittenBellNgrams.fit(train, 5, VOCABULARY_SIZE)
    small = WittenBellNgrams.fit(train, order, VOCABULARY_SIZE)
    assert large.bits_per_token(test, order) == small.bits_per_token(test)
    assert large.probability(0, test, order) == small.probability(0, test)


def test_contexts_reach_back_into_the_test_split_only() -> None:
    # 0 is always followed by 1 and 1 by 0. The first test token gives context and is not paid
    # for; the last training token gives none, or [1, 0] would look surprising after a 1.
    train = [0, 1] * 500
    assert ngram_bits_per_token(train, [1, 0], 2, 2) < 0.01
    assert ngram_bits_per_token(train, [0, 0], 2, 2) > 5


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("vocabulary_size", [2, 4])
def test_noise_costs_its_entropy(order: int, vocabulary_size: int) -> None:
    source = random.Random(0)
    train = [source.randrange(vocabulary_size) for _ in range(20_000)]
    test = [source.randrange(vocabulary_size) for _ in range(5_000)]
    bits = ngram_bits_per_token(train, test, order, vocabulary_size)
    # Estimating up to 4^4 contexts costs a little, and noise cannot be beaten.
    assert math.log2(vocabulary_size) - 0.01 < bits < math.log2(vocabulary_size) + 0.1


def test_a_cycle_is_free_for_the_bigram_and_not_for_the_unigram() -> None:
    cycle = list(range(8)) * 200
    assert ngram_bits_per_token(cycle, cycle[:80], 2, 8) < 0.02
    assert ngram_bits_per_token(cycle, cycle[:80], 1, 8) == pytest.approx(3)


def test_tensors_and_lists_give_the_same_bits() -> None:
    train, test = [0, 1, 2, 1] * 10, [2, 1, 0, 1]
    expected = ngram_bits_per_token(train, test, 3, 3)
    assert ngram_bits_per_token(torch.tensor(train), torch.tensor(test), 3, 3) == expected


def test_xz_knows_the_training_text() -> None:
    source = random.Random(0)
    noise = "".join(source.choice("abcdefgh") for _ in range(4_000))
    assert xz_bits_per_character(noise, noise) < 0.1
    assert 3 < xz_bits_per_character("", noise) < 4
    assert 3 < xz_standalone_bits_per_character(noise) < 4


def test_bits_are_per_character_and_not_per_byte() -> None:
    source = random.Random(0)
    ascii_noise = "".join(source.choice("ab") for _ in range(4_000))
    wide_noise = ascii_noise.replace("a", "é").replace("b", "ß")
    assert xz_standalone_bits_per_character(wide_noise) == pytest.approx(
        xz_standalone_bits_per_character(ascii_noise), rel=0.5
    )


@pytest.mark.parametrize(
    ("train", "test", "order", "vocabulary_size", "message"),
    [
        ([0, 1], [0, 1], 0, 2, "order 0"),
        ([0, 1], [0], 2, 2, "at least 2 tokens and got 1"),
        ([0, 1], [], 2, 2, "at least 2 tokens and got 0"),
        ([0, 2], [0, 1], 2, 2, "vocabulary_size of 2"),
        ([0, 1], [0, 2], 2, 2, "vocabulary_size of 2"),
        ([0, -1], [0, 1], 2, 2, "from -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    train: list[int], test: list[int], order: int, vocabulary_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ngram_bits_per_token(train, test, order, vocabulary_size)


def test_orders_that_were_not_counted_are_refused() -> None:
    with pytest.raises(UserError, match="counted up to 2"):
        WittenBellNgrams.fit([0, 1], 2, 2).bits_per_token([0, 1], order=3)


def test_no_text_to_compress() -> None:
    for measure in (
        xz_standalone_bits_per_character,
        lambda text: xz_bits_per_character("a", text),
    ):
        with pytest.raises(UserError, match="no text"):
            measure("")


def test_figures_on_the_built_in_corpus() -> None:
    corpus = CharacterCorpusConfig().load()
    bits = baselines(
        corpus.train, corpus.test, corpus.train_text, corpus.test_text, len(corpus.vocabulary)
    )
    assert list(bits) == ["unigram", "bigram", "five_gram", "xz"]
    # xz wins because Python's reference repeats itself: it copies whole passages.
    assert bits["xz"] < bits["five_gram"] < bits["bigram"] < bits["unigram"]
    # Python 3.11 gives 4.60, 3.26, 1.75 and 1.26; other versions have other words.
    assert bits["unigram"] == pytest.approx(4.6, abs=0.4)
    assert bits["bigram"] == pytest.approx(3.26, abs=0.4)
    assert bits["five_gram"] == pytest.approx(1.75, abs=0.5)
