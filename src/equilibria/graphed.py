"""Solves as blocks of steps that a GPU replays without hearing of each operation.

A step on a small state is many short kernels, and starting them takes longer than running them. A
CUDA graph starts a whole block at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.api import solve
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.status import RUNNING, Status
from equilibria.solvers.anderson import Anderson
from equilibria.terminations.fixed_steps import FixedSteps

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function launches, and returns what launches all of it again."""


@dataclass(frozen=True)
class GraphedSolution:
    """A fixed point and the evidence for it; per-sample tensors are (B,).

    Args:
        z: the state, a copy of its own.
        status: `Status` codes, int8.
        relative_residual: of exactly the returned z.
        num_steps: steps made until each sample was done, a multiple of the block.
        num_evals: evaluations of f for the whole batch.
    """

    z: State
    status: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    num_evals: int

    @property
    def converged(self) -> Tensor:
        """Mask (B,) of the samples that met the tolerance."""
        return self.status == Status.SUCCESS


class GraphedSolve:
    """Solve z = f(z, *inputs) again and again for inputs of one shape, in replayed blocks.

    A block is `block` steps of the solver from where the block before ended, and its memory starts
    empty: `Anderson` is restarted every `block` steps. The device is asked only after each block
    whether all samples are done; one that is done keeps the state of that block.

        solver = GraphedSolve(f, z0, [x])     # records
        for x in batches:
            z = solver(x).z                   # replays

    For inference. In training give the result as `z0` to a solve of a few steps, which attaches
    the gradient. Parameters that f uses are read where they lie when a block is replayed: they may
    change in place, as optimisers change them, and must not be replaced.

    Args:
        f: the map (z, *inputs) -> z, each sample on its own; launches the same kernels every time
            and does not look at numbers.
        z0: initial state of every solve, a tree of (B, ...) tensors on one CUDA device.
        inputs: tensors of the shapes, types and device of those to come.
        solver: how to step.
        block: steps between two looks; 8 is less than the history of `Anderson()`, so that a
            restart loses little.
        rtol: a sample is done when its residual is below this share of f(z).
        max_steps: no block is begun after so many steps.
        capture: what records a block; None for `torch.cuda.graph`.

    Raises:
        UserError: tensors that are not on a CUDA device, a map that cannot be recorded, an option
            out of range.
    """

    def __init__(
        self,
        f: Callable[..., State],
        z0: State,
        inputs: Sequence[Tensor] = (),
        *,
        solver: Solver = Anderson(),
        block: int = 8,
        rtol: float = 1e-4,
        max_steps: int = 48,
        capture: Capture | None = None,
    ) -> None:
        check_positive_integer("block", block)
        check_positive_integer("max_steps", max_steps)
        check_not_negative("rtol", rtol)
        self._block, self._rtol, self._max_steps = block, rtol, max_steps
        if capture is None:
            _check_cuda([*pytree.tree_leaves(z0), *inputs])
            capture = capture_cuda
        self._z0 = _copied(z0)
        self._z = _copied(z0)
        self._inputs = [tensor.detach().clone() for tensor in inputs]
        self._residual = _no_residual(self._z0)
        termination = FixedSteps(block)

        def run() -> None:
            solution = solve(
                lambda z: f(z, *self._inputs),
                self._z,
                solver=solver,
                termination=termination,
                max_steps=block,
                on_failure="ignore",
            )
            _copy(self._z, solution.z)
            self._residual.copy_(solution.relative_residual)
            self.num_evals_per_block = solution.num_evals

        self.num_evals_per_block = 0
        """Evaluations of f that a replay makes."""
        with torch.no_grad():
            try:
                self._replay = capture(run)
            except RuntimeError as error:
                raise UserError(
                    f"the map cannot be recorded ({str(error).splitlines()[0]}); it must launch "
                    "the same kernels at every call and look at no number (no .item(), no branch "
                    "on a tensor, no copy to the CPU). Use solve(...) for it"
                ) from error

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> GraphedSolution:
        """Solve for these inputs.

        Raises:
            UserError: another number of them, or another shape, type or device than recorded.
        """
        self._check(inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        _copy(self._z, self._z0)
        z, residual = _copied(self._z0), torch.full_like(self._residual, torch.inf)
        status = torch.full_like(residual, RUNNING, dtype=torch.int8)
        num_steps = torch.zeros_like(residual, dtype=torch.int64)
        made = 0
        while made < self._max_steps:
            self._replay()
            made += self._block
            going_on = status == RUNNING
            # What is not finite is never better, and the solve has gone back to where it began.
            better = going_on & (self._residual < residual)
            residual = torch.where(better, self._residual, residual)
            z = _chosen(better, self._z, z)
            num_steps += self._block * going_on
            status = torch.where(going_on & (residual <= self._rtol), Status.SUCCESS, status)
            if not bool((status == RUNNING).any()):
                break
        missed = torch.where(residual.isfinite(), int(Status.MAX_STEPS), int(Status.NONFINITE))
        status = torch.where(status == RUNNING, missed, status).to(torch.int8)
        num_evals = made // self._block * self.num_evals_per_block
        return GraphedSolution(z, status, residual, num_steps, num_evals)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._inputs):
            raise UserError(f"{len(inputs)} inputs given, {len(self._inputs)} were recorded")
        for i, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if (own.shape, own.dtype, own.device) != (given.shape, given.dtype, given.device):
                raise UserError(
                    f"input {i} is {tuple(given.shape)}, {given.dtype} on {given.device}, and was "
                    f"recorded as {tuple(own.shape)}, {own.dtype} on {own.device}; record another "
                    "GraphedSolve for it"
                )


def capture_cuda(run: Callable[[], None]) -> Callable[[], None]:
    """Record one call in a CUDA graph, after three that warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _check_cuda(tensors: Sequence[Any]) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) != 1 or not next(iter(devices)).startswith("cuda"):
        raise UserError(
            f"the tensors are on {', '.join(sorted(devices)) or 'no device'}, and CUDA graphs need "
            "all of them on one CUDA device; use solve(...) elsewhere"
        )


def _copied(state: State) -> State:
    def copied(leaf: Tensor) -> Tensor:
        return leaf.detach().clone()

    return pytree.tree_map(copied, state)


def _copy(to: State, state: State) -> None:
    for own, new in zip(pytree.tree_leaves(to), pytree.tree_leaves(state), strict=True):
        own.copy_(new)


def _no_residual(state: State) -> Tensor:
    leaf = cast(Tensor, pytree.tree_leaves(state)[0])
    wide = torch.promote_types(leaf.dtype, torch.float32)
    return leaf.new_full((leaf.shape[0],), torch.inf, dtype=wide)


def _chosen(mask: Tensor, state: State, other: State) -> State:
    """Samples of one state where the mask is true, of the other elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    return pytree.tree_map(choose, state, other)
