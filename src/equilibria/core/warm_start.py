"""The contract of a warm start, and the memory that it keeps from call to call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError
from equilibria.core.options import Options
from equilibria.core.state import Layout
from equilibria.core.status import Status

Use = Literal["forward", "backward"]

SampleIndex = Tensor | Sequence[Hashable]
"""What tells the samples of a batch apart: integers (B,), or B keys such as file names."""


@dataclass(frozen=True)
class Form:
    """What two states have in common if one may be the start of the other.

    Dtype and device are no part of it: the same numbers are as good a start in another precision.
    """

    tree: pytree.TreeSpec
    leaves: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, shape without the batch dimension, and order in memory of every tensor."""

    @staticmethod
    def of(layout: Layout) -> Form:
        """The form of the states of a layout."""
        leaves = tuple((leaf.name, leaf.shape, leaf.order) for leaf in layout.leaves)
        return Form(layout.treespec, leaves)


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one solve, as far as a warm start has to know them.

    Args:
        like: a packed tensor (B, D) of the shape, dtype and device that the start is to have.
        form: see `Form`.
        lengths: of ragged batches, how many of its D numbers each sample has; the rest is padding.
            None where there is none.
        index: one key per sample, or None if none were given.
    """

    like: Tensor
    form: Form
    lengths: tuple[int, ...] | None = None
    index: tuple[Hashable, ...] | None = None

    def length(self, sample: int) -> int:
        """How many numbers a sample has."""
        return self.like.shape[1] if self.lengths is None else self.lengths[sample]


Known = tuple[Tensor, Tensor]
"""Rows to start from (B, D), and the mask (B,) of the samples for which they mean anything."""


class WarmStart(Options, ABC):
    """Where a solve starts, other than at the state it is given.

    A warm start is a frozen dataclass of configuration; what it remembers lives in a separate
    memory, so that one object can serve any number of layers. It sees packed states (B, D), and
    its answer is a guess: a wrong one costs evaluations and never changes what a solve converges
    to, unless there are several fixed points.
    """

    @property
    def needs_memory(self) -> bool:
        """Whether anything is kept from call to call."""
        return False

    @property
    def needs_index(self) -> bool:
        """Whether samples are told apart by `sample_index`."""
        return False

    @property
    def recalls(self) -> bool:
        """Whether it starts where earlier solves ended; only then can a backward solve use it."""
        return False

    def init(self) -> Any:
        """Make an empty memory."""
        return None

    @abstractmethod
    def start(self, samples: Samples, memory: Any) -> Known | None:
        """Say where to start; None if nothing is known of any sample.

        Called once per solve. Nothing it returns may be part of a graph.
        """

    def remember(self, rows: Tensor, good: Tensor, samples: Samples, memory: Any) -> None:
        """Take in where a solve ended: rows (B, D), a detached copy that may be kept.

        `good` (B,) marks the samples worth remembering. The others are to be forgotten, together
        with what was known of them before: it led nowhere.
        """
        del rows, good, samples, memory


class WarmStartMemory:
    """What the warm starts of one layer, or of one loop around `solve`, remember between calls.

    A cache and no part of a model: copies and pickles of it are empty, state dicts do not have
    it, every process of a distributed run has its own. Losing it costs evaluations, nothing else.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Use, WarmStart], Any] = {}

    def of(self, use: Use, warm_start: WarmStart) -> Any:
        """The memory of one warm start, made at its first use."""
        key = (use, warm_start)
        if key not in self._kept:
            self._kept[key] = warm_start.init()
        return self._kept[key]

    def clear(self) -> None:
        """Forget everything: the next solves start cold."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WarmStartMemory:
        return WarmStartMemory()

    def __reduce__(self) -> tuple[type[WarmStartMemory], tuple[()]]:
        return WarmStartMemory, ()

    def __repr__(self) -> str:
        kept = ", ".join(f"{use}: {warm_start!r}" for use, warm_start in self._kept)
        return f"WarmStartMemory({kept})"


@dataclass(frozen=True, eq=False)
class Start:
    """The warm start of one solve: what was asked for, its memory, and the samples."""

    warm_start: WarmStart
    memory: Any
    layout: Layout
    samples: Samples

    @staticmethod
    def of(
        use: Use,
        warm_start: WarmStart,
        memory: WarmStartMemory | None,
        layout: Layout,
        like: Tensor,
        index: SampleIndex | None,
    ) -> Start:
        """Bring them together for the packed states `like` (B, D) of a layout.

        Raises:
            UserError: no memory or no index where one is needed, or an index of the wrong kind or
                length.
        """
        if not warm_start.needs_memory:
            return Start(warm_start, None, layout, Samples(like.detach(), Form.of(layout)))
        if memory is None:
            raise UserError(
                f"{warm_start!r} has no place to remember anything between calls; make memory = "
                "WarmStartMemory() once, before the loop, and give solve(..., memory=memory), or "
                "use a DEQ, which has one"
            )
        if warm_start.needs_index and index is None:
            raise UserError(
                f"{warm_start!r} finds samples by their place in the data set, and no "
                "sample_index was given; give sample_index=indices, one integer or key per "
                "sample, or use Previous(), which needs none"
            )
        keys = _keys(index, like.shape[0]) if warm_start.needs_index else None
        samples = Samples(like.detach(), Form.of(layout), _lengths(layout), keys)
        return Start(warm_start, memory.of(use, warm_start), layout, samples)

    def from_cold(self, cold: Tensor) -> tuple[Tensor, Tensor]:
        """Initial states (B, D), and the mask (B,) of the samples that do not start at `cold`."""
        found = self._known()
        if found is None:
            return cold, torch.zeros(cold.shape[0], dtype=torch.bool, device=cold.device)
        rows, known = found
        return torch.where(known.unsqueeze(1), rows, cold), known

    def guess(self) -> Tensor | None:
        """For a linear solve: (B, D), NaN for the samples of which nothing is known."""
        found = self._known()
        return None if found is None else torch.where(found[1].unsqueeze(1), found[0], torch.nan)

    def remember(self, rows: Tensor, status: Tensor, relative_residual: Tensor) -> None:
        """Take in where a solve ended (B, D), with its status and relative residual (B,).

        Worth remembering is what converged or ran out of steps, and came nearer than zero is,
        whose relative residual is 1. What stalled, diverged or is not finite would do so again
        from there, call after call, where a cold start has another chance.
        """
        if not self.warm_start.recalls:
            return
        # Outside of inference mode, because inference tensors could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            rows = rows.detach().clone()
            finished = (status == Status.SUCCESS) | (status == Status.MAX_STEPS)
            good = finished & (relative_residual < 1.0) & torch.isfinite(rows).all(1)
            self.warm_start.remember(rows, good, self.samples, self.memory)

    def _known(self) -> Known | None:
        """What the warm start says, cleared of graphs, of padding, and of what is not finite."""
        with torch.no_grad():
            found = self.warm_start.start(self.samples, self.memory)
            if found is None:
                return None
            rows = found[0].detach()
            if self.layout.segments is not None:
                rows = self.layout.pack(self.layout.unpack(rows))
            return rows, found[1] & torch.isfinite(rows).all(1)


def _keys(index: SampleIndex | None, batch_size: int) -> tuple[Hashable, ...]:
    """One key per sample; integers of a tensor as Python numbers, which compare by value."""
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise UserError(f"sample_index is {index.dtype}; give integers, as a data set counts")
        shape, keys = tuple(index.shape), index.flatten().tolist()
    elif isinstance(index, Sequence) and not isinstance(index, str | bytes):
        shape, keys = (len(index),), list(index)
    else:
        raise UserError(
            f"sample_index is a {type(index).__name__}; give a tensor of integers (B,), or a list "
            "of B keys"
        )
    if shape != (batch_size,):
        raise UserError(
            f"sample_index has shape {shape}, the solve has {batch_size} samples; give one "
            f"integer or key per sample, ({batch_size},)"
        )
    for key in keys:
        if isinstance(key, Tensor) or not isinstance(key, Hashable):
            raise UserError(
                f"sample_index holds a {type(key).__name__}, which cannot be looked up; give "
                "integers or strings"
            )
    return tuple(keys)


def _lengths(layout: Layout) -> tuple[int, ...] | None:
    segments = layout.segments
    if segments is None:
        return None
    problem = segments.slots // max(segments.capacity, 1)
    width = sum(leaf.size for leaf in layout.leaves)
    counts = torch.bincount(problem, minlength=segments.num_segments)
    return tuple((counts * width).tolist())
