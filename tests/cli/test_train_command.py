"""`equilibria train`, end to end on a small text."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equilibria.data.text import digest, read_text
from equilibria.tasks.language_modeling import LanguageModeling
from equilibria.train.loop import Trainer

CLOCKS = {"forward_seconds", "backward_seconds", "seconds", "tokens_per_second"}


def _metrics(run: Path) -> list[dict[str, Any]]:
    """All records without what depends on the speed of the machine."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


def _weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-00000012" / "model.safetensors").read_bytes()


def _only_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_a_run_folder_is_complete(finished: Any, text_file: Path) -> None:
    run = finished.path
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "environment.json",
        "vocabulary.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints/best.json",
        "checkpoints/step-00000012/model.safetensors",
        "checkpoints/step-00000012/training.pt",
    } <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    pictures = [run / name for name in names if name.endswith(".png")]
    assert len(pictures) >= 3
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert not [name for name in names if "/." in name or name.startswith(".")]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["data"]["digest"] == digest(read_text(text_file))
    assert environment["packages"]["equilibria"]
    assert environment["python"]


def test_the_end_is_told_and_written(finished: Any) -> None:
    out = finished.result.out
    summary = json.loads((finished.path / "summary.json").read_text())
    bits = summary["test_bits_per_character"]
    assert summary["test_loss"] == pytest.approx(bits * math.log(2))
    assert summary["test_perplexity"] == pytest.approx(2**bits)
    assert set(summary["baseline_bits_per_character"]) == {"unigram", "bigram", "five_gram", "xz"}
    for value in (bits, *summary["baseline_bits_per_character"].values()):
        assert f"{value:.3f}" in out
    assert summary["num_test_characters"] == 41
    assert set(summary["training_solves"]) == {"num_evals", "relative_residual"}
    assert set(summary["test_solves"]["num_evals"]) == {"mean", "p95"}
    clock = summary["training_time"]
    parts = ("forward_seconds", "backward_seconds", "rest_seconds")
    assert clock["total_seconds"] == pytest.approx(sum(clock[part] for part in parts))
    assert summary["peak_memory_mib"] > 10
    assert len(summary["sample"]["text"]) == 300
    assert summary["sample"]["text"] in out
    for words in ("function evaluations", "relative residual", "peak memory", "forward solves"):
        assert words in out
    assert f"run folder: {finished.path}" in out


def test_progress_is_told_in_plain_lines(finished: Any) -> None:
    err = finished.result.err
    assert "step 5/12  loss" in err
    assert "step 8: validation loss" in err
    for figure in ("ppl", "NFE", "residual", "tok/s", "left"):
        assert figure in err


def test_the_trace_of_both_solves_is_recorded(finished: Any) -> None:
    (trace,) = [record for record in _metrics(finished.path) if record["kind"] == "trace"]
    assert len(trace["forward"]) == len(trace["backward"]) == 2  # the streams of evaluation
    assert all(len(sample) <= 9 for sample in trace["forward"])
    assert trace["forward"][0][0] == 1.0  # from zero, the residual is the image


@pytest.mark.parametrize("source", ["config.json", "."])
def test_a_saved_configuration_gives_the_same_run(
    finished: Any, cli: Any, tmp_path: Path, source: str
) -> None:
    result = cli("train", finished.path / source, "--train.folder", tmp_path / "runs")
    assert result.code == 0, result.err
    again = _only_run(tmp_path / "runs")
    assert _metrics(again) == _metrics(finished.path)
    assert _weights(again) == _weights(finished.path)


def test_a_saved_configuration_can_be_changed(finished: Any, cli: Any, tmp_path: Path) -> None:
    result = cli(
        "train",
        finished.path / "config.json",
        "--train.folder",
        tmp_path / "runs",
        "--train.num-steps",
        2,
        "--seed",
        5,
    )
    assert result.code == 0, result.err
    old, new = (
        json.loads((run / "config.json").read_text())["config"]
        for run in (finished.path, _only_run(tmp_path / "runs"))
    )
    assert (new["seed"], new["train"]["num_steps"]) == (5, 2)
    assert new["model"] == old["model"]
    assert new["data"] == old["data"]


