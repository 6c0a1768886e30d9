"""Which tensors a recorded evaluation depends on, found without asking for a list.

First derivatives do not need this: autograd follows the tape by itself. Second derivatives do,
because the tape was recorded at a point whose own dependence on these tensors it cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def free_point(z: Tensor) -> Tensor:
    """A leaf to evaluate f at, marked so that nobody takes it for an input of f.

    A solve inside of f has one, too.
    """
    free = z.detach().requires_grad_()
    free.is_free_point = True  # pyright: ignore[reportAttributeAccessIssue]
    return free


_WITHOUT_TENSORS = (
    int, float, complex, str, type(None), torch.dtype, torch.device, torch.Generator, torch.layout,
)  # fmt: skip


class InputRecorder(TorchFunctionMode):
    """Notes every tensor from outside that enters an operation and requires a gradient."""

    def __init__(self, exclude: Tensor) -> None:
        super().__init__()
        self.start = graph_position()
        self._exclude = exclude
        self._found: dict[int, Tensor] = {}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors found, in the order of their first use."""
        return tuple(self._found.values())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at the arguments, then run the operation as usual."""
        if torch.compiler.is_compiling():  # what f has compiled stays one graph; see `covers`
            return func(*args, **(kwargs or {}))
        self._look_at(args)
        if kwargs:
            self._look_at(kwargs.values())
        return func(*args, **(kwargs or {}))

    def _look_at(self, values: Iterable[Any]) -> None:
        """Consider the tensors among values and in what these hold; most arguments hold none."""
        for value in values:
            if isinstance(value, Tensor):
                if id(value) not in self._found:
                    self._consider(value)
            elif not isinstance(value, _WITHOUT_TENSORS):
                leaves = pytree.tree_leaves(value)
                self._look_at(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def _consider(self, tensor: Tensor) -> None:
        if not tensor.requires_grad or tensor is self._exclude or _is_free_point(tensor):
            return
        if tensor.grad_fn is None or _number(tensor.grad_fn) < self.start:
            self._found[id(tensor)] = tensor


class Exchange(TorchFunctionMode):
    """Puts other tensors in the place of some, in the arguments of every operation.

    Autograd does not stop at a computed input when another input lies beyond it, and would count
    what f does to the one as a partial derivative for the other; so `is_nested` inputs are
    exchanged for tensors at which it does stop. Whether the exchange was seen by all of f,
    compiled parts included, is for `covers` to tell.
    """

    def __init__(self, old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
        super().__init__()
        self._new = {id(a): (a, b) for a, b in zip(old, new, strict=True) if a is not b}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Exchange the arguments, then run the operation as usual."""
        return func(*self._exchanged(args), **self._exchanged(kwargs or {}))

    def _exchanged(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: self._new.get(id(t), (t, t))[1], tree)


def is_nested(inputs: Sequence[Tensor]) -> bool:
    """Whether an input was computed from another one, as where a layer is used twice."""
    leaves = {id(tensor) for tensor in inputs if tensor.grad_fn is None}
    nodes = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    waiting = [parent for node in nodes for parent, _ in node.next_functions]
    seen = set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node in nodes or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def reached(output: Tensor, inputs: Sequence[Tensor], start: int) -> tuple[Tensor, ...]:
    """Those inputs to which the autograd graph leads: not what f only detached or looked at.

    Nodes made since `start` belong to the evaluation. What lies before is searched only for what
    they do not show, such as a weight that autocast had cast before.
    """
    left = {t.grad_fn or id(t) for t in inputs}
    waiting, older, seen = [output.grad_fn], list[Node](), set[Node]()
    while left and (waiting or older):
        node = (waiting or older).pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the node of a leaf has one
        left -= {node, id(variable)}
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        for parent in parents:
            is_older = not hasattr(parent, "variable") and _number(parent) < start
            (older if is_older else waiting).append(parent)
    return tuple(t for t in inputs if (t.grad_fn or id(t)) not in left)


def is_constant(image: Tensor, z: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether an image depends on nothing besides z that a gradient could be given to."""
    return not inputs and covers(image, (z,), 0)


def covers(output: Tensor, inputs: Iterable[Tensor], start: int) -> bool:
    """Whether every path from `output` back to before node number `start` meets an input.

    A walk over the autograd graph; nodes made since `start` belong to the evaluation.
    """
    leaves = {id(tensor) for tensor in inputs if tensor.grad_fn is None}
    borders = {tensor.grad_fn for tensor in inputs if tensor.grad_fn is not None}
    waiting, seen = [output.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node in borders:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only the node of a leaf has one
        if variable is not None:
            if id(variable) not in leaves and not _is_free_point(variable):
                return False
        elif _number(node) < start:
            return False
        else:
            waiting.extend(parent for parent, _ in node.next_functions)
    return True


def _is_free_point(tensor: Tensor) -> bool:
    return getattr(tensor, "is_free_point", False)


def graph_position() -> int:
    """A number that every autograd node made later in this thread is not below."""
    return _next_sequence_number()


def _next_sequence_number() -> int:
    with torch.enable_grad():
        probe = free_point(torch.zeros(())).view(())
    return 0 if probe.grad_fn is None else _number(probe.grad_fn) + 1


def _number(node: Node) -> int:
    return node._sequence_nr()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportPrivateUsage]
