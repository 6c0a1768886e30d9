"""Wall time, where there is any to tell."""

from __future__ import annotations

import math
import time

import torch


def clock() -> float:
    """Seconds from an arbitrary start; NaN inside compiled code, which keeps no time of its own."""
    return math.nan if torch.compiler.is_compiling() else time.perf_counter()
