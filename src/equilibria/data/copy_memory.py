"""The copy-memory problem: read ten symbols, wait, then write them down in order.

    inputs   s_1 ... s_n  0 ... 0  9  9 ... 9        (s from 1 to 8; T - 1 blanks, a delimiter, n)
    targets  0 ...                 0  s_1 ... s_n

A sequence has T + 2 n positions, T + 20 for the ten symbols that are usual. Sequences are drawn
when they are asked for, each batch from a generator of its own, so that nothing is stored and a
batch is known by its number.

References: Hochreiter and Schmidhuber, Long short-term memory, Neural Computation 9 (1997);
Arjovsky et al., Unitary evolution recurrent neural networks, arXiv 1511.06464, section 5.1; the
layout is that of Bai et al., arXiv 1803.01271, from which arXiv 1909.01377 takes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer

BLANK, DELIMITER, ALPHABET_SIZE = 0, 9, 8
"""Token ids: 0, 9, and the symbols to remember, 1 to 8."""

Fill = Literal["delimiter", "blank"]


class CopyBatch(NamedTuple):
    """Sequences and what is to be said at each position, both (B, T + 2 n), int64."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class CopySequencesConfig:
    """How long to wait, how much to remember, and which sequences to judge by."""

    num_blanks: int = 400
    """T: distance from the last symbol read to the first one to be written."""
    num_symbols: int = 10
    """n: symbols to remember, each one of 8."""
    fill: Fill = "delimiter"
    """What the last n inputs are while the model writes: the delimiter again, as in the published
    comparison, or blanks, as in the older literature, which is a little harder."""
    num_valid: int = 128
    """Sequences of the validation split."""
    num_test: int = 1024
    """Sequences of the test split."""
    seed: int = 0
    """Seed of all sequences; the splits are drawn independently of each other."""

    def __post_init__(self) -> None:
        for name in ("num_blanks", "num_symbols", "num_valid", "num_test"):
            check_positive_integer(name, getattr(self, name))
        if self.fill not in get_args(Fill):
            raise UserError(f"fill={self.fill!r} is neither 'delimiter' nor 'blank'")
        if self.seed < 0:
            raise UserError(f"the data's seed={self.seed} must be at least 0")

    def load(self) -> CopySequences:
        """Return the source of sequences; nothing is read or stored."""
        return CopySequences(self)


class CopySequences:
    """Batches of copy-memory sequences, as many as one asks for.

    Args:
        config: lengths, splits and seed.
    """

    def __init__(self, config: CopySequencesConfig) -> None:
        self.config = config

    @property
    def vocabulary_size(self) -> int:
        """Blank, delimiter and the symbols."""
        return ALPHABET_SIZE + 2

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.config.num_blanks + 2 * self.config.num_symbols

    @property
    def num_symbols(self) -> int:
        """Positions at the end that are to repeat those at the beginning."""
        return self.config.num_symbols

    def training_batch(self, index: int, batch_size: int) -> CopyBatch:
        """Return the training batch of a number; the same one for the same number and size."""
        return self._draw("train", index, batch_size)

    def evaluation_batches(
        self, split: Literal["valid", "test"], batch_size: int
    ) -> Iterator[CopyBatch]:
        """Iterate over a split; which sequences it has does not depend on `batch_size`."""
        size = self.config.num_valid if split == "valid" else self.config.num_test
        whole = self._draw(split, 0, size)
        for start in range(0, size, batch_size):
            yield CopyBatch(*(tensor[start : start + batch_size] for tensor in whole))

    def describe(self) -> dict[str, object]:
        """Return what identifies the sequences, ready for JSON."""
        settings = asdict(self.config)
        identity = json.dumps(settings, sort_keys=True).encode()
        return {
            "name": "copy-memory",
            "digest": hashlib.sha256(identity).hexdigest(),
            "length": self.length,
            **settings,
        }

    def _draw(self, split: str, index: int, batch_size: int) -> CopyBatch:
        # Hashed: of a seed, torch's generator on the CPU reads the lowest 32 bits and no more.
        identity = f"{self.config.seed}/{split}/{index}".encode()
        seed = int.from_bytes(hashlib.sha256(identity).digest()[:4], "big")
        generator = torch.Generator().manual_seed(seed)
        count, blanks = self.config.num_symbols, self.config.num_blanks
        symbols = torch.randint(1, ALPHABET_SIZE + 1, (batch_size, count), generator=generator)
        inputs = torch.full((batch_size, self.length), BLANK)
        targets = inputs.clone()
        inputs[:, :count] = symbols
        inputs[:, count + blanks - 1] = DELIMITER
        inputs[:, count + blanks :] = DELIMITER if self.config.fill == "delimiter" else BLANK
        targets[:, -count:] = symbols
        return CopyBatch(inputs, targets)
