"""What a run ran on."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from equilibria import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "tyro", "cattrs", "tensorboard")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Versions and hardware, ready for JSON; no host names, user names or paths."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {
            "equilibria": __version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
    }


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
