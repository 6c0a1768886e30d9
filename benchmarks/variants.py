"""Choices of our solvers that not every version of the library or machine has."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import torch

from equilibria import solve


def eager_and_fused(solver: Any, device: torch.device) -> dict[str, Any]:
    """The solver with the plain operations of PyTorch, and with fused steps where there are some.

    Takes fixed-point solvers and linear ones. On CPU the fused steps are what a solver takes by
    itself (`fused=None`) if Numba is installed; on a GPU they are asked for.
    """
    if "fused" not in {field.name for field in fields(solver)}:
        return {"eager": solver}
    variants = {"eager": replace(solver, fused=False)}
    if device.type == "cuda":
        if find_spec("triton") and _has_kernel(f"{type(solver).__name__.lower()}_triton"):
            variants["fused"] = replace(solver, fused=True)
    elif find_spec("numba"):
        variants["fused"] = replace(solver, fused=None)
    return variants


def _has_kernel(name: str) -> bool:
    return bool(find_spec("equilibria.kernels") and find_spec(f"equilibria.kernels.{name}"))


def eager(solver: Any) -> Any:
    """The solver with the plain operations of PyTorch."""
    return eager_and_fused(solver, torch.device("cpu"))["eager"]


def fastest(solver: Any, device: torch.device) -> Any:
    """The solver with fused steps, if there are some."""
    return list(eager_and_fused(solver, device).values())[-1]


def can_compact() -> bool:
    """Whether `solve` can take finished samples out of the batch."""
    return "select" in inspect.signature(solve).parameters


def has_torchdeq() -> bool:
    """Whether that peer is installed (`pip install -e '.[peers]'`)."""
    return find_spec("torchdeq") is not None
