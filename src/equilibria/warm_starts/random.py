"""Start from noise, all samples or some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_not_negative
from equilibria.core.warm_start import Known, Samples, WarmStart


@dataclass
class _Calls:
    """How many solves have drawn so far."""

    num_calls: int = 0


@dataclass(frozen=True)
class Random(WarmStart):
    """Start some samples, or all of them, from noise.

        z_0 ~ N(0, scale^2)   with the given probability, else the cell's initial state

    For training: a network that meets many starts learns to come to the same fixed point from all
    of them, and then solves harder inputs than it was trained on when given more steps. Saves no
    evaluations.

    Args:
        scale: standard deviation of every number of the state.
        probability: how likely a sample starts from noise; 0.5 mixes both kinds of start in every
            batch.
        seed: None draws from PyTorch's own generator of the device, which checkpoints restore.
            With a seed, the n-th call draws the same noise on any machine of the same kind,
            whatever else is drawn; give every process of a distributed run its own.

    Raises:
        UserError: a negative scale, a probability outside 0 to 1, a seed that is no integer.

    References:
        Anil et al., Path independent equilibrium models can better exploit test-time computation,
        arXiv 2211.09961.
    """

    scale: float = 1.0
    probability: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_not_negative("scale", self.scale)
        check_not_negative("probability", self.probability)
        if self.probability > 1.0:
            raise UserError(
                f"probability={self.probability!r} must lie between 0 and 1; 0.5 starts half of "
                "the samples from noise"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"seed={self.seed!r} must be an integer, or None for PyTorch's own")

    @property
    def needs_memory(self) -> bool:
        """With a seed, calls are counted, so that each has other noise."""
        return self.seed is not None

    def init(self) -> _Calls:
        """No call yet."""
        return _Calls()

    def start(self, samples: Samples, memory: _Calls | None) -> Known:
        """Noise for all, and who is to use it."""
        like, generator = samples.like, self._generator(samples.like, memory)
        noise = _normal(like, generator) * self.scale
        if self.probability == 1.0:  # exact, and one draw less
            return noise, torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
        chance = torch.rand(like.shape[0], generator=generator, device=like.device)
        return noise, chance < self.probability

    def _generator(self, like: Tensor, memory: _Calls | None) -> torch.Generator | None:
        if self.seed is None or memory is None:
            return None
        # One seed per call: the draws of a call then depend on its number and on nothing else.
        own = hash((self.seed, memory.num_calls)) % 2**63
        memory.num_calls += 1
        return torch.Generator(like.device).manual_seed(own)


def _normal(like: Tensor, generator: torch.Generator | None) -> Any:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
