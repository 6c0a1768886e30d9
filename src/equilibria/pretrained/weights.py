"""Weights in a safetensors file, whose header is checked before anything is read or made of it.

The format: eight bytes with the size of the header, the header in JSON (of every tensor its type,
shape and place), the numbers.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.train.files import open_regular
from equilibria.train.fit import names_apart

_MAX_HEADER = 2**22
"""Bytes, for tens of thousands of tensors; ours have about a hundred."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What parameters can be, by their names in the file."""


@dataclass(frozen=True)
class Form:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"

    @property
    def num_bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def forms_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Form]:
    """What the file of a model has to hold; the model may be on the meta device."""
    return {name: Form(dtype, tuple(t.shape)) for name, t in model.state_dict().items()}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The one type of all parameters.

    Raises:
        UserError: there are several, or one that is not shared.
    """
    dtypes = {tensor.dtype for tensor in model.state_dict().values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES.values()):
        raise UserError(
            f"the parameters are of {', '.join(sorted(map(str, dtypes)))}; a shared model is of "
            "one floating-point type, so bring it there by model.to(torch.float32)"
        )
    return dtypes.pop()


def write_weights(file: Path, model: nn.Module) -> None:
    """Write all parameters, for whoever may read the folder.

    Raises:
        OSError: they cannot be written.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    file.unlink(missing_ok=True)  # which may be a link to somewhere else
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # also for what the system refuses
        file.unlink(missing_ok=True)
        raise OSError(errno.EIO, str(error)) from error
    file.chmod(0o644)  # safetensors thinks of secrets


def read_header(file: Path) -> dict[str, Form]:
    """Types and shapes of all tensors; no more than the header is read.

    Raises:
        UserError: the file is missing or damaged, or not as large as its header says.
    """
    size, length, raw = _raw_header(file)
    try:
        header: object = json.loads(raw, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its header is not JSON with every name once") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header names no tensors")
    entries = cast(dict[str, Any], header)
    entries.pop("__metadata__", None)
    forms = {name: _form(file, name, entry) for name, entry in entries.items()}
    wanted = 8 + length + sum(form.num_bytes for form in forms.values())
    if size != wanted:
        raise _damaged(file, f"it has {size:,} bytes, and {wanted:,} by its header")
    return forms


def check_forms(file: Path, given: Mapping[str, Form], expected: Mapping[str, Form]) -> None:
    """Compare a file with the model of its configuration.

    Raises:
        UserError: another name, type or shape.
    """
    if apart := names_apart(given, expected):
        raise UserError(
            f"{file} does not belong to its config.json: {apart}; get the folder again from where "
            "it was shared"
        )
    for name, form in expected.items():
        if given[name] != form:
            raise UserError(
                f"{file} has {name} as {given[name]}, by its config.json it is {form}; get the "
                "folder again from where it was shared"
            )


def load_weights(file: Path, model: nn.Module) -> None:
    """Copy the numbers of a file whose header has been checked."""
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    model.load_state_dict(weights)


def _raw_header(file: Path) -> tuple[int, int, bytes]:
    """Bytes of the file and of the header, and the header itself."""
    try:
        with open_regular(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            raw = handle.read(length) if 2 <= length <= min(_MAX_HEADER, size - 8) else None
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); get the folder again, complete"
        ) from error
    if raw is None:
        raise _damaged(file, f"its header is said to have {length:,} bytes")
    return size, length, raw


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries of one name, readers may take either."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _form(file: Path, name: str, entry: object) -> Form:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape)} if dtype in _DTYPES and all(
            type(size) is int and size >= 0 for size in cast(list[object], shape)
        ):
            return Form(_DTYPES[dtype], tuple(cast(list[int], shape)))
        case _:
            raise _damaged(file, f"its entry of {name[:60]!r} is no floating-point tensor")


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"{file} is truncated, damaged or no safetensors file: {what[:300]}; get it again from "
        "where it was shared"
    )
