"""The command line on a task that is no text: train, resume, score; no text to continue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "data.num-blanks": 6,
    "data.num-symbols": 2,
    "data.num-valid": 4,
    "data.num-test": 6,
    "model.d-model": 8,
    "task.batch-size": 2,
    "optimizer.warmup-steps": 1,
    "train.num-steps": 4,
    "train.log-every": 2,
    "train.eval-every": 2,
    "train.checkpoint-every": 2,
    "train.device": "cpu",
}
DEQ = {
    "model.num-heads": 2,
    "model.d-inner": 12,
    "model.solve.max-steps": 4,
    "model.solve.eval-max-steps": 5,
    "task.pretrain-steps": 2,
}
EXPLICIT = {"model.num-blocks": 2}


def _flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _train(cli: Any, folder: Path, recipe: str, **options: Any) -> tuple[Any, Path]:
    own = EXPLICIT if recipe.endswith("tcn") else DEQ
    result = cli("train", recipe, *_flags({**TINY, **own, **options}), "--train.folder", folder)
    assert result.code == 0, result.text
    (path,) = folder.iterdir()
    return result, path


@pytest.mark.parametrize("recipe", ["copy-memory-small", "copy-memory-tcn"])
def test_train_and_eval(cli: Any, tmp_path: Path, recipe: str) -> None:
    result, path = _train(cli, tmp_path, recipe)
    summary = json.loads((path / "summary.json").read_text())
    assert {"test_loss", "test_recall", "test_exact_recall"} <= summary.keys()
    assert summary["baseline_losses"] == {"memoryless": pytest.approx(0.4159, abs=1e-4)}
    assert summary["num_test_items"] == 6 * 10
    assert not (path / "vocabulary.json").exists()
    for word in ("recall", "tok/s", "this run", "memoryless", "exact recall"):
        assert word in result.text
    assert "ppl" not in result.text
    scored = cli("eval", path)
    assert scored.code == 0
    assert f"loss {summary['test_loss']:.4f} nats, recall" in scored.text
    solves = recipe == "copy-memory-small"
    for text in (result.text, scored.text):
        assert ("function evaluations" in text) is solves
    assert (summary["test_solves"] is not None) is solves


def test_a_resumed_run_is_the_same_run(cli: Any, tmp_path: Path) -> None:
    """From the middle: into the equilibrium phase, with the next batch and not the first."""
    _, path = _train(cli, tmp_path, "copy-memory-small")
    reference = json.loads((path / "summary.json").read_text())
    shutil.rmtree(path / "checkpoints" / "step-00000004")
    (path / "checkpoints" / "best.json").unlink()
    result = cli("train", "--resume", path)
    assert result.code == 0
    assert "going on after step 2" in result.text
    again = json.loads((path / "summary.json").read_text())
    for name in ("test_loss", "test_recall", "training_solves"):
        assert again[name] == reference[name]


def test_steps_that_are_not_finite_end_in_a_diagnosis(cli: Any, tmp_path: Path) -> None:
    """Also where all steps of a line of metrics are skipped, which then knows no recall."""
    options = {"optimizer.learning-rate": 1e25, "optimizer.warmup-steps": 0, "train.log-every": 1}
    flags = _flags({**TINY, **DEQ, **options, "train.num-steps": 30, "task.pretrain-steps": 30})
    result = cli("train", "copy-memory-small", *flags, "--train.folder", tmp_path)
    assert result.code == 1, result.text
    assert "is not finite" in result.err
    assert "as were 9 steps before it; begin again from" in result.err


def test_there_is_no_text_to_continue(cli: Any, tmp_path: Path) -> None:
    _, path = _train(cli, tmp_path, "copy-memory-tcn")
    result = cli("generate", path)
    assert result.code == 2
    assert "the run is CopyMemory on copy-memory; only a language model of a text" in result.text


@pytest.mark.parametrize("option", [["--mem-len", 4], ["--streams", 1]])
def test_options_of_texts_are_refused(cli: Any, tmp_path: Path, option: list[Any]) -> None:
    _, path = _train(cli, tmp_path, "copy-memory-tcn")
    result = cli("eval", path, *option)
    assert result.code == 2
    assert "the run is no language model; leave out --mem-len and --streams" in result.text


def test_an_explicit_model_is_not_pretrained(cli: Any, tmp_path: Path) -> None:
    flags = _flags({**TINY, **EXPLICIT, "task.pretrain-steps": 1})
    result = cli("train", "copy-memory-tcn", *flags, "--train.folder", tmp_path / "runs")
    assert result.code == 2
    assert "pretrain_steps=1, but TCNConfig is an explicit model" in result.text
    assert not (tmp_path / "runs").exists()
