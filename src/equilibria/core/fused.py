"""Whether a compiled step exists for a solve; nothing is imported before it does."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from equilibria.core.errors import UserError

Backend = Literal["numba", "triton"]
_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.bfloat16),
}


def carries_derivatives() -> bool:
    """Whether operations may be recorded, or carry tangents: compiled steps do neither."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


class Shared:
    """For tuples of tensors that compiled steps look into: NumPy's view of them is made once."""

    @property
    def arrays(self: Iterable[Tensor]) -> tuple[Any, ...]:
        """The tensors as arrays over the same memory; CPU only."""
        kept: tuple[Any, ...] | None = self.__dict__.get("arrays_")
        if kept is None:
            kept = self.__dict__["arrays_"] = tuple(map(as_array, self))
        return kept


def as_array(tensor: Tensor) -> Any:
    """The numbers of a CPU tensor as an array over the same memory, copied if not in order."""
    return tensor.detach().resolve_neg().contiguous().numpy()


def kernels(name: str, like: Tensor, fused: bool | None) -> ModuleType | None:
    """The compiled steps called `name` for states like this one; None: the plain operations.

    There are none while gradients are recorded, inside transforms and dispatch modes, for tensors
    of other kinds and in compiled code: the plain operations are what these understand.

    Args:
        name: what the file in `equilibria.kernels` begins with.
        like: a packed state (B, D), or a history of such, in what precision it is kept.
        fused: None takes what has been measured to be faster, which is Numba on the CPU, where it
            is installed. True insists, on a GPU on Triton. False never.

    Raises:
        UserError: True, and the package or the precision is missing.
    """
    if fused is False or carries_derivatives() or not _is_plain_eager(like):
        return None
    chosen = _backend(like.device.type, like.dtype, fused)
    return None if chosen is None else _module(name, chosen)


def bookkeeping(like: Tensor, fused: bool | None) -> ModuleType | None:
    """The loop's own arithmetic, compiled; on the CPU, where its small operations take longest."""
    return kernels("bookkeeping", like, fused) if like.device.type == "cpu" else None


def _backend(device: str, dtype: torch.dtype, fused: bool | None) -> Backend | None:
    if dtype not in _DTYPES.get(device, ()):
        if fused:
            raise UserError(
                f"fused=True has no steps for {dtype} on {device}; give fused=None, which takes "
                "the plain operations there"
            )
        return None
    package: Backend = "numba" if device == "cpu" else "triton"
    if fused is None and package == "triton":
        return None
    if _is_installed(package):
        return package
    if fused:
        raise UserError(
            f"fused=True needs the package {package} on {device}, and it cannot be imported: pip "
            f"install {package}, or give fused=None or False"
        )
    return None


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether it can be imported; one that does not fit the NumPy beside it cannot."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def _module(name: str, backend: Backend) -> ModuleType:
    return importlib.import_module(f"equilibria.kernels.{name}_{backend}")


def _is_plain_eager(like: Tensor) -> bool:
    return type(like) is Tensor and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
        or torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    )
