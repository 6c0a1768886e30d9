"""What a language model has to beat: n-grams and a general-purpose compressor, on the same split.

All numbers are bits per character (or token) of the test split, given the training split. The
n-gram counts come from the training split alone; contexts reach back into the test split, as the
memory of a neural model does.
"""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self, cast

import torch
from torch import Tensor

from equilibria.core.errors import UserError

TokenIds = Sequence[int] | Tensor
Gram = tuple[int, ...]


@dataclass(frozen=True)
class WittenBellNgrams:
    """An interpolated Witten-Bell n-gram model.

    With `c(h w)` the count of symbol `w` after context `h`, `c(h)` its sum over `w`, `t(h)` the
    number of distinct symbols seen after `h`, and `h'` the context without its oldest symbol:

        p(w | h) = (c(h w) + t(h) p(w | h')) / (c(h) + t(h)),    p(w | h) = p(w | h') if c(h) = 0.

    The recursion goes through the unigram, whose lower order is the uniform distribution
    `1 / vocabulary_size`; no symbol has probability 0. There is nothing to tune, which makes it
    a baseline that nobody can have tuned badly. Build it with `fit`.

    References:
        Witten and Bell (1991), "The zero-frequency problem", IEEE Trans. Inf. Theory 37(4),
        method C; interpolated form: Chen and Goodman (1998), "An empirical study of smoothing
        techniques for language modeling", TR-10-98, Harvard.
    """

    order: int
    vocabulary_size: int
    counts: Counter[Gram]
    """c(h w), for contexts h of 0 to order - 1 symbols."""
    totals: Counter[Gram]
    """c(h)."""
    num_distinct: Counter[Gram]
    """t(h)."""

    @classmethod
    def fit(cls, train: TokenIds, order: int, vocabulary_size: int) -> Self:
        """Count all n-grams of 1 to `order` symbols; time and memory O(order * len(train)).

        Raises:
            UserError: when `order` is below 1, or an id is outside the vocabulary.
        """
        if order < 1:
            raise UserError(f"an n-gram model of order {order} was asked for; 1 is the smallest")
        ids = _checked_ids(train, vocabulary_size)
        counts: Counter[Gram] = Counter()
        for size in range(1, order + 1):
            # zip of shifted copies: all windows of `size` symbols, counted at C speed.
            counts.update(zip(*(islice(ids, shift, None) for shift in range(size)), strict=False))
        totals: Counter[Gram] = Counter()
        num_distinct: Counter[Gram] = Counter()
        for gram, count in counts.items():
            totals[gram[:-1]] += count
            num_distinct[gram[:-1]] += 1
        return cls(order, vocabulary_size, counts, totals, num_distinct)

    def probability(self, symbol: int, context: Sequence[int], order: int | None = None) -> float:
        """Return p(symbol | context), of which the last `order - 1` symbols count.

        Args:
            symbol: an id below `vocabulary_size`.
            context: the ids before it, oldest first; may be shorter than `order - 1`.
            order: use a smaller order than the fitted one, without counting again.
        """
        order = self.order if order is None else order
        probability = 1 / self.vocabulary_size
        for size in range(min(len(context), order - 1) + 1):
            recent = tuple(context[len(context) - size :])
            total = self.totals[recent]
            if total == 0:
                break  # nor was any longer context seen
            distinct = self.num_distinct[recent]
            count = self.counts[(*recent, symbol)]
            probability = (count + distinct * probability) / (total + distinct)
        return probability

    def bits_per_token(self, test: TokenIds, order: int | None = None) -> float:
        """Return the mean of -log2 p over every token of `test` but the first.

        Args:
            test: ids below `vocabulary_size`, at least two.
            order: use a smaller order than the fitted one, without counting again.

        Raises:
            UserError: when `test` is too short, or an id or `order` does not fit the model.
        """
        order = self.order if order is None else order
        if not 1 <= order <= self.order:
            raise UserError(f"order {order} was asked of n-grams counted up to {self.order}")
        ids = _checked_ids(test, self.vocabulary_size)
        if len(ids) < 2:
            raise UserError(
                f"baselines need a test split of at least 2 tokens and got {len(ids)}; "
                "give a longer text or a larger test_fraction"
            )
        bits = (
            -math.log2(self.probability(ids[t], ids[max(0, t - order + 1) : t], order))
            for t in range(1, len(ids))
        )
        return math.fsum(bits) / (len(ids) - 1)


