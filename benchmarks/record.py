"""Writing a result with everything needed to get it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("equilibria", "torch", "numpy", "scipy", "torchdeq", "jax", "jaxopt", "optimistix")


def save(name: str, **content: Any) -> Path:
    """Write results/NAME.json: the command, the machine, the versions, and the content."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    about = {
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
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


def load(name: str) -> dict[str, Any]:
    """Read results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


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
