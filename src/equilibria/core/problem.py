"""The fixed-point problem z = f(z) on packed states, with honest counting of evaluations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from equilibria.core.autocast import Autocast
from equilibria.core.closure import InputRecorder, free_point, reached
from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate, Measurement, measure, measured_wide, rms
from equilibria.core.replay import LARGEST_DIFFERENCE, NUM_ROUNDINGS, SameTwice
from equilibria.core.scope import solve_scope
from equilibria.core.state import Layout, State
from equilibria.core.untouched import WROTE_TO_ARGUMENT, WROTE_TO_IMAGE, Untouched

Select = Callable[[Tensor], Callable[[State], State]]
"""Indices of samples (b,) -> f for these samples only."""

Map = Callable[[Tensor], Tensor]
"""A function on packed states, (B, D) -> (B, D)."""


class Evaluate(Protocol):
    """What a solver calls: a packed point in, that point with its image out.

    It returns an `Iterate` and not a bare image because the point may not be the one asked for:
    rows of finished samples stay where they are, and a low-precision state is rounded to what `f`
    sees.
    """

    def __call__(self, z: Tensor) -> Iterate: ...

    def recorded(self, z: Tensor) -> Iterate:
        """Evaluate with gradients recorded, whatever the grad mode.

        For products with the Jacobian by backward passes: one call of f, counted as such; the
        products themselves do not call f.
        """
        ...


class Problem:
    """Find `z` with `z = f(z)`, for each sample of a batch.

    Args:
        f: the map on the user's states.
        z0: where to start; any tree of tensors (B, ...).
        batch_dims: 1, or 0 when the whole state is one problem without a batch dimension.
        segments: for each row of the state, which problem it belongs to (N,); see `Segments`.
        inputs: the tensors that f depends on besides z, where they are known; None finds them
            while an evaluation is recorded. Only second derivatives need them.

    Raises:
        StateError: `z0` is no valid state (see `Layout.of`).
    """

    def __init__(
        self,
        f: Callable[[State], State],
        z0: State,
        batch_dims: Literal[0, 1] = 1,
        segments: Tensor | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        if not callable(f):
            hint = "; f comes first, then z0" if isinstance(f, Tensor) else ""
            raise UserError(f"f is a {type(f).__name__}, expected a function of the state{hint}")
        self.f = f
        with solve_scope() as scope:
            self.scope = scope
        self._inputs = None if inputs is None else _known_inputs(inputs)
        self.layout = Layout.of(z0, batch_dims, segments)
        self.z0 = _usable(self.layout.pack(z0))
        self._autocast = Autocast(self.layout.device)
        self.num_evals = 0
        self._first_image: State | None = None
        self.select: Select | None = None
        self.checkpoint = False  # whether recorded evaluations are made again when needed

    def restricted(self, samples: Tensor, num_evals: int) -> Problem:
        """The problem of some samples only, given by their indices (b,); counts on from there."""
        if self.select is None:
            raise RuntimeError("samples are left out of a problem that does not say how")
        part = copy(self)
        part.f = self.select(samples.clone())  # theirs to write to
        part.layout = replace(self.layout, batch_size=len(samples))
        part.scope = self.scope.of_samples(samples, self.layout.batch_size)
        part.num_evals = num_evals
        return part

    def check_part(self, known: Iterate) -> None:
        """Evaluate at points whose images the whole problem gave; they must be the same.

        Raises:
            UserError: `select` returned the f of other samples, or one that writes to its argument.
        """
        state = self.layout.unpack(known.z)
        watch = Untouched(state, WROTE_TO_ARGUMENT)
        image = self.layout.pack(self.call_again(state))
        watch.check()
        off, size = rms(image - known.fz), rms(known.fz)
        tolerance = min(NUM_ROUNDINGS * self.rounding, LARGEST_DIFFERENCE)
        if not bool(((off <= tolerance * size) | ~size.isfinite()).all()):
            raise UserError(
                "the f that select returned gives other images than the whole f for the same "
                "samples; it has to take the rows that it is asked for out of everything that goes "
                "by samples (injection[rows]), or leave out select"
            )

    def call_again(self, state: State) -> State:
        """f on a state, counted, with the autocast of the solve."""
        self.num_evals += 1
        with self._autocast.restored():
            return self.call(state)

    def image(self, z: Tensor) -> Tensor:
        """Call `f` once on a packed point; with grad enabled the call is recorded."""
        self.num_evals += 1
        state = self.layout.unpack(z)
        watches = self._watches(state)
        with self._autocast.restored():
            if self.checkpoint and torch.is_grad_enabled():
                # to the end of f, where the comparison is
                with set_checkpoint_early_stop(False):
                    again = SameTwice(self.call, self.rounding)
                    image = checkpoint(again, state, use_reentrant=False)
            else:
                image = self.call(state)
            for watch in watches:
                watch.check()
            self._first_image = image if self.num_evals == 1 else self._first_image
            return _kept(self.layout.pack(image))

    def _watches(self, state: State) -> list[Untouched]:
        """What the coming evaluation must not write to; the first few tell for all."""
        if self.num_evals == 1:
            return [Untouched(state, WROTE_TO_ARGUMENT)]
        if self.num_evals > 3:  # two buffers may take turns
            self._first_image = None
        return [] if self._first_image is None else [Untouched(self._first_image, WROTE_TO_IMAGE)]

    @property
    def rounding(self) -> float:
        """The precision that f computes in, as far as state and autocast tell."""
        dtypes = [leaf.dtype for leaf in self.layout.leaves]
        if self._autocast.dtype is not None:
            dtypes.append(self._autocast.dtype)
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def call(self, state: State) -> State:
        """f on a state, with the masks and weights of this solve."""
        return self.scope.calling(self.f, state)

    def measure(self, iterate: Iterate, fused: ModuleType | None = None) -> Measurement:
        """Norms of residual and image per sample; padding does not count."""
        return measure(iterate, self.layout.norm_scale, fused)

    def measured_wide(self, iterate: Iterate, measured: Measurement) -> Measurement | None:
        """See `equilibria.core.iterate.measured_wide`."""
        return measured_wide(iterate, measured, self.layout.norm_scale)

    def evaluate(self, z: Tensor, *, record: bool = True) -> Iterate:
        """Pair a point with its image; `z` is first rounded to what `f` really sees."""
        if self.layout.rounds:
            z = self.layout.pack(self.layout.unpack(z))
        if record or not torch.is_grad_enabled():
            return Iterate(z, self.image(z))
        with torch.no_grad():
            return Iterate(z, self.image(z))

    def tape(self, z: Tensor) -> tuple[Iterate, tuple[Tensor, ...]]:
        """Evaluate `f` at a copy of `z` that is an independent variable, recording gradients.

        Returns the iterate, and the tensors besides z that the image depends on.
        """
        with torch.enable_grad():
            free = free_point(z)
            if self._inputs is not None:
                return Iterate(free, self.image(free)), self._inputs
            with InputRecorder(exclude=free) as recorder:
                image = self.image(free)
            return Iterate(free, image), reached(image, recorder.inputs, recorder.start)


def _usable(z0: Tensor) -> Tensor:
    """The start, copied where it comes from inference mode and may be part of a graph now."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return z0
    return z0.clone() if z0.is_inference() else z0


def _kept(image: Tensor) -> Tensor:
    """The image, copied where a compiled f may write its next one to the same memory.

    CUDA graphs (`mode="reduce-overhead"`) do that, while solvers look back at several images.
    """
    if torch.compiler.is_compiling() or not image.is_cuda:
        return image
    return image.clone() if "torch._inductor.cudagraph_trees" in sys.modules else image


def _known_inputs(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those that need a gradient."""
    if isinstance(inputs, Tensor) or not all(isinstance(item, Tensor) for item in inputs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(
            f"inputs is a {type(inputs).__name__} that is no list of tensors; give the tensors "
            "that f depends on besides z, as in inputs=[x, weight]"
        )
    return tuple(tensor for tensor in inputs if tensor.requires_grad)
