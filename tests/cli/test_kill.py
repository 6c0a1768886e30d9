"""kill -9 at random moments: every resume succeeds, and nobody can tell afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equilibria.train.checkpoint import CheckpointFolder

NUM_KILLS = int(os.environ.get("EQUILIBRIA_KILLS", "6"))
"""The figure of docs/training.md is of 50."""
NUM_STEPS = 40 * NUM_KILLS
OFTEN = [
    "--train.checkpoint-every", "1", "--train.log-every", "1", "--train.eval-every", "7",
    "--train.keep-checkpoints", "2", "--train.num-steps", str(NUM_STEPS),
]  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{NUM_STEPS:08d}" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_kills_leave_the_run_as_if_nothing_had_happened(
    cli: Any, tiny: list[str], tmp_path: Path, start_process: Any, background: bool
) -> None:
    """A checkpoint at every step, so that most kills hit one that is being written."""
    background_option = (
        "--train.save-in-background" if background else "--train.no-save-in-background"
    )
    options = [*tiny, *OFTEN, background_option]
    assert cli("train", *options, "--train.folder", tmp_path / "straight").code == 0
    (straight,) = (tmp_path / "straight").iterdir()
    moments = random.Random(5)
    arguments: list[object] = ["train", *options, "--train.folder", tmp_path / "runs"]
    kills = 0
    while kills < NUM_KILLS:
        process = start_process(arguments, tmp_path)
        runs = list((tmp_path / "runs").glob("*"))
        before = newest(runs[0]) if runs else 0
        while (newest(runs[0]) if runs else 0) <= before and process.poll() is None:
            time.sleep(0.005)
            runs = list((tmp_path / "runs").glob("*"))
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
        arguments = ["train", "--resume", runs[0]]
    last = cli("train", "--resume", *(tmp_path / "runs").iterdir())
    assert last.code == 0, last.err
    assert kills == NUM_KILLS
    (run,) = (tmp_path / "runs").iterdir()
    found, expected = weights(run), weights(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(names(run)) == sorted(names(straight))
    best, wanted = (CheckpointFolder(path / "checkpoints") for path in (run, straight))
    assert (best.best(), best.best_loss()) == (wanted.best(), wanted.best_loss())


def newest(run: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def names(run: Path) -> list[str]:
    """All files of a run but the events, of which every process writes its own."""
    files = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return [str(name) for name in files if name.parts[0] != "tensorboard"]
