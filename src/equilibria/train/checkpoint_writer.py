"""When checkpoints are written, which are kept, and what happens when the disk is full."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Self, cast

from torch import Tensor

from equilibria.train.checkpoint import CheckpointFolder, Snapshot
from equilibria.train.experiment import TrainConfig


class CheckpointWriter:
    """Saves checkpoints, or the part of them that this process has, at once or beside the training.

    A checkpoint that cannot be written leaves those before it as they were, and the next one is
    another attempt. Use as a context manager, whose end waits for what is being written.

    Args:
        checkpoints: where.
        config: how many to keep, and whether to write in the background.
    """

    def __init__(self, checkpoints: CheckpointFolder, config: TrainConfig) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[str | None] | None = None
        self._failure: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    @property
    def loss_to_beat(self) -> float:
        """Validation loss below which a checkpoint is one of the best."""
        self._failure = self.wait()
        return self._checkpoints.best_loss(self._config.keep_best)

    def begin(self, step: int) -> None:
        """Make room for parts of the next checkpoint, when the last one is written.

        For the first process. What goes wrong is found by `save`.
        """
        self.wait()
        with suppress(OSError):
            self._checkpoints.begin(step)

    def save(self, step: int, snapshot: Snapshot, valid_loss: float | None = None) -> str | None:
        """Write a checkpoint, or begin to; what went wrong with this one or the one before."""
        failure = self.wait()
        if not self._config.save_in_background:
            self._failure = self._write(step, snapshot, valid_loss)
            return self._failure
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoints")
        # Copies, because training goes on with the originals.
        copies = Snapshot(**_copied(snapshot._asdict()))
        self._writing = self._thread.submit(self._write, step, copies, valid_loss)
        return failure

    def wait(self) -> str | None:
        """Until nothing is being written; what went wrong with the last checkpoint."""
        if self._writing is not None:
            self._failure = self._writing.result()
            self._writing = None
        return self._failure

    def _write(self, step: int, snapshot: Snapshot, valid_loss: float | None) -> str | None:
        checkpoints, config = self._checkpoints, self._config
        try:
            if snapshot.training is None:
                checkpoints.save(step, snapshot)
                return None
            best = valid_loss is not None and valid_loss < checkpoints.best_loss(config.keep_best)
            checkpoints.mark(step, valid_loss if best else None, config.keep_best)
            checkpoints.save(step, snapshot)
            checkpoints.prune(config.keep_checkpoints, config.keep_best)
        except (OSError, RuntimeError) as error:  # torch.save has errors of its own
            steps = checkpoints.steps()
            left = f"that of step {steps[-1]} is intact" if steps else "there is none before it"
            reason = str(error).splitlines()[0]
            return f"the checkpoint of step {step} could not be written ({reason}); {left}"
        return None


def _copied(state: Any) -> Any:
    """A state dictionary with tensors of its own on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in cast(dict[Any, Any], state).items()}
    if isinstance(state, list):
        return [_copied(value) for value in cast(list[Any], state)]
    return copy.copy(state)
