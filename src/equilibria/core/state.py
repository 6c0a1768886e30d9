"""Packing: any tree of tensors with a leading batch dimension, as one (B, D) tensor and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError
from equilibria.core.segments import Segments

State = Any
"""A tensor, or a nested tuple / list / dict of tensors, each (B, ...)."""


class StateError(UserError):
    """A state or the image of one has another tree, shape, dtype or device than expected."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of a state: its name in the tree, and its shape without the batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    """Dimensions from slowest to fastest varying; keeps channels_last through packing."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_permuted(self) -> bool:
        """Whether it is not packed in the order of its dimensions."""
        return self.order != tuple(range(len(self.shape)))


@dataclass(frozen=True)
class Layout:
    """How a state maps to a packed (B, D) tensor.

    The packed tensor has the widest dtype among the leaves and at least float32, so that a solver
    never accumulates in half precision; leaves go back to `f` in their own dtype.
    """

    treespec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    batch_dims: Literal[0, 1]
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    segments: Segments | None = None
    is_plain: bool = False
    """One tensor whose packed form is a view of it: nothing to convert, permute or join."""

    @staticmethod
    def of(state: State, batch_dims: Literal[0, 1] = 1, segments: Tensor | None = None) -> Layout:
        """Read the layout of `state`, whose rows may belong to problems given by `segments` (N,).

        Raises:
            StateError: no tensors, a leaf that is no floating-point tensor, a missing batch
                dimension, or leaves that disagree in batch size or device.
        """
        if batch_dims not in (0, 1):
            raise UserError(f"batch_dims must be 0 (one global problem) or 1, not {batch_dims!r}")
        paths, treespec = pytree.tree_flatten_with_path(state)
        if not paths:
            raise StateError("the initial state holds no tensors; give z0 at least one")
        named = [(pytree.keystr(path), leaf) for path, leaf in paths]
        for name, leaf in named:
            _check_leaf(name, leaf, batch_dims)
        tensors = [leaf for _, leaf in named]
        # no int(...): under torch.export the batch size may be a symbol
        batch_size = tensors[0].shape[0] if batch_dims else 1
        for name, tensor in named:
            if batch_dims and tensor.shape[0] != batch_size:
                raise StateError(
                    f"z0{name} has batch size {tensor.shape[0]}, another part of the state has "
                    f"{batch_size}; every tensor of a state leads with the same batch dimension"
                )
            if tensor.device != tensors[0].device:
                raise StateError(
                    f"z0{name} is on {tensor.device}, another part of the state on "
                    f"{tensors[0].device}; move the whole state to one device"
                )
        if tensors[0].device.type == "meta":
            raise StateError(
                f"z0{named[0][0]} is on the meta device and holds no numbers to solve with; make "
                "it on a real one, for example torch.zeros(...)"
            )
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        leaves = tuple(
            Leaf(name, tuple(t.shape[batch_dims:]), t.dtype, _order(t, batch_dims))
            for name, t in named
        )
        bare = treespec.is_leaf() and batch_dims == 1 and segments is None
        return Layout(
            treespec=treespec,
            leaves=leaves,
            batch_dims=batch_dims,
            batch_size=batch_size,
            dtype=dtype,
            device=tensors[0].device,
            segments=None if segments is None else _segments(segments, tensors[0], batch_dims),
            is_plain=bare and leaves[0].dtype == dtype and not leaves[0].is_permuted,
        )

    @property
    def norm_scale(self) -> Tensor | None:
        """Correction (B,) of root mean squares for padding, None without padding."""
        return None if self.segments is None else self.segments.norm_scale.to(self.dtype)

    @property
    def rounds(self) -> bool:
        """Whether unpacking loses precision because a leaf is narrower than the packed dtype."""
        return any(leaf.dtype != self.dtype for leaf in self.leaves)

    def pack(self, state: State) -> Tensor:
        """Flatten a state of this layout to (B, D). A single tensor is a view where possible.

        Raises:
            StateError: the tree, a shape, a dtype or a device differs from the layout's.
        """
        if self.is_plain and isinstance(state, Tensor):
            return self._flatten(self.leaves[0], state)
        tensors, treespec = pytree.tree_flatten(state)
        if treespec != self.treespec:
            raise StateError(self._unlike(state, treespec))
        columns = [
            self._flatten(leaf, tensor) for leaf, tensor in zip(self.leaves, tensors, strict=True)
        ]
        rows = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        return rows if self.segments is None else self.segments.pad(rows)

    def _unlike(self, state: State, treespec: pytree.TreeSpec) -> str:
        """What is wrong with a state of another tree."""
        paths, _ = pytree.tree_flatten_with_path(state)
        names, wanted = [pytree.keystr(path) for path, _ in paths], [x.name for x in self.leaves]
        if names != wanted and sorted(names) == sorted(wanted):
            return (
                f"f returned the parts of the state in the order {', '.join(names)}, its input has "
                f"{', '.join(wanted)}; return a dict whose keys are in the order of z"
            )
        return (
            f"f returned the tree {_shown(treespec)}, its input is {_shown(self.treespec)}; "
            "f must return a state of exactly the form of z"
        )

    def unpack(self, packed: Tensor) -> State:
        """Turn a packed (B, D) tensor back into a state, each leaf in its own dtype."""
        if self.is_plain:
            return packed.reshape(self.batch_size, *self.leaves[0].shape)
        if self.segments is not None:
            packed = self.segments.unpad(packed, sum(leaf.size for leaf in self.leaves))
        columns: Sequence[Tensor] = (
            (packed,)
            if len(self.leaves) == 1
            else packed.split([leaf.size for leaf in self.leaves], dim=1)
        )
        tensors = [
            self._restore(leaf, column) for leaf, column in zip(self.leaves, columns, strict=True)
        ]
        return pytree.tree_unflatten(tensors, self.treespec)

    def _flatten(self, leaf: Leaf, tensor: object) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise StateError(f"f(z){leaf.name} is a {type(tensor).__name__}, expected a tensor")
        shape = (self.batch_size, *leaf.shape) if self.batch_dims else leaf.shape
        if tuple(tensor.shape) != shape:
            raise StateError(
                f"f(z){leaf.name} has shape {tuple(tensor.shape)}, z{leaf.name} has {shape}; f "
                "must keep the shape of the state"
            )
        if tensor.device != self.device:
            raise StateError(
                f"f(z){leaf.name} is on {tensor.device}, z{leaf.name} on {self.device}; f must "
                "keep the device of the state"
            )
        if tensor.dtype != leaf.dtype and not _autocast_explains(tensor, leaf.dtype):
            raise StateError(
                f"f(z){leaf.name} is {tensor.dtype}, z{leaf.name} is {leaf.dtype}; start from a "
                f"z0 of {tensor.dtype}, or cast inside f"
            )
        if self.is_plain and tensor.dtype == self.dtype:
            return tensor.reshape(self.batch_size, leaf.size)
        batched = tensor if self.batch_dims else tensor.unsqueeze(0)
        ordered = batched.permute(0, *(d + 1 for d in leaf.order))
        # flatten on sizes that are known: reshape(B, -1) is ambiguous for an empty batch
        return ordered.reshape(self.batch_size, leaf.size).to(self.dtype)

    def _restore(self, leaf: Leaf, column: Tensor) -> Tensor:
        ordered_shape = [leaf.shape[d] for d in leaf.order]
        ordered = column.to(leaf.dtype).reshape(self.batch_size, *ordered_shape)
        inverse = sorted(range(len(leaf.order)), key=leaf.order.__getitem__)
        tensor = ordered.permute(0, *(d + 1 for d in inverse))
        return tensor if self.batch_dims else tensor.squeeze(0)


