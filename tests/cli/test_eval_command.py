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


@pytest.fixture(scope="module")
def shared(cli: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share") / "shared"
    assert cli("share", finished.path, "--folder", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def test_split(text_file: Path, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test split of the finished run as a file of its own."""
    num_test = json.loads((finished.path / "environment.json").read_text())["data"]["num_test"]
    file = tmp_path_factory.mktemp("other") / "other.txt"
    file.write_text(text_file.read_text()[-num_test:])
    return file


def _after_first_line(text: str) -> str:
    """Without the seconds, too."""
    return "".join(line for line in text.splitlines(keepends=True)[1:] if "tokens/s" not in line)


def test_a_text_of_its_own_is_scored_as_the_split_would_be(
    cli: Any, finished: Any, shared: Path, test_split: Path
) -> None:
    split = cli("eval", finished.path)
    options = ["--text", test_split]
    of_run = cli("eval", finished.path, *options)
    assert of_run.code == 0, of_run.err
    assert of_run.out.startswith(f"{test_split}, checkpoint of step ")
    assert _after_first_line(of_run.out) == _after_first_line(split.out)
    of_shared = cli("eval", shared, *options, "--streams", 2)
    assert of_shared.code == 0, of_shared.err
    assert of_shared.out.startswith(f"{test_split}, {shared}, ")
    assert _after_first_line(of_shared.out) == _after_first_line(split.out)


def test_options_hold_for_a_shared_model(cli: Any, shared: Path, test_split: Path) -> None:
    options = ["--text", test_split, "--max-steps", 3, "--rtol", 1e-9, "--spectral-radius"]
    result = cli("eval", shared, *options, "--mem-len", 5, "--solver", "picard")
    assert result.code == 0, result.err
    assert "function evaluations mean 4.0" in result.out
    assert "spectral radius mean" in result.out


def test_a_text_needs_no_data_of_the_run(
    cli: Any, run: Path, test_split: Path, tmp_path: Path
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["path"] = str(tmp_path / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    assert "there is no file" in cli("eval", run).err
    assert cli("eval", run, "--text", test_split).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("", "is empty"),
        ("a", "at least 2 tokens"),
        ("the cow, 42 times", "the text uses ',', '4', '2', which the vocabulary"),
    ],
)
def test_a_bad_text_is_a_sentence(
    cli: Any, shared: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "other.txt"
    if text is not None:
        file.write_text(text)
    result = cli("eval", shared, "--text", file)
    assert result.code == 2
    assert message in result.err


def test_what_does_not_go_together(cli: Any, finished: Any, shared: Path, test_split: Path) -> None:
    assert "has no data of its own; give --text FILE" in cli("eval", shared).err
    both = cli("eval", finished.path, "--text", test_split, "--split", "valid")
    assert "--split valid is of the text of the run; leave it out" in both.err
    last = cli("eval", shared, "--text", test_split, "--checkpoint", "last")
    assert "holds one checkpoint only; leave out --checkpoint" in last.err


def test_unknown_words_of_a_text_are_told(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "words"
    folder.mkdir()
    line = " ".join(["the cow sees a <unk> cow"] * 3) + "\n"
    for split in ("train", "valid", "test"):
        (folder / f"ptb.{split}.txt").write_text(line * 8)
    trained = cli(
        "train", "ptb-small", "--data", folder, "--data.name", "None", "--train.num-steps", 2,
        "--task.batch-size", 2, "--task.segment-length", 8, "--train.folder", tmp_path / "runs",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    (run,) = (tmp_path / "runs").iterdir()
    split, same = cli("eval", run), cli("eval", run, "--text", folder / "ptb.test.txt")
    assert _after_first_line(split.out) == _after_first_line(same.out)
    assert "read as" not in same.out
    (tmp_path / "other.txt").write_text("the cow sees a horse\nand a\n")
    other = cli("eval", run, "--text", tmp_path / "other.txt")
    assert "2 of 9 tokens are words that the vocabulary does not have, read as <unk>" in other.out
