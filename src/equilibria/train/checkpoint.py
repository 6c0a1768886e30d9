"""Checkpoints: a folder per step, complete or absent, read without running any pickle."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.train.files import (
    flush_file,
    flush_folder,
    read_json,
    reason,
    remove_temporaries,
    write_json,
)
from equilibria.train.fit import check_shapes
from equilibria.train.saved_state import check_archive
from equilibria.train.shards import load_weights
from equilibria.train.tensor_files import Part, TensorFiles, has_tensors, write_tensors

_NAME = re.compile(r"step-(\d{8})")
_WEIGHTS, _OPTIMIZER, _TRAINING, _BEST = "model", "optimizer", "training.pt", "best.json"
_FORMER = ".former-"
"""Before the name of a complete checkpoint that makes way for another of its step."""
_SECONDS_FOR_PARTS = 600
"""Until the other processes have written theirs; then the checkpoint is given up."""


class Snapshot(NamedTuple):
    """What a process writes of a checkpoint."""

    weights: dict[str, Tensor]
    training: dict[str, Any] | None = None
    """What else is needed to go on; None in all processes but the first."""
    optimizer: dict[str, Tensor] | None = None
    """Shards of its state, where it is sharded; otherwise `training` has it."""
    part: Part = Part()


class _Mark(NamedTuple):
    """Loss and step of one of the best; losses are compared first."""

    loss: float
    step: int

    @staticmethod
    def of(entry: object) -> _Mark | None:
        """Read one; None where it is something else."""
        match entry:
            case {"step": int(step), "loss": float(loss)} if not math.isnan(loss):
                return _Mark(loss, step)
            case {"step": int(step), "loss": int(loss)} if abs(loss) < 2**53:
                return _Mark(float(loss), step)
            case _:
                return None


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run.

    Each is a folder `step-00000600` with `model.safetensors` (the weights) and `training.pt`
    (optimiser, place in the data, random state: tensors and plain values only). Several processes
    that have shards write one `model-00001-of-00002.safetensors` and `optimizer-...` each.
    """

    folder: Path

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def latest(self) -> int:
        """Step of the newest checkpoint.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self.folder} holds no checkpoint; the run stopped before its first one was "
                "written, so start it again with 'equilibria train'"
            )
        return steps[-1]

    def best(self) -> int:
        """Step of the best checkpoint on the validation split; the newest if none is marked."""
        marks = self._marks()
        return marks[0].step if marks else self.latest()

    def best_loss(self, rank: int = 1) -> float:
        """Validation loss of the best checkpoint, or the second best ...; infinity for none."""
        marks = self._marks()
        return marks[rank - 1].loss if len(marks) >= rank else math.inf

    def _marks(self) -> list[_Mark]:
        """Best checkpoints, the best first; marks of those that are gone count for nothing."""
        present = self.steps()
        return [mark for mark in self._all_marks() if mark.step in present]

    def _all_marks(self) -> list[_Mark]:
        """Of checkpoints that are about to be written, too."""
        file, advice = self.folder / _BEST, "delete it to use the newest checkpoint"
        if not file.exists():
            return []
        match read_json(file, advice):
            case {"best": list(entries)}:
                marks = [_Mark.of(entry) for entry in cast(list[Any], entries)]
            case entry:  # of one checkpoint, as it was written at first
                marks = [_Mark.of(entry)]
        found = [mark for mark in marks if mark is not None]
        if len(found) < len(marks):
            raise UserError(f"{file} holds no step and loss; {advice}")
        return sorted(found)

    def begin(self, step: int) -> None:
        """Make room for the checkpoint of a step, before processes write their parts of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()
        self._unfinished(step).mkdir()

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Write a checkpoint, which others see when it is complete; or a part, after `begin`.

        The first process waits for the others and moves the whole into place. One that fails
        deletes the unfinished folder, by which the others notice, on a full disk, too.

        Raises:
            OSError: it cannot be written, or another process could not.
        """
        temporary = self._unfinished(step)
        if snapshot.part.of == 1:
            self.begin(step)
        try:
            self._write(temporary, snapshot)
            if snapshot.training is not None:
                _wait_for_parts(temporary, snapshot.part)
                flush_folder(temporary)
                self._put_in_place(temporary, self.path(step))
                flush_folder(self.folder)
        except BaseException as error:
            if isinstance(error, OSError) and not temporary.exists():
                raise OSError("another process could not write its part") from error
            self._give_up(temporary, shared=snapshot.part.of > 1)
            raise

    def _give_up(self, temporary: Path, *, shared: bool) -> None:
        """Delete an unfinished checkpoint, at once from where others may be writing into it."""
        target = temporary
        if shared:
            with suppress(OSError):
                target = self._set_aside(temporary)
        shutil.rmtree(target, ignore_errors=True)

    def _set_aside(self, folder: Path) -> Path:
        """Take a folder out of sight at once, because its files are deleted one by one."""
        target = self.folder / f".deleting-{folder.name.lstrip('.')}-{os.getpid()}"
        return folder.rename(target)

    def _unfinished(self, step: int) -> Path:
        return self.folder / f".writing-{step:08d}"

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        """The files of one process, flushed to disk."""
        tensors = {_WEIGHTS: snapshot.weights}
        if snapshot.optimizer is not None:
            tensors[_OPTIMIZER] = snapshot.optimizer
        for stem, values in tensors.items():
            write_tensors(folder / snapshot.part.file_name(stem), values)
        if snapshot.training is not None:
            torch.save(snapshot.training, folder / _TRAINING)
            flush_file(folder / _TRAINING)

    def remove_leftovers(self) -> None:
        """Delete what a killed process was about to write, or to delete."""
        for former in self.folder.glob(_FORMER + "step-*"):
            target = former.with_name(former.name.removeprefix(_FORMER))
            if not target.exists():
                former.rename(target)
        for prefix in (".writing-", ".deleting-", _FORMER):
            for leftover in self.folder.glob(prefix + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
        remove_temporaries(self.folder / _BEST)

    def _put_in_place(self, complete: Path, target: Path) -> None:
        """Rename a complete checkpoint; one of the same step makes way only for the new one."""
        if not target.exists():
            os.rename(complete, target)
            return
        former = self.folder / f"{_FORMER}{target.name}"
        os.rename(target, former)
        try:
            os.rename(complete, target)
        except BaseException:
            os.rename(former, target)
            raise
        shutil.rmtree(former, ignore_errors=True)

    def mark(self, step: int, loss: float | None, keep: int = 1) -> None:
        """Remember a checkpoint, which may be about to be written, for its validation loss.

        Marked before, because marks of checkpoints that are not there count for nothing, so that
        its rename makes it the best, too, whenever the process is killed. So many others keep
        their marks, in case that it does not come. None forgets what an attempt before has left.
        """
        marks = [mark for mark in self._marks() if loss is None or mark.step != step][:keep]
        if loss is not None:
            marks = sorted([*marks, _Mark(loss, step)])
        if marks != self._all_marks():
            self.folder.mkdir(parents=True, exist_ok=True)
            entries = [{"step": mark.step, "loss": mark.loss} for mark in marks]
            write_json(self.folder / _BEST, {"best": entries})

    def prune(self, keep: int, keep_best: int = 1) -> None:
        """Delete all but the newest `keep` checkpoints and the `keep_best` best ones."""
        steps = self.steps()
        if not steps:
            return
        kept = {*steps[-keep:], *(mark.step for mark in self._marks()[:keep_best])}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._set_aside(self.path(step)))

    def weights(self, step: int, *, resuming: bool = False) -> TensorFiles:
        """The tensors of a checkpoint, of which nothing but names and shapes has been read.

        Raises:
            UserError: the file is missing, truncated or damaged.
        """
        advice = "use another checkpoint of the run (--checkpoint STEP)"
        return TensorFiles(self.path(step), _WEIGHTS, self._go_back(step) if resuming else advice)

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Copy a checkpoint's weights into `model`.

        Raises:
            UserError: the file is missing, truncated or damaged, or the tensors in it are not
                those of the model; the model is untouched then.
        """
        files = self.weights(step)
        check_shapes(files, model.state_dict())
        load_weights(model, files)

    def _go_back(self, step: int) -> str:
        """What helps when a run cannot go on from a checkpoint."""
        return f"delete the folder {self.path(step)} to resume from the checkpoint before it"

    def optimizer_shards(self, step: int) -> TensorFiles | None:
        """What processes with shards wrote of their optimiser; None where training has all of it.

        Raises:
            UserError: files are missing, truncated or damaged.
        """
        if not has_tensors(self.path(step), _OPTIMIZER):
            return None
        return TensorFiles(self.path(step), _OPTIMIZER, self._go_back(step))

    def load_training(self, step: int) -> dict[str, Any]:
        """Read what training needs to go on from a checkpoint.

        Raises:
            UserError: the file is missing, truncated or damaged.
        """
        file = self.path(step) / _TRAINING
        try:
            check_archive(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch.load raises whatever its zip and unpickling layers raise; what it advises next
            # is to let the file run its code.
            why = reason(error).partition(". In PyTorch 2.6")[0]
            raise UserError(
                f"{file} is missing, truncated or damaged ({why}); delete the folder "
                f"{file.parent} to resume from the checkpoint before it"
            ) from error
        if not isinstance(state, dict):
            raise UserError(f"{file} holds no training state; it was not written by equilibria")
        return state


def _wait_for_parts(folder: Path, part: Part) -> None:
    """Until all files of all processes are there.

    Raises:
        FileNotFoundError: another process has given up.
        OSError: it does not come.
    """
    expected = [each.file_name(stem) for each in part.all() for stem in (_WEIGHTS, _OPTIMIZER)]
    deadline = time.monotonic() + _SECONDS_FOR_PARTS
    while part.of > 1 and (missing := [name for name in expected if not (folder / name).exists()]):
        if not folder.exists():
            raise FileNotFoundError
        if time.monotonic() > deadline:
            raise OSError(
                f"{missing[0]} did not come within {_SECONDS_FOR_PARTS} s; all processes need to "
                "see the same folder"
            )
        time.sleep(0.02)
