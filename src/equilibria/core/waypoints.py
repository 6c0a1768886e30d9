"""The states along the way that a solve was asked to return."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from torch import Tensor


class Waypoints(Protocol):
    """Keeps states while a solve runs; one object per run."""

    def enter(self, step: int, z: Tensor) -> None:
        """Take note of the point (B, D) after `step` steps."""
        ...

    def chosen(self, num_steps: int) -> list[Tensor]:
        """Those asked for of a solve of `num_steps` steps; the last point is not one of them."""
        ...


class AtSteps:
    """The states after given steps, as far as the solve got."""

    def __init__(self, steps: Collection[int] = ()) -> None:
        self._steps = steps
        self._states: dict[int, Tensor] = {}

    def enter(self, step: int, z: Tensor) -> None:
        """See `Waypoints.enter`."""
        if step in self._steps:
            self._states[step] = z

    def chosen(self, num_steps: int) -> list[Tensor]:
        """See `Waypoints.chosen`."""
        return [z for step, z in self._states.items() if step < num_steps]


class EvenlySpaced:
    """`num` states, the last point included, evenly spaced over the steps that were made.

    How many those are is known at the end only. So every `stride`-th state is kept, and when there
    are more than 4 num of them every second one is dropped and the stride doubled: each state
    returned is within a quarter of a spacing of its place, and exact up to 4 num steps.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._stride = 1
        self._states: dict[int, Tensor] = {}

    def enter(self, step: int, z: Tensor) -> None:
        """See `Waypoints.enter`."""
        if self._num == 1 or step % self._stride:
            return
        self._states[step] = z
        if len(self._states) > 4 * self._num:
            self._stride *= 2
            self._states = {s: z for s, z in self._states.items() if s % self._stride == 0}

    def chosen(self, num_steps: int) -> list[Tensor]:
        """See `Waypoints.chosen`."""
        places = (i * num_steps / self._num for i in range(1, self._num))
        steps = {self._stride * round(place / self._stride) for place in places}
        return [z for step, z in self._states.items() if step in steps and step < num_steps]
