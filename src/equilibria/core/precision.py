"""Which precision a device has to offer."""

from __future__ import annotations

import torch

DEVICES_WITHOUT_DOUBLE = frozenset({"mps"})


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no double.

    For the small systems of solvers, which are where rounding is amplified and cost nothing.
    """
    return torch.float32 if device.type in DEVICES_WITHOUT_DOUBLE else torch.float64
