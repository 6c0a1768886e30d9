"""How the CPU kernels are compiled: once per machine, kept on disk, and in the threads of PyTorch.

Sums may be reordered, which is what lets them use the vector units, and products contracted with
sums; NaN and infinity keep their meaning, because solvers act on them.

What is kept on disk goes by the time stamp of the function's own file. So compiled functions call
only those of their file: a change elsewhere would not reach them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numba
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


class Pair(Protocol):
    """A point with its image, as tensors (B, D) and as arrays over the same memory."""

    @property
    def z(self) -> Tensor:
        """The point."""
        ...

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Both."""
        ...


BLOCK = 2048
"""Floats of a state that are worked on at a time: four such blocks fit into the fastest cache."""

SMALL = 1 << 16
"""Floats of a state below which threads cost more than they save."""

_FAST = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Function) -> Function:
    """Compile for one thread, at the first call."""
    return _jit(function, fastmath=_FAST)


def compiled_parallel(function: Function) -> Function:
    """Compile with its `prange` loops shared among threads, at the first call."""
    return _jit(function, fastmath=_FAST, parallel=True)


def compiled_exactly(function: Function) -> Function:
    """Compile without any freedom in the arithmetic: bit for bit what PyTorch computes."""
    return _jit(function)


def threads_for(size: int) -> int:
    """How many threads work on so many floats: those of PyTorch, one if they are few.

    Sets them for the compiled functions of this thread.
    """
    wanted = 1 if size < SMALL else torch.get_num_threads()
    if wanted == 1:
        return 1
    config: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]
    number = min(wanted, config.NUMBA_NUM_THREADS)
    numba.set_num_threads(number)
    return number


def array(tensor: Tensor) -> Array:
    """The numbers of a tensor in order, over the same memory."""
    return tensor.detach().numpy()


def _jit(function: Function, **options: Any) -> Function:
    common: dict[str, Any] = {"error_model": "numpy", "nogil": True, **options}
    try:
        return numba.njit(cache=True, **common)(function)  # pyright: ignore[reportReturnType]
    except RuntimeError:  # no folder to keep compiled code in
        return numba.njit(**common)(function)  # pyright: ignore[reportReturnType]
