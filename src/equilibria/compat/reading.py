"""Reading old checkpoints: no code in them is run, and they are believed for what is in them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from equilibria.compat.tensors import OldTensors
from equilibria.core.errors import UserError

_NAMES_PER_TENSOR = 8
"""The most that one tensor has in a checkpoint; the softmax of a TrellisNet has three."""


def read_tensors(path: Path) -> OldTensors:
    """Read a state dict saved by `torch.save`, without running any code in it.

    Raises:
        UserError: missing, damaged, not a mere dictionary of tensors, or tensors that are larger
            than the file.
    """
    loaded = _loaded(path)
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # pyright: ignore[reportUnknownMemberType]
        loaded = cast(object, loaded["state_dict"])
    if not isinstance(loaded, dict):
        raise UserError(f"'{path}' holds no state dict of tensors, but a {type(loaded).__name__}")
    tensors = _by_name(path, cast(dict[object, object], loaded))
    for name, tensor in tensors.items():
        _check_stored(name, tensor)
    size = path.stat().st_size
    total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if total > _NAMES_PER_TENSOR * size:
        raise UserError(
            f"'{path}' has {size:,} bytes, and its tensors would have {total:,}: many are made of "
            "the same bytes; save the model's own state dict"
        )
    return OldTensors(tensors)


def _loaded(path: Path) -> object:
    """Whatever is in the file."""
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; give the checkpoint's file (.pkl or .pth)")
    try:
        _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}'; give a checkpoint (.pkl or .pth)") from None
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from error
    except Exception as error:
        # torch.load raises whatever its zip and unpickling layers raise; what it advises next is
        # to let the file run its code.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = reason.partition(". In PyTorch 2.6")[0]
        raise UserError(
            f"'{path}' cannot be read without running code in it ({reason}). It is damaged, or a "
            "whole pickled model and no state dict: load it with the code that wrote it, in a "
            "place where that may run, and save model.state_dict() with torch.save"
        ) from error


def _check_not_compressed(path: Path) -> None:
    """Archives hold what they say: torch.save compresses nothing, and torch.load would expand it.

    Raises:
        UserError: the files inside are larger than the archive.
        Exception: it is none, although it begins like one.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch.load tells archives from old files
            return
    with zipfile.ZipFile(path) as archive:
        inside = sum(member.file_size for member in archive.infolist())
    size = path.stat().st_size
    if inside > size:
        raise UserError(
            f"'{path}' has {size:,} bytes and would expand to {inside:,}; torch.save does not "
            "compress, so unpack the archive and pack it again without compression"
        )


def _by_name(path: Path, loaded: dict[object, object]) -> dict[str, Tensor]:
    """Tensors without the prefix of a parallel wrapper.

    Raises:
        UserError: there are none, a name that is no text or occurs twice, something else.
    """
    if not loaded:
        raise UserError(f"'{path}' holds an empty dictionary; give a checkpoint with weights in it")
    found: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"'{path}' holds no state dict of tensors by name: its {name!r} is of "
                f"type {type(value).__name__}; give what model.state_dict() returns"
            )
        short = name.removeprefix("module.")
        if short in found:
            raise UserError(
                f"'{path}' has both {short!r} and 'module.{short}', and only one can be meant; "
                "delete the other"
            )
        found[short] = value.detach()
    return found


def _check_stored(name: str, tensor: Tensor) -> None:
    """Raise UserError unless every number of a tensor is in the file."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        kind = "meta, without values" if tensor.is_meta else "sparse, quantised or nested"
        raise UserError(
            f"{name} of shape {_shape(tensor)} is {kind} where an ordinary dense tensor is needed; "
            "save the weights as such"
        )
    needed, stored = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
    if needed > stored:
        raise UserError(
            f"{name} of shape {_shape(tensor)} has {needed:,} bytes and only {stored:,} are stored "
            "for it: it was made by expand; save the weights as ordinary tensors (contiguous())"
        )


def _shape(tensor: Tensor) -> str:
    """Nested tensors have none that could be asked for."""
    return "unknown" if tensor.is_nested else str(tuple(tensor.shape))
