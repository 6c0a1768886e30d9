"""`equilibria eval`: the score of a run, and what changes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest


def _figures(out: str) -> dict[str, float]:
    patterns = {
        "tokens": r"(\d+) tokens",
        "loss": r"loss (\S+) nats",
        "perplexity": r"perplexity ([\d.]+)",
        "bits": r"([\d.]+) bits per token",
        "evals": r"function evaluations mean (\S+),",
        "residual": r"relative residual mean (\S+),",
        "step": r"checkpoint of step (\d+)",
    }
    found = {name: re.search(pattern, out) for name, pattern in patterns.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def _eval(cli: Any, finished: Any, *options: object) -> dict[str, float]:
    result = cli("eval", finished.path, *options)
    assert result.code == 0, result.err
    figures = _figures(result.out)
    assert len(figures) == 7, result.out
    return figures


def test_the_score_is_that_of_the_end_of_training(cli: Any, finished: Any) -> None:
    summary = json.loads((finished.path / "summary.json").read_text())
    figures = _eval(cli, finished)
    assert figures["loss"] == pytest.approx(summary["test_loss"], abs=1e-4)
    assert figures["perplexity"] == pytest.approx(summary["test_perplexity"], rel=1e-3)
    assert figures["tokens"] == summary["num_test_characters"]
    assert figures["step"] == summary["best_step"]
    assert _eval(cli, finished) == figures


def test_more_steps_bring_smaller_residuals(cli: Any, finished: Any) -> None:
    few = _eval(cli, finished, "--max-steps", 2, "--rtol", 1e-9)
    many = _eval(cli, finished, "--max_steps", 60, "--rtol", 1e-9)
    assert few["evals"] == 3.0
    assert many["evals"] > 20
    assert many["residual"] < few["residual"]
    loose = _eval(cli, finished, "--max-steps", 60, "--rtol", 0.5)
    assert loose["evals"] < many["evals"]


def test_solver_memory_and_streams(cli: Any, finished: Any) -> None:
    plain = _eval(cli, finished)
    # all figures, because any one of them may agree in the digits shown
    assert _eval(cli, finished, "--solver", "picard", "--max-steps", 60) != _eval(
        cli, finished, "--max-steps", 60
    )
    assert _eval(cli, finished, "--solver", "broyden(history-size=3)")["evals"] == 9.0
    assert _eval(cli, finished, "--streams", 1)["loss"] != plain["loss"]
    without = _eval(cli, finished, "--mem-len", 0, "--max-steps", 60)
    longer = _eval(cli, finished, "--mem-len", 500, "--max-steps", 60)
    assert without["loss"] != longer["loss"]
    assert _eval(cli, finished, "--memory-length", 500, "--max-steps", 60) == longer
    assert _eval(cli, finished, "--mem_len", 500, "--max-steps", 60) == longer


def test_split_and_checkpoint(cli: Any, finished: Any) -> None:
    assert _eval(cli, finished, "--split", "valid")["loss"] != _eval(cli, finished)["loss"]
    steps = sorted(int(p.name[5:]) for p in (finished.path / "checkpoints").glob("step-*"))
    for step in steps:
        assert _eval(cli, finished, "--checkpoint", step)["step"] == step
    assert _eval(cli, finished, "--checkpoint", "last")["step"] == steps[-1]
    best = json.loads((finished.path / "checkpoints" / "best.json").read_text())["best"][0]["step"]
    assert _eval(cli, finished, "--checkpoint", "best")["step"] == best


def test_evaluation_leaves_the_run_as_it_is(cli: Any, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli("eval", run, "--max-steps", 3).code == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_help(cli: Any) -> None:
    result = cli("eval", "--help")
    assert result.code == 0
    for flag in ("--max-steps", "--mem-len", "--solver", "--rtol", "--streams", "--checkpoint"):
        assert flag in result.text


def test_the_spectral_radius_is_estimated_if_asked_for(cli: Any, finished: Any) -> None:
    result = cli("eval", finished.path, "--spectral-radius")
    assert result.code == 0, result.err
    mean, largest = re.search(r"spectral radius mean (\S+), largest (\S+)", result.out).groups()
    assert 0.0 < float(mean) <= float(largest) < 10.0
