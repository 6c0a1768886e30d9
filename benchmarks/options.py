"""What a benchmark is told on the command line, and where its results go.

    python -m benchmarks.NAME [--device cpu|cuda] [--tiny] [--output FOLDER] [CASE ...]

--tiny is a dry run of seconds: every part at a size that says nothing. A full run is saved to
`results/`, on a GPU to `results/gpu/NAME OF THE GPU/`; a tiny run, or one of named cases only, is
printed and saved nowhere unless --output names a folder. One CPU thread, so that what is compared
is work and not the scheduling of cores; on a GPU that thread only launches.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, timing


@dataclass(frozen=True)
class Options:
    """How a benchmark is to be run."""

    device: torch.device
    tiny: bool
    names: tuple[str, ...]
    """The cases wanted; all unless told otherwise."""
    complete: bool
    """Whether these are all there are."""
    output: Path | None

    @property
    def folder(self) -> Path | None:
        """Where results go, if anywhere."""
        if self.output is not None:
            return self.output
        return None if self.tiny or not self.complete else results_of(self.device)

    def interleave(
        self,
        cases: Mapping[str, Callable[[], object]],
        *,
        rounds: int = 9,
        seconds: float = 0.05,
        warm: bool = False,
    ) -> dict[str, list[float]]:
        """`timing.interleave`, in a dry run with as few calls as give a spread."""
        if self.tiny:
            rounds, seconds = 2, 0.0
        return timing.interleave(cases, rounds=rounds, seconds=seconds, warm=warm)

    def save(self, name: str, **content: Any) -> None:
        """Write NAME.json, if this run is one to keep."""
        if self.folder is None:
            print(f"{name}: not saved (a dry run, or named cases only); --output FOLDER saves it")
            return
        record.save(name, self.folder, device=str(self.device), tiny=self.tiny, **content)


def parse(
    about: str | None, arguments: Sequence[str] | None = None, names: Sequence[str] = ()
) -> Options:
    """Read the command line of a benchmark and prepare PyTorch.

    Args:
        about: its docstring.
        arguments: instead of those of the process.
        names: of its cases, where some can be left out.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a dry run of seconds")
    parser.add_argument("--output", type=Path, help="folder for the result")
    if names:
        parser.add_argument("names", nargs="*", metavar="CASE", help=f"of {', '.join(names)}")
    given = parser.parse_args(arguments)
    wanted = tuple(getattr(given, "names", ()))
    if unknown := set(wanted) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and PyTorch finds none")
    torch.set_num_threads(1)
    # Convolutions round to 10 bits by default there, which is coarser than the tolerances here.
    torch.backends.cudnn.allow_tf32 = False
    return Options(
        device=torch.device(given.device),
        tiny=given.tiny,
        names=wanted or tuple(names),
        complete=not wanted,
        output=given.output,
    )


def results_of(device: torch.device) -> Path:
    """The folder of results of a device."""
    if device.type != "cuda":
        return record.RESULTS
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return record.RESULTS / "gpu" / name.strip("-")
