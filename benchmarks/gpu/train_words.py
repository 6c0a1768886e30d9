"""Train language models on a GPU a piece at a time, from one borrowed machine to the next.

    python -m benchmarks.gpu.train_words RECIPE --data FOLDER --runs FOLDER [--minutes 25] [options]

Starts the recipe, or goes on with the newest run of it in --runs, and stops it with a checkpoint
after so many minutes; the folder of runs is what has to come back from the machine and go to the
next. Other options go to `equilibria train` when the run begins. A run that has come to its end is
gathered by `python -m benchmarks.language_models RUN`. Not part of the queue, which measures; the
recipes waiting for a GPU are `ptb-trellisnet` (24M parameters, towards 57.1) and `wikitext2-small`
with more steps and wider layers.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def newest(runs: Path, recipe: str) -> Path | None:
    """The run to go on with; None where there is none with a checkpoint."""
    found = [path.parent.parent for path in runs.glob(f"{recipe}-2*/checkpoints/step-*")]
    return max(found, default=None)


def command(recipe: str, data: Path, runs: Path, options: Sequence[str]) -> list[str]:
    """What to run."""
    train = [sys.executable, "-m", "equilibria", "train"]
    run = newest(runs, recipe)
    if run is not None:
        return [*train, "--resume", str(run)]
    return [*train, recipe, "--data", str(data), "--train.folder", str(runs), *options]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for a while; 0 at the end of the run, 143 with a checkpoint before it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True, help="folder of the text's files")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=25.0, help="when to stop")
    given, options = parser.parse_known_args(arguments)
    process = subprocess.Popen(command(given.recipe, given.data, given.runs, options))
    try:
        return process.wait(60.0 * given.minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
