"""Start every sample where it ended when it was last seen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.warm_start import Form, Known, Samples, WarmStart


class _Entry(NamedTuple):
    """One sample's numbers, without padding, and the form that they are to be read in."""

    numbers: Tensor
    form: Form


_Entries = OrderedDict[Hashable, _Entry]
"""From the least to the most recently used."""


@dataclass(frozen=True)
class Cached(WarmStart):
    """Start every sample at the fixed point that it had when it was last seen.

        z_0(sample i) = z*(sample i), one epoch or so ago

    Samples are told apart by `sample_index`, their place in the data set. Those that are not in
    the cache start cold. When the cache is full, the samples that were not used for longest make
    room; with fewer entries than samples, a pass over the data in any order finds few or none.

    Memory: `num_entries` times the size of one sample's state. Cost per call: one copy of the
    batch's states to where the cache lies and one back, which wait for the device.

    Device and dtype are kept by their names ("cpu", "bfloat16"), which may be given as well.

    Args:
        num_entries: how many samples to keep at most, commonly all of the data set.
        device: where to keep them; None is where the state is. "cpu", because a whole data set of
            states seldom fits beside the model.
        dtype: a narrower one saves memory, torch.bfloat16 half of float32; None keeps that of the
            packed state. A start in bfloat16 has two to three digits.

    Raises:
        UserError: num_entries below 1, an unknown device, a dtype that is not floating-point.
    """

    num_entries: int
    device: torch.device | str | None = "cpu"
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        check_positive_integer("num_entries", self.num_entries)
        # Names can be written into a configuration file and read from it.
        object.__setattr__(self, "dtype", _name_of_dtype(self.dtype))
        object.__setattr__(self, "device", _name_of_device(self.device))

    @property
    def needs_memory(self) -> bool:
        """The cache."""
        return True

    @property
    def needs_index(self) -> bool:
        """The cache is looked up by it."""
        return True

    @property
    def recalls(self) -> bool:
        """That is all it does."""
        return True

    def init(self) -> _Entries:
        """Nobody seen yet."""
        return OrderedDict()

    def start(self, samples: Samples, memory: _Entries) -> Known | None:
        """The entries of the samples that have a fitting one."""
        places: list[int] = []
        found: list[Tensor] = []
        for place, key in enumerate(samples.index or ()):
            entry = memory.get(key)
            if entry is None:
                continue
            memory.move_to_end(key)
            if entry.form == samples.form and len(entry.numbers) == samples.length(place):
                places.append(place)
                found.append(entry.numbers)
        if not found:
            return None
        together = pad_sequence(found, batch_first=True).to(samples.like)
        together = F.pad(together, (0, samples.like.shape[1] - together.shape[1]))
        where = torch.tensor(places, device=together.device)
        known = torch.zeros(len(samples.like), dtype=torch.bool, device=together.device)
        rows = torch.zeros_like(samples.like).index_copy_(0, where, together)
        return rows, known.index_fill_(0, where, True)

    def remember(self, rows: Tensor, good: Tensor, samples: Samples, memory: _Entries) -> None:
        """Enter every sample that ended well, strike out the others, then make room."""
        dtype = None if self.dtype is None else getattr(torch, str(self.dtype))
        kept = rows.to(device=self.device, dtype=dtype)
        # A number may be finite in the dtype of the state only.
        worthy = (good.to(kept.device) & torch.isfinite(kept).all(1)).tolist()
        for place, key in enumerate(samples.index or ()):
            memory.pop(key, None)
            if worthy[place]:
                # A copy: a view would keep the whole batch alive.
                numbers = kept[place, : samples.length(place)].clone()
                memory[key] = _Entry(numbers, samples.form)
        while len(memory) > self.num_entries:
            memory.popitem(last=False)


def _name_of_dtype(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    known = getattr(torch, name, None)
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise UserError(
            f"dtype={dtype!r} is no floating-point dtype; give for example torch.bfloat16, or "
            "None to keep that of the state"
        )
    return name


def _name_of_device(device: torch.device | str | None) -> str | None:
    if device is None:
        return None
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"device={device!r} is no device of PyTorch; give for example 'cpu' or 'cuda:0', or "
            "None for that of the state"
        ) from error
