"""A text of one's own as ids of a vocabulary that is already there."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equilibria.data.split_files import lines_of
from equilibria.data.text import read_text
from equilibria.data.words import Encoder, WordVocabulary
from equilibria.train.experiment import Vocabulary


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class EncodedText:
    """What a trained model can be asked about a text.

    Args:
        tokens: `(T,)`, int64 or int32, on the CPU.
        num_unknown: how many of them are words that the vocabulary does not have.
    """

    tokens: Tensor
    num_unknown: int = 0


def encode_file(path: Path, vocabulary: Vocabulary) -> EncodedText:
    """Read a UTF-8 file as the texts that the vocabulary was made from are read.

    Raises:
        UserError: it cannot be read, is empty, or has characters (or words, where there is no
            `<unk>` for them) that the vocabulary does not have.
    """
    if not isinstance(vocabulary, WordVocabulary):
        return EncodedText(vocabulary.encode(read_text(path)))
    encoder, ids = Encoder(vocabulary, f"'{path}'"), array("i")
    for chunk in encoder.chunks(lines_of(path)):
        ids.extend(chunk)
    return EncodedText(torch.frombuffer(ids, dtype=torch.int32), encoder.num_unknown)
