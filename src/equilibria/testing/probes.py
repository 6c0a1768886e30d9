"""Wrappers around a map that watch it or spoil it, to test what a solver does with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class Recorder:
    """Passes every call on, and keeps each point with its image.

    Copies are kept beside the tensors themselves, so that writing into either is noticed.
    """

    def __init__(self, f: Map) -> None:
        self._f = f
        self.points: list[Tensor] = []
        self.images: list[Tensor] = []
        self._returned: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        image = self._f(z)
        self.points.append(z.detach().clone())
        self.images.append(image.detach().clone())
        self._returned.append(image.detach())
        return image

    @property
    def num_calls(self) -> int:
        """How often the map was called."""
        return len(self.points)

    @property
    def images_untouched(self) -> bool:
        """Whether every returned tensor still holds what was returned (NaN equals NaN)."""
        return all(
            torch.equal(torch.nan_to_num(kept), torch.nan_to_num(returned))
            for kept, returned in zip(self.images, self._returned, strict=True)
        )


class Spoiled:
    """Returns NaN for one sample from the call number `from_call` (counted from 0) on."""

    def __init__(self, f: Map, *, row: int, from_call: int = 0) -> None:
        self._f, self._row, self._from_call = f, row, from_call
        self.num_calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        image = self._f(z)
        spoil = self.num_calls >= self._from_call
        self.num_calls += 1
        if not spoil:
            return image
        rows = torch.arange(image.shape[0], device=image.device) == self._row
        return torch.where(rows.view(-1, *(1,) * (image.dim() - 1)), torch.nan, image)
