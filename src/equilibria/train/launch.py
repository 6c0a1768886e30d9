"""Starting the processes of a training on one machine, and starting them again when one dies.

By PyTorch's elastic launcher, the one behind torchrun; several machines have it, or Slurm, started
by the user on each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from equilibria.core.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

Entry = Callable[[list[str]], int]
_RUN_NAME, _VERDICT = "EQUILIBRIA_RUN_NAME", "EQUILIBRIA_VERDICT"
_SECONDS_TO_SAVE = 120
"""For a training that was asked to stop, to end its step and save; then it is killed."""


class VerdictError(RuntimeError):
    """Why starting the processes again would not help."""


def is_launched() -> bool:
    """Whether torchrun, Slurm or `launch` has started this process as one of several."""
    return "LOCAL_RANK" in os.environ or _is_slurm_task()


def _is_slurm_task() -> bool:
    """Whether srun has started this process with others; a batch script has just their number."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def is_launched_by_user() -> bool:
    """Whether it was torchrun or Slurm, of which every process is a command of its own."""
    return is_launched() and _RUN_NAME not in os.environ


def leave(code: int) -> NoReturn:
    """End a process that torchrun or Slurm has started, with what it wrote so far.

    Not by the interpreter, whose threads of process groups may abort at its end (seen once in a
    hundred times): the launcher would start a finished training again.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def give_verdict(code: int, reason: str = "") -> None:
    """From one process of a launch, of whose end the others die: how all are to end.

    They are started once more, and end at once with that code.
    """
    if file := os.environ.get(_VERDICT):
        Path(file).write_text(f"{code} {reason}", encoding="utf-8")


def verdict() -> int | None:
    """The exit code that a process of this launch has given for all."""
    file = Path(os.environ.get(_VERDICT, ""))
    return int(file.read_text(encoding="utf-8").partition(" ")[0]) if file.is_file() else None


def run_name(recipe: str) -> str | None:
    """Name of the run folder that all attempts of a launch share; None to name it by the time.

    Under torchrun it is that of --rdzv-id, without which a second attempt finds nothing; under
    Slurm that of the job and its step, which stay the same when the job is queued again.
    """
    if name := os.environ.get(_RUN_NAME):
        return name
    if _is_slurm_task() and "SLURM_JOB_ID" in os.environ:
        return f"{recipe}-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if launch == "none" else f"{recipe}-{launch}"


def join_attempt(device: torch.device) -> None:
    """Meet the processes of this attempt, and none of an earlier one.

    PyTorch's launcher keeps one store for all attempts, and in it the addresses of processes that
    are dead: whoever is early finds those and cannot connect (seen with 2.13, one time in two).
    """
    stored = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not stored or torch.distributed.is_initialized():
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.PrefixStore(f"equilibria/attempt-{attempt}", store),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=num_processes,
    )


def launch(
    entry: Entry, arguments: Sequence[str], recipe: str, devices: int, restarts: int, threads: int
) -> int:
    """Run `entry(arguments)` in so many processes; the exit code that they agreed on.

    A process that dies (by a signal, or an error that is none of ours) takes the others with it,
    and all are started again.

    Raises:
        UserError: they died more often than `restarts`.
        VerdictError: one of them has given its verdict.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    name = f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    os.environ[_RUN_NAME] = name  # what is started inherits it
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        with TemporaryDirectory(prefix="equilibria-launch-", ignore_cleanup_errors=True) as logs:
            file = Path(logs) / "verdict.txt"
            os.environ[_VERDICT] = str(file)
            config = _launch_config(name, devices, restarts, logs)
            try:
                code = max(elastic_launch(config, entry)(list(arguments)).values())
            except ChildFailedError as error:
                if not file.exists():
                    raise _died(error, restarts) from error
                code = int(cast(int, verdict()))
            reason = file.read_text(encoding="utf-8").partition(" ")[2] if file.exists() else ""
    except SignalException as stop:
        # The workers were told, have saved and gone.
        return 128 + int(stop.sigval)
    finally:
        for variable in (_RUN_NAME, _VERDICT):
            os.environ.pop(variable, None)
    if reason:
        raise VerdictError(reason)
    return code


def _died(error: ChildFailedError, restarts: int) -> UserError:
    rank, failure = error.get_first_failure()
    return UserError(
        f"process {rank} died ({_first_line(failure.message)}), and so it did after {restarts} "
        "restarts; what it said is above. The last checkpoint is intact: go on with --resume"
    )


def _first_line(message: Any) -> str:
    """Of what the launcher says of a failure; a dictionary where there was an exception."""
    while isinstance(message, dict):
        message = cast(dict[str, Any], message).get("message", "no reason given")
    return str(message).partition("\n")[0]


def _launch_config(name: str, devices: int, restarts: int, logs: str) -> LaunchConfig:
    """How the processes are started, with a folder for the launcher's files.

    One that it makes by itself stays behind.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    extra: dict[str, Any] = {}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        extra["shutdown_timeout"] = _SECONDS_TO_SAVE
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="spawn",
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        **extra,
    )
