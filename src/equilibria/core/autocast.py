"""Autocast is for the map; the arithmetic of solvers keeps the precision of the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()
_OFF = (False, None)


class Autocast:
    """The autocast of a device as it was when this was made, to be put back around the map.

    A backward pass runs where autocast is off, or on for another reason; whatever it evaluates
    again has to be the function that the forward pass solved.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self._exists = torch.amp.is_autocast_available(device.type)
        self._given = _state(self._device)

    @property
    def dtype(self) -> torch.dtype | None:
        """What it rounds to; None if it was off."""
        return self._given[1]

    def restored(self) -> AbstractContextManager[object]:
        """A block in which autocast is as it was."""
        if not self._exists or _state(self._device) == self._given:
            return _NOTHING
        enabled, dtype = self._given
        return torch.autocast(self._device, dtype, enabled=enabled)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast, which would turn a solver's small products into half precision."""
    enabled, _ = _state(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _state(device: str) -> tuple[bool, torch.dtype | None]:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return _OFF
    return True, torch.get_autocast_dtype(device)
