"""Writing a result with everything needed to get it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "equilibria", "torch", "triton", "numba", "numpy", "scipy", "torchdeq", "jax",
    "jaxopt", "optimistix",
)  # fmt: skip


def save(name: str, folder: Path = RESULTS, /, **content: Any) -> Path:
    """Write NAME.json: the command, the commit, the machine, the versions, and the content."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores{_accelerator()}",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    text = json.dumps({**about, **content}, indent=1)
    path.write_text(text + "\n")
    print(f"wrote {path}")
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read NAME.json."""
    return json.loads((folder / f"{name}.json").read_text())


def _module() -> str:
    """What was given to `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"benchmarks.{Path(sys.argv[0]).stem}" if spec is None else spec.name


def _commit() -> str | None:
    """The commit of this checkout, with a plus if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _processor() -> str:
    """The model name that Linux gives, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerator() -> str:
    """The name of the CUDA device, if there is one."""
    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def _version(package: str) -> str | None:
    if package == "equilibria":
        import equilibria

        return equilibria.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
