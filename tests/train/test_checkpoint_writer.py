"""When checkpoints are written: full disks, the background, and which are kept."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equilibria.train.checkpoint import CheckpointFolder, Snapshot
from equilibria.train.checkpoint_writer import CheckpointWriter
from equilibria.train.experiment import TrainConfig
from equilibria.train.loop import Trainer, TrainingError

TrainerFactory = Callable[..., Trainer]


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let checkpoints of some steps fail as they do on a full disk."""
    save = CheckpointFolder.save

    def full(folder: CheckpointFolder, step: int, *rest: Any) -> None:
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, step, *rest)

    monkeypatch.setattr(CheckpointFolder, "save", full)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    make_trainer: TrainerFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    background: bool,
) -> None:
    fill_the_disk(monkeypatch, {6})
    trainer = make_trainer(
        {"train": {"checkpoint_every": 3, "eval_every": 50, "save_in_background": background}}
    )
    assert trainer.fit() == 0
    err = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written" in err
    assert "No space left on device" in err
    assert "that of step 3 is intact; training goes on" in err
    assert trainer.run.checkpoints.latest() == 12


@pytest.mark.parametrize("background", [False, True])
def test_without_its_last_checkpoint_a_run_has_failed(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    fill_the_disk(monkeypatch, {12})
    trainer = make_trainer({"train": {"save_in_background": background}})
    with pytest.raises(TrainingError, match="step 12 could not be written.*intact"):
        trainer.fit()
    resumed = make_trainer(run=trainer.run)
    resumed.resume()
    monkeypatch.undo()
    assert resumed.fit() == 0


def test_in_the_background_training_goes_on_with_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what there was when it was handed over."""
    go, save = threading.Event(), CheckpointFolder.save

    def waiting(*arguments: Any) -> None:
        go.wait(10)
        save(*arguments)

    monkeypatch.setattr(CheckpointFolder, "save", waiting)
    checkpoints = CheckpointFolder(tmp_path)
    weights, training = {"w": torch.ones(3)}, {"m": [torch.ones(2)], "step": 1}
    with CheckpointWriter(checkpoints, TrainConfig(save_in_background=True)) as writer:
        assert writer.save(1, Snapshot(weights, training), 2.0) is None
        weights["w"].zero_()
        training["m"][0].zero_()
        assert checkpoints.steps() == []
        go.set()
        assert writer.wait() is None
    assert load_file(checkpoints.path(1) / "model.safetensors")["w"].tolist() == [1.0] * 3
    assert checkpoints.load_training(1)["m"][0].tolist() == [1.0] * 2
    assert checkpoints.best_loss() == 2.0


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    writer = CheckpointWriter(checkpoints, TrainConfig(keep_best=2, keep_checkpoints=1))
    losses = [5.0, 1.0, 4.0, 2.0, None, 3.0]
    for step, loss in enumerate(losses):
        writer.save(step, Snapshot({"w": torch.ones(1)}, {}), loss)
    assert checkpoints.steps() == [1, 3, 5]
    assert checkpoints.best() == 1
    assert [checkpoints.best_loss(rank) for rank in (1, 2, 3)] == [1.0, 2.0, float("inf")]
    assert writer.loss_to_beat == 2.0


def test_a_mark_of_the_first_kind_is_read(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(4, Snapshot({"w": torch.ones(1)}, {}))
    (tmp_path / "best.json").write_text('{"step": 4, "loss": 1.5}')
    assert (checkpoints.best(), checkpoints.best_loss()) == (4, 1.5)
