"""Checkpoints: a folder per step, complete or absent, read without running any pickle."""

from __future__ import annotations

import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.train.files import flush_folder, read_json, remove_temporaries, write_json
from equilibria.train.shards import load_weights

_NAME = re.compile(r"step-(\d{8})")
_WEIGHTS, _TRAINING, _BEST = "model.safetensors", "training.pt", "best.json"


class _Mark(NamedTuple):
    """Loss and step of one of the best; losses are compared first."""

    loss: float
    step: int

    @staticmethod
    def of(entry: object) -> _Mark | None:
        """Read one; None where it is something else."""
        match entry:
            case {"step": int(step), "loss": int() | float() as loss}:
                return _Mark(float(loss), step)
            case _:
                return None


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run.

    Each is a folder `step-00000600` with `model.safetensors` (the weights) and `training.pt`
    (optimiser, place in the data, random state: tensors and plain values only).
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
        file, advice = self.folder / _BEST, "delete it to use the newest checkpoint"
        if not file.exists():
            return []
        match read_json(file, advice):
            case {"best": list(entries)}:
                marks = [_Mark.of(entry) for entry in cast(list[Any], entries)]
            case entry:  # of one checkpoint, as it was written at first
                marks = [_Mark.of(entry)]
        present = self.steps()
        found = [mark for mark in marks if mark is not None]
        if len(found) < len(marks):
            raise UserError(f"{file} holds no step and loss; {advice}")
        return sorted(mark for mark in found if mark.step in present)

    def save(self, step: int, weights: dict[str, Tensor], training: dict[str, Any]) -> Path:
        """Write a checkpoint beside the others and move it into place when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.remove_leftovers()
        temporary = self.folder / f".writing-{step:08d}"
        temporary.mkdir()
        try:
            save_file(_contiguous(weights), temporary / _WEIGHTS)
            torch.save(training, temporary / _TRAINING)
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            flush_folder(temporary)
            self._put_in_place(temporary, self.path(step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        flush_folder(self.folder)
        return self.path(step)

    def remove_leftovers(self) -> None:
        """Delete what a killed process was about to write."""
        for leftover in (*self.folder.glob(".writing-*"), *self.folder.glob(".former-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        remove_temporaries(self.folder / _BEST)

    def _put_in_place(self, complete: Path, target: Path) -> None:
        """Rename a complete checkpoint; one of the same step makes way only for the new one."""
        if not target.exists():
            os.rename(complete, target)
            return
        former = self.folder / f".former-{target.name}"
        os.rename(target, former)
        try:
            os.rename(complete, target)
        except BaseException:
            os.rename(former, target)
            raise
        shutil.rmtree(former, ignore_errors=True)

    def mark_best(self, step: int, loss: float, keep: int = 1) -> None:
        """Remember a checkpoint as one of the `keep` with the lowest validation loss."""
        others = [mark for mark in self._marks() if mark.step != step]
        best = sorted([*others, _Mark(loss, step)])[:keep]
        marks = [{"step": mark.step, "loss": mark.loss} for mark in best]
        write_json(self.folder / _BEST, {"best": marks})

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints and the best ones."""
        steps = self.steps()
        if not steps:
            return
        kept = {*steps[-keep:], *(mark.step for mark in self._marks())}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step))

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Copy a checkpoint's weights into `model`.

        Raises:
            UserError: the file is missing, truncated or damaged, or the tensors in it are not
                those of the model; the model is untouched then.
        """
        file = self.path(step) / _WEIGHTS
        try:
            weights = load_file(file)
        except FileNotFoundError as error:
            raise UserError(
                f"{file} is missing; use another checkpoint of the run (--checkpoint STEP)"
            ) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{file} is truncated or damaged ({error}); use another checkpoint of the run "
                "(--checkpoint STEP)"
            ) from error
        _check_fit(file, weights, model.state_dict())
        load_weights(model, weights)

    def load_training(self, step: int) -> dict[str, Any]:
        """Read what training needs to go on from a checkpoint.

        Raises:
            UserError: the file is missing, truncated or damaged.
        """
        file = self.path(step) / _TRAINING
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch.load raises whatever its zip and unpickling layers raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{file} is missing, truncated or damaged ({reason}); delete the folder "
                f"{file.parent} to resume from the checkpoint before it"
            ) from error
        if not isinstance(state, dict):
            raise UserError(f"{file} holds no training state; it was not written by equilibria")
        return state


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _check_fit(file: Path, given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, foreign = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or foreign:
        raise UserError(
            f"{file} belongs to another model: {len(missing)} tensors are missing"
            f"{_first(missing)}, {len(foreign)} are unknown{_first(foreign)}; evaluate it with "
            "the configuration it was trained with"
        )
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{file} has {name} of shape {tuple(given[name].shape)}, the model's is "
                f"{tuple(tensor.shape)}; the configuration or the text has changed since"
            )


def _first(names: set[str]) -> str:
    return f" (such as {min(names)!r})" if names else ""
