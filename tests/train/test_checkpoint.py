"""Checkpoints: complete or absent, checked before anything is touched, never executed."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from equilibria import UserError
from equilibria.train.checkpoint import CheckpointFolder

TRAINING = {"optimizer": {"lr": 0.5, "m": torch.arange(3.0)}, "place": 7, "none": None}


def _model(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 2), nn.Linear(2, 1))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_what_was_saved_comes_back(checkpoints: CheckpointFolder) -> None:
    model = _model(0)
    checkpoints.save(12, model.state_dict(), TRAINING)
    other = _model(1)
    checkpoints.load_weights(12, other)
    assert _equal(_weights(other), _weights(model))
    training = checkpoints.load_training(12)
    assert torch.equal(training["optimizer"].pop("m"), torch.arange(3.0))
    assert training == {"optimizer": {"lr": 0.5}, "place": 7, "none": None}
    assert sorted(_bytes(checkpoints.folder)) == [
        "step-00000012/model.safetensors",
        "step-00000012/training.pt",
    ]


def test_steps_are_sorted_and_other_files_ignored(checkpoints: CheckpointFolder) -> None:
    assert checkpoints.steps() == []
    for step in (100, 9, 20):
        checkpoints.save(step, _model().state_dict(), TRAINING)
    for foreign in (".writing-00000030", "step-40", "step-00000050.bak", "notes"):
        (checkpoints.folder / foreign).mkdir()
    assert checkpoints.steps() == [9, 20, 100]
    assert checkpoints.latest() == 100


def test_an_empty_folder_has_no_latest(checkpoints: CheckpointFolder) -> None:
    for look in (checkpoints.latest, checkpoints.best):
        with pytest.raises(UserError, match="holds no checkpoint.*start it again"):
            look()
    assert checkpoints.best_loss() == math.inf
    checkpoints.prune(1)


def test_best_is_what_was_marked(checkpoints: CheckpointFolder) -> None:
    for step in (1, 2, 3):
        checkpoints.save(step, _model().state_dict(), TRAINING)
    assert checkpoints.best() == 3  # nothing is marked: the newest
    checkpoints.mark_best(2, 1.25)
    assert (checkpoints.best(), checkpoints.best_loss()) == (2, 1.25)


def test_a_mark_of_a_deleted_checkpoint_counts_for_nothing(
    checkpoints: CheckpointFolder,
) -> None:
    """Or a run that repeats the deleted steps would never again be as good as the lost one."""
    for step in (1, 2):
        checkpoints.save(step, _model().state_dict(), TRAINING)
    checkpoints.mark_best(2, 1.25)
    shutil.rmtree(checkpoints.path(2))
    assert (checkpoints.best(), checkpoints.best_loss()) == (1, math.inf)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": "x"}', '{"step": 1}', "\xff"])
def test_a_damaged_mark_is_a_sentence(checkpoints: CheckpointFolder, content: str) -> None:
    checkpoints.save(1, _model().state_dict(), TRAINING)
    (checkpoints.folder / "best.json").write_text(content, encoding="latin-1")
    for look in (checkpoints.best, checkpoints.best_loss):
        with pytest.raises(UserError, match=r"best\.json.*; delete it"):
            look()


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(1, 1, [1, 5]), (2, 5, [4, 5]), (2, 2, [2, 4, 5]), (9, 1, [1, 2, 3, 4, 5]), (2, None, [4, 5])],
)
def test_pruning_keeps_the_newest_and_the_best(
    checkpoints: CheckpointFolder, keep: int, best: int | None, expected: list[int]
) -> None:
    for step in range(1, 6):
        checkpoints.save(step, _model().state_dict(), TRAINING)
    if best is not None:
        checkpoints.mark_best(best, 1.0)
    checkpoints.prune(keep)
    assert checkpoints.steps() == expected


class _CrashError(BaseException):
    """Stands for anything, an interrupt included."""


@pytest.mark.parametrize(
    "where", ["torch.save", "os.rename", "os.fsync", "equilibria.train.checkpoint.save_file"]
)
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
def test_a_crash_while_saving_leaves_the_checkpoints_as_they_were(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, where: str, step: int
) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    before = _bytes(checkpoints.folder)

    def crash(*_: object, **__: object) -> None:
        raise _CrashError

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(_CrashError):
            checkpoints.save(step, _model(1).state_dict(), TRAINING)
    assert checkpoints.steps() == [1]
    assert _bytes(checkpoints.folder) == before
    checkpoints.save(2, _model(1).state_dict(), TRAINING)
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000001", "step-00000002"]


def test_a_crash_at_the_last_rename_of_a_repeated_step_loses_nothing(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    before = _bytes(checkpoints.folder)
    rename = os.rename

    def crash_once(source: Any, target: Any) -> None:
        if Path(source).name.startswith(".writing"):
            raise _CrashError
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash_once)
        with pytest.raises(_CrashError):
            checkpoints.save(1, _model(1).state_dict(), TRAINING)
    assert _bytes(checkpoints.folder) == before


def test_saving_a_step_again_replaces_it(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    checkpoints.save(1, _model(1).state_dict(), TRAINING)
    model = _model(2)
    checkpoints.load_weights(1, model)
    assert _equal(_weights(model), _weights(_model(1)))
    assert os.listdir(checkpoints.folder) == ["step-00000001"]


def test_what_a_killed_process_left_is_removed(checkpoints: CheckpointFolder) -> None:
    """SIGKILL and power cuts run no exception handler."""
    leftover = checkpoints.folder / ".writing-00000007"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == []
    checkpoints.save(8, _model().state_dict(), TRAINING)
    assert os.listdir(checkpoints.folder) == ["step-00000008"]


def _cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])


def _scramble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:16] = b"\xff" * 16
    file.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: _cut(file, 0.5),
    "short of a byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "scrambled": _scramble,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "another format": lambda file: file.write_text("weights"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_weights_are_a_sentence(
    checkpoints: CheckpointFolder, damage: Callable[[Path], Any]
) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    damage(checkpoints.path(1) / "model.safetensors")
    model = _model(1)
    before = _weights(model)
    with pytest.raises(UserError, match=r"model\.safetensors is .*use another checkpoint") as error:
        checkpoints.load_weights(1, model)
    assert "\n" not in str(error.value)
    assert _equal(_weights(model), before)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_training_state_is_a_sentence(
    checkpoints: CheckpointFolder, damage: Callable[[Path], Any]
) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    damage(checkpoints.path(1) / "training.pt")
    with pytest.raises(
        UserError, match=r"training\.pt is .*delete the folder .*step-00000001"
    ) as e:
        checkpoints.load_training(1)
    assert "\n" not in str(e.value)


def test_weights_of_another_shape_are_refused_and_nothing_is_touched(
    checkpoints: CheckpointFolder,
) -> None:
    checkpoints.save(1, _model(0, width=3).state_dict(), TRAINING)
    model = _model(1, width=4)
    before = _weights(model)
    with pytest.raises(
        UserError, match=r"has 0\.weight of shape \(2, 3\), the model's is \(2, 4\)"
    ):
        checkpoints.load_weights(1, model)
    assert _equal(_weights(model), before)


def test_foreign_and_missing_tensors_are_named(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    file = checkpoints.path(1) / "model.safetensors"
    weights = load_file(file)
    weights["stranger"] = weights.pop("1.bias")
    save_file(weights, file)
    model = _model(1)
    before = _weights(model)
    message = "1 tensors are missing .such as '1.bias'., 1 are unknown .such as 'stranger'."
    with pytest.raises(UserError, match=message):
        checkpoints.load_weights(1, model)
    assert _equal(_weights(model), before)


class _Malice:
    """Unpickled naively, this creates a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (Path.touch, (self.victim,))


def test_a_malicious_training_state_is_refused_and_not_run(
    checkpoints: CheckpointFolder, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    file = checkpoints.path(1) / "training.pt"
    torch.save({"optimizer": _Malice(victim)}, file)
    with pytest.raises(UserError, match=r"training\.pt"):
        checkpoints.load_training(1)
    file.write_bytes(pickle.dumps(_Malice(victim), protocol=2))
    with pytest.raises(UserError, match=r"training\.pt"):
        checkpoints.load_training(1)
    assert not victim.exists()


def test_a_training_state_must_be_one(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, _model(0).state_dict(), TRAINING)
    torch.save([1, 2], checkpoints.path(1) / "training.pt")
    with pytest.raises(UserError, match="holds no training state"):
        checkpoints.load_training(1)