def _shown(tree: pytree.TreeSpec) -> str:
    """A tree on one line."""
    return "a tensor" if tree.is_leaf() else " ".join(str(tree).split())


def _check_leaf(name: str, leaf: object, batch_dims: int) -> None:
    if not isinstance(leaf, Tensor):
        raise StateError(f"z0{name} is a {type(leaf).__name__}, expected a tensor")
    if not leaf.is_floating_point():
        raise StateError(
            f"z0{name} has dtype {leaf.dtype}, expected a real floating-point one; a complex "
            "state can be given as torch.view_as_real(z0)"
        )
    if leaf.layout != torch.strided:
        raise StateError(f"z0{name} is {leaf.layout}; give a dense tensor, z0.to_dense()")
    if leaf.dim() < batch_dims:
        raise StateError(
            f"z0{name} has no dimensions, expected (batch, ...); pass batch_dims=0 for one "
            "global problem"
        )


def _segments(index: Tensor, state: Tensor, batch_dims: int) -> Segments:
    if not isinstance(index, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(
            f"segments is a {type(index).__name__}, expected a tensor of integers (N,); give "
            "torch.tensor([0, 0, 1, ...]), the number of the problem that each row belongs to"
        )
    if not batch_dims:
        raise UserError("segments and batch_dims=0 contradict each other; leave out batch_dims")
    if index.numel() != state.shape[0]:
        raise UserError(
            f"segments has {index.numel()} entries, the state has {state.shape[0]} rows; give one "
            "entry per row"
        )
    return Segments.of(index.to(state.device))


def _order(tensor: Tensor, batch_dims: int) -> tuple[int, ...]:
    """Identity, or channels-last order when that is how the tensor lies in memory."""
    order = tuple(range(tensor.dim()))
    if not tensor.is_contiguous():
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            order = (0, 2, 3, 1)
        if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
            order = (0, 2, 3, 4, 1)
    return tuple(dim - batch_dims for dim in order[batch_dims:])


def _autocast_explains(tensor: Tensor, wanted: torch.dtype) -> bool:
    """Autocast turns what it knows of into its dtype or into float32; that is cast back."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or wanted == torch.float64:
        return False
    return tensor.dtype in (torch.get_autocast_dtype(device), torch.float32)