def test_every_kind_of_option_can_be_set(cli: Any, tiny: list[str], tmp_path: Path) -> None:
    """Hyphens and underscores, nested plug-ins, switches, choices, None."""
    result = cli(
        "train",
        "pydoc_characters",
        *tiny,
        *("--train.num_steps", 1, "--train.folder", tmp_path / "runs"),
        *("--model.solve.solver", "broyden(history-size=7)"),
        *("--model.solve.adjoint", "implicit(solver=anderson(history_size=3), rtol=1e-2)"),
        *("--model.solve.eval-solver", "picard"),
        *("--model.solve.eval-max-steps", "None"),
        "--model.no-weight-norm",
        *("--optimizer.schedule", "inverse-sqrt"),
        *("--optimizer.learning_rate", "1e-4"),
        *("--task.eval_memory_length", 30),
    )
    assert result.code == 0, result.err
    config = json.loads((_only_run(tmp_path / "runs") / "config.json").read_text())["config"]
    solve = config["model"]["solve"]
    assert solve["solver"].startswith("broyden(history_size=7, ")
    assert solve["adjoint"].startswith("implicit(solver=anderson(history_size=3, ")
    assert solve["eval_solver"].startswith("picard(")
    assert solve["eval_max_steps"] is None
    assert config["model"]["weight_norm"] is False
    assert config["optimizer"]["schedule"] == "inverse-sqrt"
    assert config["optimizer"]["learning_rate"] == 1e-4
    assert config["task"]["eval_memory_length"] == 30


