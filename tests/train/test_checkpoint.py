"""Checkpoints: complete or absent, checked before anything is touched, never executed."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from equilibria import UserError
from equilibria.train.checkpoint import CheckpointFolder, Snapshot
from equilibria.train.tensor_files import Part

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
    checkpoints.save(12, Snapshot(model.state_dict(), TRAINING))
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
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))
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
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))
    assert checkpoints.best() == 3  # nothing is marked: the newest
    checkpoints.mark(2, 1.25)
    assert (checkpoints.best(), checkpoints.best_loss()) == (2, 1.25)


def test_a_checkpoint_is_marked_before_it_is_there(checkpoints: CheckpointFolder) -> None:
    """A kill after the rename leaves the best one marked, a kill before it the one before."""
    for step, loss in ((1, 1.5), (2, 1.25)):
        checkpoints.mark(step, loss)
        assert checkpoints.best_loss() == {1: math.inf, 2: 1.5}[step]
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))
        assert (checkpoints.best(), checkpoints.best_loss()) == (step, loss)
    checkpoints.mark(3, 1.0)
    assert (checkpoints.best(), checkpoints.best_loss()) == (2, 1.25)
    checkpoints.mark(3, None)  # another attempt, which is none of the best
    checkpoints.save(3, Snapshot(_model().state_dict(), TRAINING))
    assert checkpoints.best() == 2
    checkpoints.prune(1)
    assert checkpoints.steps() == [2, 3]
    checkpoints.mark(2, None)  # saved again, and no worse
    assert checkpoints.best() == 2


def test_a_mark_of_a_deleted_checkpoint_counts_for_nothing(
    checkpoints: CheckpointFolder,
) -> None:
    """Or a run that repeats the deleted steps would never again be as good as the lost one."""
    for step in (1, 2):
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))
    checkpoints.mark(2, 1.25)
    shutil.rmtree(checkpoints.path(2))
    assert (checkpoints.best(), checkpoints.best_loss()) == (1, math.inf)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": "x"}', '{"step": 1}', "\xff"])
def test_a_damaged_mark_is_a_sentence(checkpoints: CheckpointFolder, content: str) -> None:
    checkpoints.save(1, Snapshot(_model().state_dict(), TRAINING))
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
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))
    if best is not None:
        checkpoints.mark(best, 1.0)
    checkpoints.prune(keep)
    assert checkpoints.steps() == expected


class _CrashError(BaseException):
    """Stands for anything, an interrupt included."""


@pytest.mark.parametrize(
    "where", ["torch.save", "os.rename", "os.fsync", "equilibria.train.tensor_files.save_file"]
)
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
def test_a_crash_while_saving_leaves_the_checkpoints_as_they_were(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, where: str, step: int
) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    before = _bytes(checkpoints.folder)

    def crash(*_: object, **__: object) -> None:
        raise _CrashError

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(_CrashError):
            checkpoints.save(step, Snapshot(_model(1).state_dict(), TRAINING))
    assert checkpoints.steps() == [1]
    assert _bytes(checkpoints.folder) == before
    checkpoints.save(2, Snapshot(_model(1).state_dict(), TRAINING))
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000001", "step-00000002"]


def test_a_crash_at_the_last_rename_of_a_repeated_step_loses_nothing(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    before = _bytes(checkpoints.folder)
    rename = os.rename

    def crash_once(source: Any, target: Any) -> None:
        if Path(source).name.startswith(".writing"):
            raise _CrashError
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash_once)
        with pytest.raises(_CrashError):
            checkpoints.save(1, Snapshot(_model(1).state_dict(), TRAINING))
    assert _bytes(checkpoints.folder) == before


def test_saving_a_step_again_replaces_it(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    checkpoints.save(1, Snapshot(_model(1).state_dict(), TRAINING))
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
    checkpoints.save(8, Snapshot(_model().state_dict(), TRAINING))
    assert os.listdir(checkpoints.folder) == ["step-00000008"]


def test_a_kill_between_the_renames_of_a_repeated_step_loses_nothing(
    checkpoints: CheckpointFolder,
) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    before = _bytes(checkpoints.folder)
    (checkpoints.folder / "step-00000001").rename(checkpoints.folder / ".former-step-00000001")
    (checkpoints.folder / ".writing-00000001").mkdir()
    checkpoints.remove_leftovers()
    assert _bytes(checkpoints.folder) == before
    assert checkpoints.steps() == [1]


def test_a_crash_in_the_middle_of_deleting_leaves_no_half_checkpoint(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoints.save(step, Snapshot(_model().state_dict(), TRAINING))

    def crash(folder: Path, **_: Any) -> None:
        (folder / "model.safetensors").unlink()
        raise _CrashError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(_CrashError):
            checkpoints.prune(1)
    assert checkpoints.steps() == [2]
    checkpoints.remove_leftovers()
    assert os.listdir(checkpoints.folder) == ["step-00000002"]


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
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
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
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    damage(checkpoints.path(1) / "training.pt")
    with pytest.raises(
        UserError, match=r"training\.pt is .*delete the folder .*step-00000001"
    ) as e:
        checkpoints.load_training(1)
    assert "\n" not in str(e.value)


def test_weights_of_another_shape_are_refused_and_nothing_is_touched(
    checkpoints: CheckpointFolder,
) -> None:
    checkpoints.save(1, Snapshot(_model(0, width=3).state_dict(), TRAINING))
    model = _model(1, width=4)
    before = _weights(model)
    with pytest.raises(
        UserError, match=r"has 0\.weight of shape \(2, 3\), the model's is \(2, 4\)"
    ):
        checkpoints.load_weights(1, model)
    assert _equal(_weights(model), before)


def test_foreign_and_missing_tensors_are_named(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
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
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    file = checkpoints.path(1) / "training.pt"
    torch.save({"optimizer": _Malice(victim)}, file)
    with pytest.raises(UserError, match=r"training\.pt"):
        checkpoints.load_training(1)
    file.write_bytes(pickle.dumps(_Malice(victim), protocol=2))
    with pytest.raises(UserError, match=r"training\.pt"):
        checkpoints.load_training(1)
    assert not victim.exists()


def test_a_training_state_must_be_one(checkpoints: CheckpointFolder) -> None:
    checkpoints.save(1, Snapshot(_model(0).state_dict(), TRAINING))
    torch.save([1, 2], checkpoints.path(1) / "training.pt")
    with pytest.raises(UserError, match="holds no training state"):
        checkpoints.load_training(1)


def _parts(model: nn.Module, num_parts: int) -> list[Snapshot]:
    """What processes write of a model whose rows they share, the last with fewer or none."""
    rows = {name: tensor.chunk(num_parts) for name, tensor in model.state_dict().items()}
    empty = {name: tensor[:0] for name, tensor in model.state_dict().items()}
    return [
        Snapshot(
            {n: r[place] if place < len(r) else empty[n] for n, r in rows.items()},
            {**TRAINING, "alone": True} if place == 0 else None,
            {"0.exp_avg": torch.full((2, 2), float(place))},
            Part(place + 1, num_parts),
        )
        for place in range(num_parts)
    ]


def _save_together(checkpoints: CheckpointFolder, parts: list[Snapshot]) -> list[BaseException]:
    """As processes would that see one folder; what went wrong in them."""
    failures: list[BaseException] = []

    def save(part: Snapshot) -> None:
        try:
            checkpoints.save(1, part)
        except OSError as error:
            failures.append(error)

    checkpoints.begin(1)
    threads = [threading.Thread(target=save, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return failures


@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_of_several_processes_are_one_checkpoint(
    checkpoints: CheckpointFolder, num_parts: int
) -> None:
    assert _save_together(checkpoints, _parts(_model(0), num_parts)) == []
    assert os.listdir(checkpoints.folder) == ["step-00000001"]
    assert len(_bytes(checkpoints.path(1))) == 2 * num_parts + 1
    model = _model(1)
    checkpoints.load_weights(1, model)
    assert _equal(_weights(model), _weights(_model(0)))
    shards = checkpoints.optimizer_shards(1)
    assert shards is not None
    assert shards.shapes == {"0.exp_avg": (2 * num_parts, 2)}
    assert shards.read("0.exp_avg")[:, 0].tolist() == [n for n in range(num_parts) for _ in "ab"]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_cannot_write_there_is_no_checkpoint(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The others notice, and leave nothing behind."""
    checkpoints.save(0, Snapshot(_model(0).state_dict(), TRAINING))
    before = _bytes(checkpoints.folder)
    parts, write = _parts(_model(1), 2), CheckpointFolder._write  # pyright: ignore[reportPrivateUsage]

    def full(folder: CheckpointFolder, where: Path, snapshot: Snapshot) -> None:
        if snapshot is parts[failing]:
            raise OSError("No space left on device")
        write(folder, where, snapshot)

    monkeypatch.setattr(CheckpointFolder, "_write", full)
    failures = [str(failure) for failure in _save_together(checkpoints, parts)]
    assert set(failures) <= {"No space left on device", "another process could not write its part"}
    assert "No space left on device" in failures
    assert len(failures) == 2 or not failing
    assert _bytes(checkpoints.folder) == before
    assert checkpoints.steps() == [0]


