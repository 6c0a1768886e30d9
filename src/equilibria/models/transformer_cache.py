"""What Transformers keep of the positions that were read: keys and values, projected once.

At an equilibrium without a look ahead, that of a position does not depend on what comes later. Its
keys and values are therefore final once it is solved, and a new token is an equilibrium of one
position that attends to them.

Shape suffixes: B batch, M positions kept, K = M + 1 keys, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """The effective weights of a block, after weight norm; functions of parameters only."""

    qkv: Tensor
    output: Tensor
    expand: Tensor
    contract: Tensor


class Constants(NamedTuple):
    """What a block needs that depends on its parameters alone, for many solves under the same."""

    weights: Weights
    position_HKE: Tensor

    @property
    def num_keys(self) -> int:
        """Distances there are (K)."""
        return int(self.position_HKE.shape[1])


class KeyValues(NamedTuple):
    """Keys and values (B, H, M, E) of what was read, projected once.

    Texts of different lengths end together: the first `num_padded` (B,) positions of a row are
    none. None where all are as long.
    """

    k: Tensor
    v: Tensor
    num_padded: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions (M), padding included."""
        return int(self.k.shape[2])

    @property
    def hidden(self) -> Tensor | None:
        """True where there is no text: (B, 1, 1, K), the last key being that of a new token."""
        if self.num_padded is None:
            return None
        places = torch.arange(self.length + 1, device=self.k.device)
        return (places < self.num_padded.unsqueeze(1))[:, None, None]

    def append(self, new: KeyValues, length: int) -> KeyValues:
        """With the positions of a segment at the end; the last `length` are kept."""
        k, v = torch.cat((self.k, new.k), dim=2), torch.cat((self.v, new.v), dim=2)
        return KeyValues(k, v, self.num_padded).last(length)

    def last(self, length: int) -> KeyValues:
        """The last positions only."""
        start = max(self.length - length, 0)
        padded = self.num_padded
        if padded is not None:
            padded = (padded - start).clamp(min=0)
        return KeyValues(self.k[:, :, start:], self.v[:, :, start:], padded)

    def select(self, rows: Tensor) -> KeyValues:
        """Of some texts only."""
        padded = None if self.num_padded is None else self.num_padded[rows]
        return KeyValues(self.k[rows], self.v[rows], padded)

    @staticmethod
    def join(parts: Sequence[KeyValues]) -> KeyValues:
        """One batch of several, padded in front to the longest."""
        longest = max(part.length for part in parts)
        padded = [longest - part.length + part.padding() for part in parts]
        k = torch.cat([_padded(part.k, longest) for part in parts])
        v = torch.cat([_padded(part.v, longest) for part in parts])
        num_padded = torch.cat(padded)
        return KeyValues(k, v, num_padded if num_padded.any() else None)

    def padding(self) -> Tensor:
        """Padded positions (B,) of every row."""
        if self.num_padded is not None:
            return self.num_padded
        return torch.zeros(self.k.shape[0], dtype=torch.int64, device=self.k.device)


class TextCache(NamedTuple):
    """What is kept of texts between their tokens."""

    layers: tuple[KeyValues, ...]
    """Of every layer; one of a DEQ."""
    constants: tuple[Constants, ...]
    """Of every block; one of a DEQ and of layers that share their weights."""
    memory_length: int
    """Positions that are kept."""

    @property
    def length(self) -> int:
        """Positions there are (M)."""
        return self.layers[0].length

    def select(self, rows: Tensor) -> TextCache:
        """Of some texts only."""
        return self._replace(layers=tuple(layer.select(rows) for layer in self.layers))

    @staticmethod
    def join(caches: Sequence[TextCache]) -> TextCache:
        """One batch of several."""
        # The longest has room for what any of them needs.
        longest = max(caches, key=lambda cache: cache.constants[0].num_keys)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        return longest._replace(layers=tuple(KeyValues.join(parts) for parts in layers))

    def with_room(self, make: Callable[[int], tuple[Constants, ...]]) -> TextCache:
        """The same with distances for one more token; `make` gives those of so many keys."""
        needed, there = self.length + 1, self.constants[0].num_keys
        if there >= needed:
            return self
        # Twice as many, so that few of the tokens pay for that, but no more than can be needed.
        return self._replace(constants=make(max(needed, min(2 * there, self.memory_length + 1))))


def positions_kept(memory_length: int, window: int | None) -> int:
    """Positions worth keeping: those that a next token attends to."""
    return memory_length if window is None else min(memory_length, window - 1)


def _padded(x_BHME: Tensor, length: int) -> Tensor:
    # Zeros and not whatever is there: a weight of 0 times NaN is NaN.
    return F.pad(x_BHME, (0, 0, length - x_BHME.shape[2], 0))
