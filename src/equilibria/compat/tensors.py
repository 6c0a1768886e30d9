"""Tensors of an old checkpoint, which are taken one by one until none is left."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest

_KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class OldTensors:
    """Names and tensors, and what has become of each.

    Args:
        tensors: by their names, without the prefix of a parallel wrapper.
        mapped: for every tensor taken, what it has become.
        left: for every tensor that is not needed, why.
        told: shapes of the tensors that have told how wide the model is.
    """

    tensors: dict[str, Tensor]
    mapped: dict[str, str] = field(default_factory=dict[str, str])
    left: dict[str, str] = field(default_factory=dict[str, str])
    told: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def tell(self, name: str, *sizes: str) -> tuple[int, ...]:
        """How large the dimensions of a tensor are, which others are measured by.

        Args:
            name: of the tensor.
            sizes: what each dimension is.

        Raises:
            UserError: it is missing, has other dimensions, or nothing in it.
        """
        shape = tuple(self._named(name).shape)
        if len(shape) != len(sizes) or 0 in shape:
            raise UserError(
                f"{name} has shape {shape} where ({', '.join(sizes)}) is needed, none of them 0; "
                "the checkpoint is damaged or belongs to another model"
            )
        self.told[name] = shape
        return shape

    def take(self, name: str, becomes: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in float32, without the dimensions of size 1 that kernels have at their end.

        Raises:
            UserError: it is missing, has another shape, or values that no weight has.
        """
        tensor = self._named(name)
        given, more = tuple(tensor.shape[: len(shape)]), tensor.shape[len(shape) :]
        if given != shape or more.numel() != 1:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)} where {shape} is needed{self._why()}; the "
                "checkpoint is damaged or belongs to another model"
            )
        if tensor.dtype not in _KINDS:
            raise UserError(
                f"{name} is of {tensor.dtype} where floating-point numbers are needed; save the "
                "model's weights in float32"
            )
        tensor = tensor.reshape(shape).float()
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} has values that are NaN or infinite in float32; the training it is from "
                "has failed, so take a checkpoint from before that"
            )
        self.mapped[name] = becomes
        return tensor

    def weight(self, name: str, becomes: str, shape: tuple[int, ...]) -> Tensor:
        """A weight, put together where weight norm has split it: g v / |v|, rows apart."""
        if name in self.tensors:
            return self.take(name, becomes, shape)
        direction, length = self.direction_and_length(name, becomes, shape)
        rows = direction.flatten(1)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return (rows * (length / norm)).reshape(shape)

    def direction_and_length(
        self, name: str, becomes: str, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """The two parts that weight norm has split a weight into: as `shape`, and (rows, 1).

        Raises:
            UserError: they are missing, have other shapes, or a row has no direction.
        """
        held = self.held(name)
        direction = self.take(f"{name}_v" if held == name else held, becomes, shape)
        if not direction.flatten(1).any(1).all():
            raise UserError(
                f"{held} has a row of zeros, which has no direction: with weight norm the old "
                "model would be NaN, too; the checkpoint is damaged"
            )
        return direction, self.take(f"{name}_g", becomes, (shape[0], 1))

    def held(self, name: str) -> str:
        """What a weight is called here, or its direction, which DropConnect has renamed.

        Raises:
            UserError: DropConnect has renamed a whole weight.
        """
        if f"{name}_raw" in self.tensors:
            raise UserError(
                f"the checkpoint has {name}_raw: DropConnect (--wdrop) without weight norm "
                "(--wnorm), which is not converted"
            )
        names = (name, f"{name}_v", f"{name}_v_raw")
        return next((found for found in names if found in self.tensors), name)

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

    def _named(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(
                f"the checkpoint has no tensor {name!r}{nearest(name, self.tensors)}; it was not "
                "written by the code base that this conversion is for, or belongs to another model"
            )
        return self.tensors[name]

    def _why(self) -> str:
        """Which tensors a shape follows from, as one of them may be the wrong one."""
        told = " and ".join(f"{name} {shape}" for name, shape in self.told.items())
        return f" to go with {told}" if told else ""
