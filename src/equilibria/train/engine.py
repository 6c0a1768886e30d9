"""Processes that train together: who they are, what they agree on, how gradients meet.

Lightning Fabric joins them (which launcher started them, devices, process groups, DDP, FSDP2),
because it does that and no more: Accelerate wants its own configuration files and shards on GPUs
only, so that nothing of it could be tested without one. Two things of Fabric are left out: its
wrapper around the model, which takes apart what a model returns and would lose the solution, and
its own way of starting processes, which does not start them again (`equilibria.train.launch`).
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.tasks.task import Share
from equilibria.train.launch import is_launched, join_attempt

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Strategy = Literal["ddp", "fsdp"]
Value = TypeVar("Value")
_SECONDS_TO_DROP = 0.2
"""For threads of a process group to be done with what has ended."""


class Engine:
    """One process by itself: nothing to agree on.

    Args:
        device: where it runs.
    """

    share = Share()

    def __init__(self, device: torch.device) -> None:
        self.device = device

    is_sharded = False
    """Whether every process holds a part of the parameters and of the optimiser's state."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.share.rank == 0

    def distribute(self, model: nn.Module) -> nn.Module | None:
        """What to call in training instead of the model; None for the model itself.

        Parameters of the model may be replaced by shards: make optimisers afterwards.
        """
        return None

    def without_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """Where backward passes leave gradients to be averaged by a later one."""
        return nullcontext()

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order, in all of them."""
        return [value]

    def from_main(self, value: Value) -> Value:
        """The value of the main process."""
        return value

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over the processes, by element."""
        return values

    def seed(self, seed: int, step: int = 0) -> None:
        """Let the random numbers of processes differ; the main one goes on with its own."""

    def close(self) -> None:
        """Leave the others."""


class FabricEngine(Engine):
    """One of several processes.

    Under DDP every process solves on its own and gradients are averaged after the backward pass.
    Under FSDP the model is one unit: its shards are gathered once per training step, before the
    first solve, and gradients are scattered once, after the last product of the backward solve.
    So there is no communication inside of a solve, which may take another number of steps on
    every process.

    Args:
        fabric: launched.
        is_sharded: by FSDP.
    """

    def __init__(self, fabric: Fabric, *, is_sharded: bool = False) -> None:
        super().__init__(fabric.device)
        self.is_sharded = is_sharded
        self.share = Share(fabric.global_rank, fabric.world_size)
        self._fabric = fabric

    def distribute(self, model: nn.Module) -> nn.Module | None:
        """Wrap the model (DDP) or shard its parameters (FSDP)."""
        # FSDP warns of outputs that are views, which nothing writes to here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        wrapped = self._fabric.strategy.setup_module(model)
        return None if wrapped is model else wrapped

    def without_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[Any]:
        """See `Engine.without_sync`."""
        control = self._fabric.strategy._backward_sync_control  # pyright: ignore[reportPrivateUsage]
        if control is None or not enabled:
            return nullcontext()
        return control.no_backward_sync(model, enabled=True)

    def gather(self, value: Value) -> list[Value]:
        """See `Engine.gather`."""
        values: list[Any] = [None] * self.share.num_processes
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: Value) -> Value:
        """See `Engine.from_main`."""
        return self._fabric.broadcast(value)

    def largest(self, values: Tensor) -> Tensor:
        """See `Engine.largest`."""
        values = values.clone()
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def seed(self, seed: int, step: int = 0) -> None:
        """Draw differently from the others; see `Engine.seed`."""
        if self.share.rank:
            # Hashed, so that neighbouring seeds and ranks have nothing in common.
            text = f"{seed}:{step}:{self.share.rank}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))

    def close(self) -> None:
        """Leave the process group.

        Its threads may be about to drop Python objects, for which they need the lock that is held
        while the group is destroyed, which waits for them: PyTorch 2.13 was seen to hang there.
        """
        time.sleep(_SECONDS_TO_DROP)
        torch.distributed.destroy_process_group()


def start_engine(
    device: torch.device, devices: int = 1, nodes: int = 1, strategy: Strategy = "ddp"
) -> Engine:
    """Join the processes of this training, which a launcher has started; alone for one device.

    Args:
        device: kind of device; every process takes its own of them.
        devices: processes per node.
        nodes: machines.
        strategy: "ddp" keeps the whole model everywhere, "fsdp" shards parameters, gradients and
            the state of the optimiser.

    Raises:
        UserError: other numbers than the launcher has started.
    """
    if devices * nodes == 1:
        return Engine(device)
    if not is_launched():
        raise UserError(
            f"--train.nodes {nodes} needs the command to be started on every machine; use torchrun "
            f"--nnodes {nodes} --nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint "
            "HOST:PORT --rdzv-id NAME -m equilibria train ..., or srun"
        )
    # here and not above: one process needs nothing of it
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # no banner
    kind: Any = strategy
    if strategy == "fsdp":
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

        kind = ModelParallelStrategy(_sharded, devices * nodes, 1)
    try:
        join_attempt(device)
        fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, strategy=kind)
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{nodes} x {devices} processes cannot be joined ({error}); give --train.devices and "
            "--train.nodes the numbers that the launcher was given"
        ) from error
    if fabric.world_size != devices * nodes:
        raise UserError(
            f"the launcher started {fabric.world_size} processes and --train.devices times "
            f"--train.nodes is {devices * nodes}; give both the same numbers"
        )
    return FabricEngine(fabric, is_sharded=strategy == "fsdp")


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """One unit, gathered by the model's call and kept until the gradients are there."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=False)  # pyright: ignore[reportReturnType]
