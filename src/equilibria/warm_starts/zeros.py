"""Start from zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from equilibria.core.warm_start import Known, Samples, WarmStart


@dataclass(frozen=True)
class Zeros(WarmStart):
    """Start every sample from zeros, whatever initial state the cell makes.

        z_0 = 0

    The same start at every call: results do not depend on what was solved before.
    """

    def start(self, samples: Samples, memory: Any) -> Known:
        """Zeros for all."""
        batch = samples.like.shape[0]
        everybody = torch.ones(batch, dtype=torch.bool, device=samples.like.device)
        return torch.zeros_like(samples.like), everybody