def test_help_lists_every_option(cli: Any) -> None:
    result = cli("train", "--help")
    assert result.code == 0
    for section in ("data", "model", "model.solve", "task", "optimizer", "train"):
        assert f"{section} options" in result.text
    for flag in ("--data.path", "--model.solve.adjoint", "--task.memory-length", "--seed"):
        assert flag in result.text


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    training_losses = LanguageModeling.training_losses

    def interrupted(task: LanguageModeling, at: int, num_chunks: int = 1) -> Any:
        if at == step:
            how()
        return training_losses(task, at, num_chunks)

    monkeypatch.setattr(LanguageModeling, "training_losses", interrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_says_how_to_go_on_and_going_on_changes_nothing(
    finished: Any,
    cli: Any,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 6, lambda: os.kill(os.getpid(), number))
        stopped = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    run = _only_run(tmp_path / "runs")
    assert stopped.code == code
    assert "stopped after step 7 and saved" in stopped.err
    assert f"equilibria train --resume {run}" in stopped.err
    assert not (run / "summary.json").exists()
    resumed = cli("train", "--resume", run)
    assert resumed.code == 0, resumed.err
    assert "going on after step 7" in resumed.err
    assert "test split" in resumed.out
    assert _metrics(run) == _metrics(finished.path)
    assert _weights(run) == _weights(finished.path)


def test_a_second_ctrl_c_still_says_how_to_go_on(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    _interrupt_at(monkeypatch, 10, twice)
    stopped = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    run = _only_run(tmp_path / "runs")
    assert stopped.code == 130
    assert f"equilibria train --resume {run}" in stopped.err
    assert "Traceback" not in stopped.err


def test_ctrl_c_before_the_first_checkpoint_promises_nothing(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    _interrupt_at(monkeypatch, 1, interrupt)
    stopped = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    assert stopped.code == 130
    assert "--resume" not in stopped.err


def test_numbers_that_are_not_finite_end_with_code_1(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_losses = LanguageModeling.training_losses

    def poisoned(task: LanguageModeling, step: int, num_chunks: int = 1) -> Any:
        for result in training_losses(task, step, num_chunks):
            yield result._replace(loss=result.loss * math.nan) if step >= 9 else result

    monkeypatch.setattr(LanguageModeling, "training_losses", poisoned)
    options = ["--train.folder", tmp_path / "runs", "--train.max-nonfinite-steps", "2"]
    result = cli("train", *tiny, *options)
    assert result.code == 1
    assert "the loss of step 10 is not finite" in result.err
    assert "error: the loss of step 11 is not finite" in result.err
    run = _only_run(tmp_path / "runs")
    assert max(p.name for p in (run / "checkpoints").glob("step-*")) == "step-00000008"


def test_resuming_a_finished_run_tells_its_end_again(run: Path, cli: Any, finished: Any) -> None:
    config = (run / "config.json").read_bytes()
    result = cli("train", "--resume", run)
    assert result.code == 0, result.err
    assert _metrics(run) == _metrics(finished.path)
    assert (run / "config.json").read_bytes() == config
    old, new = (
        json.loads((folder / "summary.json").read_text()) for folder in (finished.path, run)
    )
    assert old.pop("sample")["text"].startswith(new.pop("sample")["text"])  # see `make_brief`
    del old["peak_memory_mib"], new["peak_memory_mib"]
    assert new == old


def test_resume_may_be_written_with_an_equals_sign(run: Path, cli: Any) -> None:
    assert cli("train", f"--resume={run}").code == 0


def test_finishing_can_be_interrupted_and_resumed(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done; only the report is missing."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("equilibria.cli.train.finish", interrupt)
        stopped = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    run = _only_run(tmp_path / "runs")
    assert stopped.code == 130
    assert f"equilibria train --resume {run}" in stopped.err
    assert cli("train", "--resume", run).code == 0
    assert (run / "summary.json").exists()


def _wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read stderr up to a line with `words`; give up when the process ends."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"the process ended without {words!r}:\n{seen}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_stopped_by_a_signal_can_be_resumed(
    cli: Any,
    start_process: Any,
    long_flags: list[str],
    long_run: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    """A real process, a real signal: the resumed run equals one that nobody stopped."""
    process = start_process(["train", *long_flags], tmp_path)
    seen = _wait_for(process, "step 5/100")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, seen + out + err
    assert "equilibria train --resume runs/" in err
    assert "Traceback" not in err
    run = _only_run(tmp_path / "runs")
    stopped_at = int(err.partition("stopped after step ")[2].split()[0])
    assert 5 <= stopped_at < 100
    assert cli("train", "--resume", run).code == 0
    assert _metrics(run) == _metrics(long_run)
    last = "checkpoints/step-00000100/model.safetensors"
    assert (run / last).read_bytes() == (long_run / last).read_bytes()


def test_the_trainer_leaves_no_handler_behind(cli: Any, tiny: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert cli("train", *tiny, "--train.num-steps", 1, "--train.folder", tmp_path).code == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert Trainer.fit.__doc__


def test_metrics_go_to_trackers_too(
    tiny: list[str], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    runs = tmp_path / "runs"
    done = cli("train", *tiny, "--train.folder", runs, "--train.trackers", "wandb")
    assert done.code == 0, done.err
    (run,) = runs.iterdir()
    assert cli("train", "--resume", run).code == 0
    identity = json.loads((run / "trackers.json").read_text())["wandb"]
    files = list(run.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    content = b"".join(file.read_bytes() for file in files)
    assert b"valid/loss" in content
    assert b"summary/test_loss" in content


def test_an_unknown_tracker_is_refused_before_anything_is_made(
    tiny: list[str], tmp_path: Path, cli: Any
) -> None:
    runs = tmp_path / "runs"
    done = cli("train", *tiny, "--train.folder", runs, "--train.trackers", "wanb")
    assert done.code == 2
    assert "there is no tracker 'wanb'; did you mean 'wandb'?" in done.err
    assert not runs.exists()


def test_an_attempt_that_died_before_its_first_checkpoint_is_not_recorded(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts it again in the same folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    options = [*tiny, "--train.log-every", 1, "--train.num-steps", 6, "--train.folder", tmp_path]
    assert cli("train", *options).code == 0
    (run,) = tmp_path.iterdir()
    wanted = _metrics(run)
    shutil.rmtree(run / "checkpoints")
    assert cli("train", *options).code == 0
    assert _metrics(run) == wanted


def test_the_number_of_tasks_of_a_slurm_job_makes_no_task(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch script knows it, too, and may train twice."""
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    for seed in (0, 1):
        options = ["--train.num-steps", 1, "--seed", seed, "--train.folder", tmp_path]
        assert cli("train", *tiny, *options).code == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_does_not_hide_the_recipe_of_its_name(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a shared model of it."""
    (tmp_path / "pydoc-characters").mkdir()
    monkeypatch.chdir(tmp_path)
    result = cli("train", "pydoc-characters", "--data.path", "nowhere.txt")
    assert "there is no file" in result.err


def test_pretraining_is_announced(cli: Any, tiny: list[str], tmp_path: Path) -> None:
    options = ["--train.folder", tmp_path / "a"]
    err = cli("train", *tiny, *options).err
    assert "pre-training by a few unrolled layers until step 4" in err
    assert "step 4: pre-training ends, equilibria begin" in err
    assert "none is at equilibrium" not in err
    short = cli("train", *tiny, "--train.num-steps", 3, "--train.folder", tmp_path / "b").err
    assert "all 3 steps are pre-training, and none is at equilibrium" in short


def test_solves_that_miss_their_tolerance_are_told(cli: Any, finished: Any) -> None:
    few = cli("eval", finished.path, "--max-steps", 2, "--rtol", 1e-9)
    solves = r"(\d+) of \1 solves ended short of their tolerance"
    assert re.search(solves, few.out), few.out
    assert "short of their tolerance" not in cli("eval", finished.path, "--rtol", 0.9).out
    assert "short of their tolerance" in finished.result.out