def ngram_bits_per_token(
    train: TokenIds, test: TokenIds, order: int, vocabulary_size: int
) -> float:
    """Return the bits per token of an interpolated Witten-Bell `order`-gram.

    Every token of `test` but the first is predicted; see `WittenBellNgrams` for the estimate.

    Args:
        train: ids to count, in reading order.
        test: ids to predict, at least two.
        order: 1 for unigram, 2 for bigram, ...
        vocabulary_size: number of ids that exist, seen in training or not.

    Raises:
        UserError: when `order` is below 1, `test` is too short or an id does not exist.
    """
    return WittenBellNgrams.fit(train, order, vocabulary_size).bits_per_token(test)


def xz_bits_per_character(train: str, test: str) -> float:
    """Return the bits per character that `xz -9e` needs for `test` when it knows `train`.

        8 (|xz(train + test)| - |xz(train)|) / len(test)

    The code length is conditional, because a model also meets the test text after the training
    text; `xz_standalone_bits_per_character` starts from nothing, pays for learning the language
    within the test text and for the container, and flatters whatever it is compared with. The
    dictionary of `-9` is 64 MiB: of a longer training text only the end is known. Sizes are
    rounded to 4 bytes by the format, so a test of a few hundred characters is not informative.

    Raises:
        UserError: when `test` is empty.
    """
    _require_text(test)
    return 8 * (_xz_size(train + test) - _xz_size(train)) / len(test)


def xz_standalone_bits_per_character(text: str) -> float:
    """Return the bits per character of `xz -9e` on `text` alone, file format included.

    Raises:
        UserError: when `text` is empty.
    """
    _require_text(text)
    return 8 * _xz_size(text) / len(text)


def unigram_bits_per_token(train: Tensor, test: Tensor, vocabulary_size: int) -> float:
    """Return the bits per token of the training split's word frequencies.

        p(w) = (c(w) + 1) / (T + vocabulary_size)

    Every token of `test` but the first is predicted. Bounded memory for splits that stay on disk.
    """
    counts = torch.ones(vocabulary_size, dtype=torch.float64)
    for chunk in train.split(2**20):
        counts += torch.bincount(chunk, minlength=vocabulary_size)
    return -(counts / counts.sum()).log2()[test[1:].long()].mean().item()


def baselines(
    train_ids: TokenIds,
    test_ids: TokenIds,
    train_text: str,
    test_text: str,
    vocabulary_size: int,
) -> dict[str, float]:
    """Return the bits per character of `unigram`, `bigram`, `five_gram` and `xz`.

    Costs about 1.5 seconds for 0.4 million characters of training text, and grows in proportion.

    Args:
        train_ids: the training split as ids.
        test_ids: the test split as ids, at least two.
        train_text: the training split as text, for `xz`.
        test_text: the test split as text, for `xz`.
        vocabulary_size: number of ids that exist.

    Raises:
        UserError: when the test split is too short, or an id does not exist.
    """
    ngrams = WittenBellNgrams.fit(train_ids, 5, vocabulary_size)
    return {
        "unigram": ngrams.bits_per_token(test_ids, order=1),
        "bigram": ngrams.bits_per_token(test_ids, order=2),
        "five_gram": ngrams.bits_per_token(test_ids),
        "xz": xz_bits_per_character(train_text, test_text),
    }


def _xz_size(text: str) -> int:
    return len(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))


def _require_text(text: str) -> None:
    if not text:
        raise UserError("there is no text to compress; give a test split that is not empty")


def _checked_ids(ids: TokenIds, vocabulary_size: int) -> Sequence[int]:
    # The elements of a tensor hash by identity: counted as they are, no two would be equal.
    if isinstance(ids, Tensor):
        ids = cast(list[int], ids.tolist())  # pyright: ignore[reportUnknownMemberType]
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary_size:
        raise UserError(
            f"token ids from {min(ids)} to {max(ids)} do not fit a vocabulary_size of "
            f"{vocabulary_size}; pass the size of the vocabulary that encoded them"
        )
    return ids
