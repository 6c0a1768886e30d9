"""Does a run of many hours stay as it began, in memory and in files?

    python -m benchmarks.long_run [--tiny] [deq-transformer] [deq-trellisnet]

Trains small models for as many steps as the recipes of full size make in eight hours, by the
command that users have, with evaluations, checkpoints in the background, and two stops (SIGTERM)
with a resume after each. The text is made up. Every five seconds the resident size of the process
and the files of the run folder are taken.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.corpus_memory import write

NUM_STEPS = 40_000
"""Eight hours at 0.72 seconds a step, as ptb-small and wikitext2-small take."""
SMALL = ["--task.batch-size", "4", "--task.segment-length", "32", "--task.memory-length", "32"]
MODELS = {
    "deq-transformer": [
        "ptb-small", *SMALL, "--model.d-model", "32", "--model.d-inner", "64",
        "--task.pretrain-steps", "0",
    ],
    "deq-trellisnet": [
        "ptb-trellisnet-small", *SMALL, "--model.d-embed", "24", "--model.d-hidden", "24",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    step: int
    mib: float
    num_files: int
    folder_mib: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, sample, save."""
    given = options.parse(__doc__, arguments, list(MODELS))
    num_steps, seconds = (300, 0.05) if given.tiny else (NUM_STEPS, 5.0)
    rows: dict[str, Any] = {}
    for name in given.names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write(folder / "train.txt", 100_000, 2_000)
            for split in ("valid", "test"):
                (folder / f"{split}.txt").write_text("w0 w1 w2 w3\n" * 200)
            begin = time.monotonic()
            chunks = follow(name, folder, num_steps, seconds)
            rows[name] = {
                "steps": num_steps,
                "hours": (time.monotonic() - begin) / 3600,
                "chunks": [summary(samples) for samples in chunks],
                "most_files": max(s.num_files for samples in chunks for s in samples),
                "folder_mib": chunks[-1][-1].folder_mib,
            }
            print(name, json.dumps(rows[name]))
    given.save("long_run", models=rows)


def follow(name: str, folder: Path, num_steps: int, seconds: float) -> list[list[Sample]]:
    """Train in three goes, the first two stopped after a third of the steps; samples of each.

    Raises:
        RuntimeError: one of them ended otherwise than it should.
    """
    runs = folder / "runs"
    train = {"num-steps": num_steps, "eval-every": num_steps // 40, "log-every": 20}
    train |= {"checkpoint-every": max(num_steps // 200, 1), "keep-best": 2}
    command = [*MODELS[name], "--data", folder, "--data.name", "None", "--train.folder", runs]
    command += [word for key, value in train.items() for word in (f"--train.{key}", value)]
    command += ["--train.save-in-background", "--data.cache", folder / "cache"]
    stops = (num_steps / 3, num_steps * 2 / 3, math.inf)
    chunks: list[list[Sample]] = []
    for number in (1, 2, 3):
        with (folder / "output.txt").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "equilibria", "train", *map(str, command)],
                stdout=output,
                stderr=output,
            )
            samples = list(watch(process, runs, seconds, stops[number - 1]))
        expected = 0 if number == 3 else 128 + signal.SIGTERM
        if process.returncode != expected:
            raise RuntimeError((folder / "output.txt").read_text()[-2000:])
        chunks.append(samples)
        command = ["--resume", next(runs.iterdir())]
    return chunks


def watch(process: subprocess.Popen[bytes], runs: Path, seconds: float, stop_after: float) -> Any:
    """Samples until the process ends, which is asked to after some steps."""
    asked = False
    while process.poll() is None:
        time.sleep(seconds)
        if sample := look(process.pid, runs):
            yield sample
            if sample.step >= stop_after and not asked:
                process.terminate()
                asked = True


def look(pid: int, runs: Path) -> Sample | None:
    """What there is to be seen now; None before the first record and after the end."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        (run,) = runs.iterdir()
        records = (run / "metrics.jsonl").read_text().splitlines()
        files = [path for path in run.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 2**20
        steps = [json.loads(line)["step"] for line in records if line.endswith("}")]
    except (OSError, StopIteration, ValueError):  # ended, not begun, or a file just renamed
        return None
    return Sample(steps[-1], int(resident.split()[1]) / 1024, len(files), size) if steps else None


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Medians of the second tenth and of the last of a go: imports and first allocations left out.

    The very last samples are of the end of a run, which draws pictures and writes a text.
    """
    training = samples[: -max(len(samples) // 50, 1)]
    tenth = max(len(training) // 10, 1)
    return {
        "from_step": samples[0].step,
        "to_step": samples[-1].step,
        "samples": len(samples),
        "mib_at_first": statistics.median(s.mib for s in training[tenth : 2 * tenth]),
        "mib_at_last": statistics.median(s.mib for s in training[-tenth:]),
        "most_mib": max(s.mib for s in training),
    }


if __name__ == "__main__":
    main()