def test_a_process_that_does_not_come_is_not_waited_for_for_ever(
    checkpoints: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equilibria.train.checkpoint._SECONDS_FOR_PARTS", 0.1)
    (failure,) = _save_together(checkpoints, _parts(_model(0), 2)[:1])
    assert "model-00002-of-00002.safetensors did not come within" in str(failure)
    assert os.listdir(checkpoints.folder) == []


PART_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda file: file.unlink(), "is not complete: .*00002-of-00002.* is missing"),
    "of another number": (
        lambda file: file.rename(file.with_name("model-00002-of-00003.safetensors")),
        "is not complete: .*00002-of-00002.* is missing",
    ),
    "no number": (
        lambda file: shutil.copy(file, file.with_name("model-x-of-y.safetensors")),
        "is not complete: model-x-of-y.safetensors is none of its parts",
    ),
    "one too many": (
        lambda file: shutil.copy(file, file.with_name("model-00003-of-00002.safetensors")),
        "is not complete: model-00003-of-00002.safetensors is none of its parts",
    ),
    "cut": (lambda file: os.truncate(file, file.stat().st_size // 2), "truncated or damaged"),
    "of another model": (
        lambda file: save_file({"stranger": torch.ones(2)}, file),
        "do not belong together: 'stranger'",
    ),
    "of other rows": (
        lambda file: save_file({"0.weight": torch.ones(1, 9)}, file),
        "do not belong together: '0.weight' has shape",
    ),
    "a number": (
        lambda file: save_file({"0.weight": torch.ones(())}, file),
        "do not belong together: '0.weight' has shape",
    ),
    "no rows of some": (
        lambda file: save_file({"0.weight": torch.ones(1, 3)}, file),
        r"'[01]\.(weight|bias)' of shape|has [01]\.(weight|bias) of shape",
    ),
}


@pytest.mark.parametrize("name", PART_DAMAGE)
def test_a_damaged_part_is_a_sentence(checkpoints: CheckpointFolder, name: str) -> None:
    _save_together(checkpoints, _parts(_model(0), 2))
    damage, message = PART_DAMAGE[name]
    damage(checkpoints.path(1) / "model-00002-of-00002.safetensors")
    model = _model(1)
    before = _weights(model)
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load_weights(1, model)
    assert "\n" not in str(error.value)
    assert _equal(_weights(model), before)


def test_a_tensor_in_some_parts_only_is_refused(checkpoints: CheckpointFolder) -> None:
    _save_together(checkpoints, _parts(_model(0), 3))
    file = checkpoints.path(1) / "model-00003-of-00003.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "0.weight"}, file)
    with pytest.raises(UserError, match="'0.weight' is in 2 of 3"):
        checkpoints.load_weights(1, _model(1))
