"""Tensors in safetensors files: one file, or one of every process that holds a part of them.

model.safetensors                        all of it
model-00001-of-00002.safetensors         what the first of two processes holds
model-00002-of-00002.safetensors         the rows that the second one holds
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.train.files import flush_file, open_regular, reason

_KINDS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Of numbers; others may be more than torch can read, which would be found out half-way."""


class Part(NamedTuple):
    """Which file of how many a process writes; the first of one is all of it."""

    number: int = 1
    of: int = 1

    def file_name(self, stem: str) -> str:
        """Name of the file of this part."""
        numbers = "" if self.of == 1 else f"-{self.number:05d}-of-{self.of:05d}"
        return f"{stem}{numbers}.safetensors"

    def all(self) -> Iterable[Part]:
        """This part and the others."""
        return (Part(number, self.of) for number in range(1, self.of + 1))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file, which has its name when it is complete and flushed to disk.

    Raises:
        OSError: it cannot be written.
    """
    beside = file.with_name(f".{file.name}")
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(written, beside)
    except SafetensorError as error:  # also for what the system refuses
        raise OSError(f"{beside}: {error}") from error
    beside.chmod(0o644)  # safetensors thinks of secrets
    flush_file(beside)
    beside.rename(file)


class TensorFiles:
    """The tensors of a file or of all parts of it, read one at a time.

    A tensor that the first part alone has is whole; of one in every part each has some rows, in the
    order of the parts.

    Args:
        folder: where the files are.
        stem: "model" for the files above.
        advice: what a user can do when they are damaged.

    Raises:
        UserError: files are missing, truncated or damaged, or are no parts of one thing.
    """

    def __init__(self, folder: Path, stem: str, advice: str) -> None:
        self._advice = advice
        self.path = folder / f"{stem}.safetensors"
        """The file, or what its parts are named after."""
        self._files = [_open(file, advice) for file in _found(folder, stem, advice)]
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole tensors, by name."""
        self._num_parts: dict[str, int] = {}
        try:
            for place, file in enumerate(self._files):
                for name in file.keys():  # noqa: SIM118
                    rows = file.get_slice(name)
                    if rows.get_dtype() not in _KINDS:
                        raise SafetensorError(f"{name} is of the unknown kind {rows.get_dtype()}")
                    self._add(place, name, tuple(rows.get_shape()))
        except SafetensorError as error:
            raise UserError(f"{self.path} is damaged ({error}); {advice}") from error
        cut = [name for name, parts in self._num_parts.items() if 1 < parts < len(self._files)]
        if cut:
            raise UserError(
                f"the parts of {self.path} do not belong together: {cut[0]!r} is in "
                f"{self._num_parts[cut[0]]} of {len(self._files)}; {advice}"
            )

    def _add(self, place: int, name: str, shape: tuple[int, ...]) -> None:
        known = self.shapes.get(name)
        if known is None and place == 0:
            self.shapes[name], self._num_parts[name] = shape, 1
            return
        if known is None or self._num_parts[name] != place or not shape or known[1:] != shape[1:]:
            raise UserError(
                f"the parts of {self.path} do not belong together: {name!r} has shape {shape} in "
                f"part {place + 1} and {known or 'none'} before; {self._advice}"
            )
        self.shapes[name] = (known[0] + shape[0], *shape[1:])
        self._num_parts[name] += 1

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            UserError: it cannot be read.
        """
        try:
            parts = [file.get_tensor(name) for file in self._files[: self._num_parts[name]]]
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.path} is damaged ({error}); {self._advice}") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_tensors(folder: Path, stem: str) -> bool:
    """Whether there is such a file, or any part of one."""
    return (folder / f"{stem}.safetensors").exists() or any(folder.glob(f"{stem}-*-of-*"))


def _found(folder: Path, stem: str, advice: str) -> list[Path]:
    """The file, or all of its parts in their order."""
    whole, parts = folder / f"{stem}.safetensors", sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if whole.exists() or not parts:
        return [whole]
    pattern = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})\.safetensors")
    match = pattern.fullmatch(parts[0].name)
    expected = [] if match is None else [p.file_name(stem) for p in Part(1, int(match[2])).all()]
    present = [part.name for part in parts]
    if present != expected:
        missing = sorted({*expected} - {*present})
        what = f"{missing[0]} is missing" if missing else f"{present[-1]} is none of its parts"
        raise UserError(f"{whole} is not complete: {what}; {advice}")
    return parts


def _open(file: Path, advice: str) -> Any:
    try:
        open_regular(file).close()
        return safe_open(file, "pt")
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; {advice}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is truncated or damaged ({reason(error)}); {advice}") from error
