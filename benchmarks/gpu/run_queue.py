"""Run what is still to be measured on this GPU.

    python -m benchmarks.gpu.run_queue [--only NAME ...] [--again] [--list]
    python -m benchmarks.gpu.run_queue --tiny --device cpu     # a dry run of everything

Each entry is a process of its own with a time limit; a failure does not stop the others. What has a
result for this GPU already is skipped, so that an interrupted queue can be started again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.options import results_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Entry:
    """A benchmark, or the tests that need a GPU."""

    name: str
    """Of the result, and of the module."""
    minutes: float
    """Expected; the limit is three times that."""
    about: str
    folder: str = "benchmarks"

    @property
    def is_test(self) -> bool:
        """Whether pytest runs it, whose verdict is saved here."""
        return self.folder == "tests"

    def command(self, device: str, *, tiny: bool) -> list[str]:
        """What to run."""
        if self.is_test:
            extra = ["--collect-only"] if tiny else []
            return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *extra]
        extra = ["--tiny"] if tiny else []
        return [sys.executable, "-m", f"{self.folder}.{self.name}", "--device", device, *extra]


GPU = "benchmarks.gpu"
QUEUE = (
    Entry("gpu_tests", 5, "`make test-gpu`: correctness before speed", "tests"),
    Entry("kernels", 4, "fused Triton steps against plain ones, bandwidth reached", GPU),
    Entry("overhead", 4, "overhead of a solver step"),
    Entry("training_step", 8, "training step at equal tolerance and at equal residual"),
    Entry("wt103_block", 8, "WikiText-103-size block in bfloat16 and float32, solver over f", GPU),
    Entry("wt103_training", 6, "whole WikiText-103 models: tokens per second, memory", GPU),
    Entry("tiny_and_mdeq", 12, "tanh cell and MDEQ block over the batch, cells compiled", GPU),
    Entry("mixed_difficulty", 2, "batches whose samples converge at different steps"),
    Entry(
        "cuda_graphs",
        5,
        "solves of fixed steps, compiled and captured; blocks replayed to a tolerance",
        GPU,
    ),
    Entry("bf16_history", 2, "history in bfloat16: time and memory", GPU),
    Entry("memory", 3, "peak memory over steps and history"),
    Entry("scaling", 6, "cost over batch, length, width and steps"),
)


def run(entry: Entry, device: str, folder: Path, *, tiny: bool) -> str:
    """Run one entry; what became of it."""
    command = entry.command(device, tiny=tiny)
    print(f"--- {entry.name}: {' '.join(command[1:])}", flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=180 * entry.minutes)
    except subprocess.TimeoutExpired:
        return f"stopped after {3 * entry.minutes:g} minutes"
    if entry.is_test and not tiny:
        if done.returncode == 0:
            record.save(entry.name, folder, device=device, passed=True)
        return "passed" if done.returncode == 0 else f"failed (exit status {done.returncode})"
    return "done" if done.returncode == 0 else f"failed (exit status {done.returncode})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the queue and print what became of it."""
    names = [entry.name for entry in QUEUE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run: nothing is saved")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this is for a CUDA device; --tiny --device cpu makes a dry run")
    if given.device == "cpu" and not given.tiny:
        parser.error("on a CPU only the dry run, --tiny; `make bench` measures the CPU")
    folder = results_of(torch.device(given.device))
    outcomes: list[tuple[str, str, float]] = []
    for entry in QUEUE:
        if entry.name not in given.only:
            continue
        exists = (folder / f"{entry.name}.json").exists() and not given.tiny
        start = time.perf_counter()
        if exists and not given.again:
            outcome = "has a result"
        elif given.list:
            outcome = f"to be run, about {entry.minutes:g} minutes"
        else:
            outcome = run(entry, given.device, folder, tiny=given.tiny)
        outcomes.append((entry.name, outcome, time.perf_counter() - start))
    print()
    for name, outcome, seconds in outcomes:
        print(f"{name:20} {seconds / 60:6.1f} min  {outcome}")
    if any(outcome.startswith(("failed", "stopped")) for _, outcome, _ in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
