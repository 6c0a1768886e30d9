"""Tensors of an old checkpoint, which are taken one by one until none is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest


@dataclass
class OldTensors:
    """Names and tensors, and what has become of each.

    Args:
        tensors: by their names, without the prefix of a parallel wrapper.
        mapped: for every tensor taken, what it has become.
        left: for every tensor that is not needed, why.
    """

    tensors: dict[str, Tensor]
    mapped: dict[str, str] = field(default_factory=dict[str, str])
    left: dict[str, str] = field(default_factory=dict[str, str])

    def take(self, name: str, becomes: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor, with its dimensions of size 1 dropped if it has more than are wanted.

        Raises:
            UserError: it is missing, or has another shape.
        """
        if name not in self.tensors:
            raise UserError(
                f"the checkpoint has no tensor {name!r}{nearest(name, self.tensors)}; it was not "
                "written by the code base that this conversion is for, or belongs to another model"
            )
        tensor = self.tensors[name]
        self.mapped[name] = becomes
        if shape is not None and tuple(tensor.shape) != shape:
            squeezed = tensor.squeeze()
            if squeezed.numel() != torch.Size(shape).numel() or tensor.dim() <= len(shape):
                raise UserError(
                    f"{name} has shape {tuple(tensor.shape)} where {shape} is needed; the "
                    "checkpoint belongs to another model"
                )
            tensor = tensor.reshape(shape)
        return tensor

    def weight(self, name: str, becomes: str) -> Tensor:
        """A weight, put together where weight norm has split it: g v / |v|, rows apart."""
        if name in self.tensors:
            return self.take(name, becomes)
        direction, length = self.direction_and_length(name, becomes)
        dims = list(range(1, direction.dim()))
        norm = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
        return direction * (length / norm)

    def direction_and_length(self, name: str, becomes: str) -> tuple[Tensor, Tensor]:
        """The two parts that weight norm has split a weight into.

        Raises:
            UserError: they are missing.
        """
        v = self._direction(name)
        direction = self.take(v or f"{name}_v", becomes)
        return direction, self.take(f"{name}_g", becomes)

    def leave(self, prefix: str, why: str) -> None:
        """Say why tensors of this name, or below it, are not needed."""
        for name in self.tensors:
            if (name == prefix or name.startswith(prefix)) and name not in self.mapped:
                self.left[name] = why

    def check_all_used(self) -> None:
        """Raise UserError if a tensor is neither taken nor left for a reason."""
        foreign = [n for n in self.tensors if n not in self.mapped and n not in self.left]
        if foreign:
            raise UserError(
                f"{len(foreign)} tensors of the checkpoint are unknown: {', '.join(foreign[:5])}"
                f"{', ...' if len(foreign) > 5 else ''}; the model has parts that this conversion "
                "does not know, and would not compute the same without them"
            )

    def _direction(self, name: str) -> str | None:
        """Its name; DropConnect has renamed it."""
        return next((n for n in (f"{name}_v", f"{name}_v_raw") if n in self.tensors), None)


def read_tensors(path: Path) -> OldTensors:
    """Read a state dict saved by `torch.save`, without running any code in it.

    Raises:
        UserError: missing, damaged, or not a mere dictionary of tensors.
    """
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}'; give a checkpoint (.pkl or .pth)") from None
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
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):  # pyright: ignore[reportUnknownMemberType]
        loaded = cast(object, loaded["state_dict"])
    if not isinstance(loaded, dict) or not all(
        isinstance(value, Tensor) for value in cast(dict[object, object], loaded).values()
    ):
        raise UserError(f"'{path}' holds no state dict of tensors, but a {type(loaded).__name__}")
    tensors = cast(dict[str, Tensor], loaded)
    names = {name: name.removeprefix("module.") for name in tensors}
    return OldTensors({names[name]: tensor.float() for name, tensor in tensors.items()})
