"""The folder that holds everything about one run."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equilibria.core.errors import UserError, nearest
from equilibria.diagnostics.record_lines import lines_of
from equilibria.train.checkpoint import CheckpointFolder
from equilibria.train.config_file import to_json
from equilibria.train.experiment import Experiment
from equilibria.train.files import read_json, remove_temporaries, write_json, write_text


@dataclass(frozen=True)
class RunFolder:
    """Files of a run.

    config.json      recipe and every option; `equilibria train RUN/config.json` runs it again
    environment.json versions, hardware, digest of the data
    vocabulary.json  symbols of the token ids
    metrics.jsonl    one record per line
    summary.json     final figures
    solves.json      histograms of evaluations and residuals; equilibrium models only
    checkpoints/     weights and training state
    tensorboard/     the same metrics as events
    plots/           PNG pictures
    conversion.txt   what was mapped; of runs that 'equilibria convert' has made
    """

    path: Path

    @staticmethod
    def create(parent: Path, recipe: str) -> RunFolder:
        """Make a new folder named by recipe and time; an existing one is never touched."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            path = parent / (f"{recipe}-{stamp}" + (f"-{attempt}" if attempt else ""))
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(
                    f"the run folder {path} cannot be made ({error.strerror}); choose another "
                    "place with --train.folder"
                ) from error
            return RunFolder(path)
        raise UserError(f"{parent} is full of runs of this second; try again")

    @staticmethod
    def create_named(path: Path) -> RunFolder:
        """Make a folder of this very name, which an attempt before may have made already.

        Raises:
            UserError: it cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be made ({error.strerror}); choose another place "
                "with --train.folder"
            ) from error
        return RunFolder(path)

    @contextmanager
    def lock(self) -> Generator[None]:
        """Keep other processes from training in this folder; ends with this process at the latest.

        Raises:
            UserError: one does already.
        """
        with self.config_file.open("rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is training in {self.path}; wait until it has ended, or stop "
                    "it first"
                ) from error
            except OSError:
                pass  # some network file systems have no locks
            yield

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
            UserError: nothing is there, or it is no run folder.
        """
        if not path.is_dir():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"{path} is no folder{nearest(path.name, siblings)}; give a run folder")
        run = RunFolder(path)
        if not run.config_file.exists():
            raise UserError(f"{path} is no run folder: it has no config.json")
        return run

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def vocabulary_file(self) -> Path:
        return self.path / "vocabulary.json"

    @property
    def conversion_file(self) -> Path:
        """What 'equilibria convert' has mapped, in the runs that it makes."""
        return self.path / "conversion.txt"

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    def check_places(self) -> None:
        """Find out early whether a run can write where its files and folders belong.

        Raises:
            UserError: something else is there.
        """
        for name in (self.metrics_file.name, "summary.json", "solves.json"):
            place = self.path / name
            if place.exists() and not place.is_file():
                raise UserError(f"{place} is no file, and the run writes one there; move it away")
        for name in ("checkpoints", "tensorboard", "plots"):
            place = self.path / name
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is no folder, and the run needs one there; move it away")

    def remove_leftovers(self) -> None:
        """Delete what a killed process was about to write; for whoever holds the lock."""
        names = ("config.json", "environment.json", "vocabulary.json", "summary.json")
        for name in (*names, self.metrics_file.name):
            remove_temporaries(self.path / name)
        self.checkpoints.remove_leftovers()

    def remove_if_empty(self) -> None:
        """Delete a folder that nothing could be written to."""
        with suppress(OSError):
            self.path.rmdir()

    def write_config(self, recipe: str, experiment: Experiment) -> None:
        """Record the recipe's name and the resolved configuration."""
        write_json(self.config_file, {"recipe": recipe, "config": to_json(experiment)})

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file of the run."""
        write_json(self.path / name, value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run."""
        return read_json(self.path / name, "the run folder is incomplete")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics and hand it to the system at once.

        Raises:
            OSError: it cannot be written; no half of it is left.
        """
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self.metrics_file.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(raw := line.encode("utf-8")) < len(raw):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Records so far; a line that a crash cut short is skipped."""
        for _, record in self._metrics_lines():
            yield record

    def rewind_metrics(self, step: int) -> None:
        """Drop records after `step`, so that resuming does not write a step twice.

        The trace, which a run writes at its end, goes too: that end will come again.
        """
        if not self.metrics_file.exists():
            return
        kept = [
            line
            for line, record in self._metrics_lines()
            if record["step"] <= step and record.get("kind") != "trace"
        ]
        write_text(self.metrics_file, "".join(kept))

    def _metrics_lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every complete record with its line as it was written.

        Raises:
            UserError: they cannot be read.
        """
        if not self.metrics_file.exists():
            return
        try:
            for line in lines_of(self.metrics_file):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield line, record
        except OSError as error:
            raise UserError(
                f"{self.metrics_file} cannot be read ({error.strerror}); move it away, and the run "
                "goes on without its records so far"
            ) from error
