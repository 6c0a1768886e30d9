"""The command line in this process, and one small finished run to look at."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import equilibria
from equilibria.cli.main import main
from equilibria.tasks.generation import SamplingConfig

SOURCES = str(Path(equilibria.__file__).parents[1])


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both outputs without frames and line breaks, to search for sentences in."""
        return " ".join((self.out + self.err).translate(str.maketrans("", "", "│╭╮╰╯─")).split())


def call(*arguments: object) -> Result:
    """Run `equilibria` in this process; the SystemExit of a flag parser is an exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


def start(arguments: Sequence[object], folder: Path) -> subprocess.Popen[str]:
    """Start `equilibria` as a process of its own, in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "equilibria", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As many threads as here: another number of them adds up in another order.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": SOURCES},
    )


def make_brief(patch: pytest.MonkeyPatch) -> None:
    """No pictures and a short sample at the end of a run: they outlast a tiny training."""
    patch.setattr("equilibria.diagnostics.plots.plot_run", lambda *_, **__: None)
    patch.setattr(
        "equilibria.train.report.SamplingConfig",
        lambda num_tokens, seed: SamplingConfig(num_tokens=10, seed=seed),
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but `finished`, whose scope is wider, end briefly."""
    make_brief(monkeypatch)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Run a command line in this process."""
    return call


@pytest.fixture(scope="session")
def start_process() -> Callable[[Sequence[object], Path], subprocess.Popen[str]]:
    """Start a command line as a process of its own."""
    return start


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 416 characters."""
    file = tmp_path_factory.mktemp("text") / "cow.txt"
    file.write_text("the quick brown dog tumps over a lazy cow. but why?\n" * 8)
    return file


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Flags of a run of twelve steps on `text_file`."""
    flags = {
        "data.path": text_file,
        "data.valid-fraction": 0.1,
        "data.test-fraction": 0.1,
        "model.d-model": 8,
        "model.num-heads": 2,
        "model.d-inner": 12,
        "model.dropout": 0.1,
        "model.solve.max-steps": 5,
        "model.solve.eval-max-steps": 8,
        "task.batch-size": 4,
        "task.segment-length": 16,
        "task.memory-length": 12,
        "task.pretrain-steps": 4,
        "task.pretrain-layers": 2,
        "task.eval-streams": 2,
        "optimizer.warmup-steps": 3,
        "train.num-steps": 12,
        "train.log-every": 5,
        "train.eval-every": 4,
        "train.checkpoint-every": 6,
        "train.device": "cpu",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class FinishedRun:
    """A run folder and what was printed while it came to be."""

    path: Path
    result: Result


@pytest.fixture(scope="session")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run; not to be changed, use `run` for that."""
    folder = tmp_path_factory.mktemp("runs")
    result = call("train", *tiny, "--train.folder", folder)
    if result.code:
        raise RuntimeError(f"training failed:\n{result.out}\n{result.err}")
    (path,) = folder.iterdir()
    return FinishedRun(path, result)


@pytest.fixture(scope="session")
def long_flags(tiny: list[str]) -> list[str]:
    """Flags of a run that lasts long enough to be hit by a signal."""
    return [*tiny, "--train.num-steps", "100", "--train.eval-every", "50", "--model.norm", "pre"]


@pytest.fixture(scope="session")
def long_run(long_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `long_flags` that nothing interrupted."""
    folder = tmp_path_factory.mktemp("long")
    with pytest.MonkeyPatch.context() as patch:
        make_brief(patch)
        if call("train", *long_flags, "--train.folder", folder).code:
            raise RuntimeError("training failed")
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def run(finished: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged at will."""
    return Path(shutil.copytree(finished.path, tmp_path / "run"))
