"""`equilibria train` with several processes on this machine: launched, killed, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import equilibria

START = [
    "--devices", "2", "--train.device", "cpu", "--train.checkpoint-every", "2",
    "--train.eval-every", "50", "--train.log-every", "1",
]  # fmt: skip


def children(pid: int) -> list[int]:
    """Processes below another, in the order of their making."""
    out = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = {int(a): int(b) for a, b in (line.split() for line in out.splitlines())}

    def below(one: int) -> bool:
        while one in parents:
            one = parents[one]
            if one == pid:
                return True
        return False

    return sorted(one for one in parents if below(one))


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that train."""
    return [one for one in children(process.pid) if "spawn_main" in _command(one)]


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def steps(runs: Path) -> list[int]:
    """Training steps that were recorded so far."""
    records = [
        json.loads(line)
        for file in runs.glob("*/metrics.jsonl")
        for line in file.read_text().splitlines()
        if line.endswith("}")
    ]
    return [record["step"] for record in records if record["kind"] == "train"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll for up to two minutes."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.fixture
def launched(tiny: list[str], tmp_path: Path, start_process: Any) -> Any:
    """Start a training of two processes; (process, folder of runs)."""
    started: list[subprocess.Popen[str]] = []

    def start(num_steps: int, *options: str) -> tuple[subprocess.Popen[str], Path]:
        runs = tmp_path / "runs"
        arguments = ["train", *tiny, *START, "--train.num-steps", num_steps, *options]
        process = start_process([*arguments, "--train.folder", runs], tmp_path)
        started.append(process)
        return process, runs

    yield start
    for process in started:
        for one in [*children(process.pid), process.pid]:
            with contextlib.suppress(OSError):
                os.kill(one, signal.SIGKILL)
        if not process.stdout or not process.stdout.closed:
            process.communicate()


def test_two_processes_from_one_command_and_on_with_one(
    launched: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process, runs = launched(4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    left = [one.name for one in scratch.iterdir()]
    assert not [name for name in left if "launch" in name or "elastic" in name]
    assert "2 processes (ddp)" in err
    assert len(re.findall("test split", out)) == 1
    assert steps(runs) == [1, 2, 3, 4]
    (run,) = runs.iterdir()
    assert cli("eval", run).code == 0
    again = cli("train", "--resume", run, "--devices", 1)
    assert again.code == 0, again.err
    assert "going on after step 4" in again.err


@pytest.mark.slow
def test_torchrun_starts_a_training_and_says_what_it_said(tiny: list[str], tmp_path: Path) -> None:
    """Every process ends by itself, all that it printed included; with shards on disk, too."""
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job"]
    options = ["--strategy", "fsdp", "--train.num-steps", "4", "--train.folder", str(runs)]
    done = subprocess.run(
        [*command, "-m", "equilibria", "train", *map(str, tiny), *START, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("test split", done.stdout)) == 1
    (run,) = runs.iterdir()
    assert run.name.endswith("-job")
    assert steps(runs) == [1, 2, 3, 4]


@pytest.mark.slow
def test_processes_that_slurm_starts(tiny: list[str], tmp_path: Path) -> None:
    """By the variables that srun sets; the same job and step, queued again, goes on."""
    runs = tmp_path / "runs"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_JOB_NAME": "deq", "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    options = ["--train.num-steps", "4", "--train.folder", str(runs)]
    for attempt in ("first", "again"):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "equilibria", "train", *map(str, tiny), *START, *options],
                env={**os.environ, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        said = [process.communicate(timeout=240) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said
        assert [out.count("test split") for out, _ in said] == [1, 0]
        assert ("going on after step 4" in said[0][1]) == (attempt == "again")
    (run,) = runs.iterdir()
    assert run.name.endswith("-4711.2")
    assert steps(runs) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_that_dies_is_started_again(launched: Any, strategy: str) -> None:
    process, runs = launched(300, "--strategy", strategy)
    wait_for(lambda: max(steps(runs), default=0) >= 10, process)
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "going on after step" in err
    assert steps(runs) == list(range(1, 301))
    assert len(list(runs.iterdir())) == 1


SHORT_OF_MEMORY = """
import os
import equilibria.train.statistics as statistics

original = statistics.StepRecord.of

def of(loss):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return original(loss)

statistics.StepRecord.of = of
"""
FULL_DISK = """
import os
import equilibria.train.trackers as trackers

class Trackers(trackers.Trackers):
    def log(self, record):
        if os.environ.get("RANK") == "0":
            raise OSError(28, os.strerror(28))

trackers.Trackers = Trackers
"""


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize(
    ("patch", "code", "said"),
    [
        (SHORT_OF_MEMORY, 1, "error: memory ran out in step 1.*raise --train.batch-chunks"),
        (FULL_DISK, 2, "error: No space left on device; make room"),
    ],
    ids=["no memory", "full disk"],
)
def test_what_ends_one_process_ends_all_and_is_said_once(
    tiny: list[str], tmp_path: Path, patch: str, code: int, said: str, restarts: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(patch)
    path = f"{tmp_path}{os.pathsep}{Path(equilibria.__file__).parents[1]}"
    options = [*START, "--train.restarts", str(restarts)]
    done = subprocess.run(
        [sys.executable, "-m", "equilibria", "train", *map(str, tiny), *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert len(re.findall(said, done.stderr)) == 1, done.stderr
    assert len(re.findall("run folder", done.stderr)) == 1
    assert "it did after" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_and_ends(
    launched: Any, cli: Any, number: signal.Signals, code: int
) -> None:
    process, runs = launched(100_000)
    wait_for(lambda: max(steps(runs), default=0) >= 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "equilibria train --resume" in err
    (run,) = runs.iterdir()
    saved = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert saved == steps(runs)[-1]


@pytest.mark.slow
def test_two_trainings_do_not_share_a_folder(launched: Any, cli: Any) -> None:
    process, runs = launched(100_000)
    wait_for(lambda: max(steps(runs), default=0) >= 3, process)
    (run,) = runs.iterdir()
    before = steps(runs)
    second = cli("train", "--resume", run, "--devices", 1)
    assert second.code == 2
    assert "another process is training in" in second.err
    assert steps(runs)[: len(before)] == before
