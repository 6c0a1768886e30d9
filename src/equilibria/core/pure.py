"""`f` as a pure function: of z and of every tensor from outside that it uses.

Function transforms (`torch.func`, forward-mode AD) need this and the ordinary backward pass does
not: autograd follows its tape to wherever a tensor came from, while a transform evaluates f again,
on other tensors in the place of those that f closes over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError
from equilibria.core.problem import Problem
from equilibria.core.replay import exchanged


class TransformError(UserError):
    """A transform was asked of something that cannot be transformed correctly."""


def is_transformed() -> bool:
    """Whether a `torch.func` transform is running, or forward-mode AD is switched on."""
    # of several ways to ask, the one that torch.compile answers right as well
    return torch._C._are_functorch_transforms_active() or is_forward_mode()  # pyright: ignore[reportPrivateUsage]


def is_forward_mode() -> bool:
    """Whether tensors may carry tangents, by `torch.func.jvp` or by a dual level."""
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def refuse_batched(cotangent: Tensor) -> None:
    """Raise TransformError for several cotangents at once: a solve cannot be batched afterwards."""
    # by name: torch.autograd batches by another key than torch.func, which Python has no name for
    if "Batched" in str(torch._C._dispatch_keys(cotangent)):  # pyright: ignore[reportPrivateUsage]
        raise TransformError(
            "several cotangents at once (is_grads_batched=True, or vectorize=True of "
            "torch.autograd.functional) cannot go through a solve that is done already; use "
            "torch.func.jacrev or torch.func.vmap over the whole layer, or one cotangent at a time"
        )


class PureMap:
    """The map of a problem, on packed states, with the tensors it closes over as arguments.

    They are found by one evaluation of f (counted): every tensor made before it that is part of a
    transform, requires a gradient, or carries a tangent. Later evaluations see the tensors given
    in their places. Modules that f closes over are given back the parameters they had now, because
    `torch.func.functional_call` exchanges them for the time of one call only. The same holds for
    autocast.

    Raises:
        TransformError: f is differentiated while it uses a tensor that could not be followed.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._modules = [
            (entries, dict(entries))
            for module in modules_of(problem.f)
            for entries in (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
        ]
        device = problem.z0.device.type
        self._autocast = partial(
            torch.autocast,
            device,
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            enabled=torch.is_autocast_enabled(device),
        )
        known = len(problem.scope)
        recorder = self._recorded()
        if len(problem.scope) > known:  # masks and weights that were made now come from outside
            recorder = self._recorded()
        self.inputs = tuple(recorder.found.values())
        self._constants = recorder.constants

    def _recorded(self) -> _Recorder:
        with torch.no_grad(), _Recorder(self._problem.z0) as recorder:
            self._problem.image(self._problem.z0)
        return recorder

    def image(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """f(z) with `inputs` in the place of the tensors found."""
        self._problem.num_evals += 1
        layout = self._problem.layout
        with self._in_place(z, inputs) as replacer:
            f = _rebound(self._problem.f, replacer.replaced)
            try:
                image = layout.pack(f(layout.unpack(z)))
            except RuntimeError as error:
                if "INTERNAL ASSERT" not in str(error):
                    raise
                raise TransformError(_HIDDEN) from error
        if replacer.met_stranger and replacer.num_unused:
            raise TransformError(_STRANGER)
        return image

    def rounded(self, z: Tensor, *inputs: Tensor) -> Tensor:
        """The point that f really sees; inputs are those of `image`."""
        layout = self._problem.layout
        with self._in_place(z, inputs):
            return layout.pack(layout.unpack(z))

    @contextmanager
    def _in_place(self, z: Tensor, inputs: Sequence[Tensor]) -> Generator[_Replacer]:
        given = {id(old): new for old, new in zip(self.inputs, inputs, strict=True)}
        # A value needs no watching, and watching would keep all intermediate tensors.
        replacer = _Replacer(z, given, self._constants, watched=torch.is_grad_enabled())
        with ExitStack() as stack:
            for entries, then in self._modules:
                stack.enter_context(exchanged(entries, replacer.replaced(then)))
            stack.enter_context(self._autocast())
            stack.enter_context(self._problem.scope.active())
            yield stack.enter_context(replacer)


class _Watcher(TorchFunctionMode):
    """Sees every operation and knows which tensors were made since it began."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self._level = _functorch.maybe_current_level() or 0
        self._made: dict[int, Tensor] = {id(z): z}  # kept alive, so that no id is used twice
        self._outer_memory = {_memory(z)}
        self._inner_memory: set[int] = set()

    def _remember(self, result: Any) -> Any:
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._made[id(value)] = value
                if _memory(value) not in self._outer_memory:
                    self._inner_memory.add(_memory(value))
        return result

    def _is_inner(self, tensor: Tensor) -> bool:
        """Whether it was made since; what a transform inside f unwraps is a new object."""
        if id(tensor) in self._made or _memory(tensor) in self._inner_memory:
            return True
        self._outer_memory.add(_memory(tensor))
        return False

    def _outside(self, tensor: Tensor) -> Tensor:
        """The tensor without what transforms inside f have wrapped around it."""
        while id(tensor) not in self._made and _functorch.maybe_get_level(tensor) > self._level:
            tensor = _functorch.get_unwrapped(tensor)
        return tensor


class _Recorder(_Watcher):
    """Notes every tensor from outside that a derivative could be taken by."""

    def __init__(self, z: Tensor) -> None:
        super().__init__(z)
        self.found: dict[int, Tensor] = {}
        self.constants: dict[int, Tensor] = {}  # other tensors from outside

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at the arguments, then run the operation as usual."""
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                tensor = self._outside(value)
                if not self._is_inner(tensor):
                    kind = self.found if _matters(tensor) else self.constants
                    kind[id(tensor)] = tensor
        return self._remember(func(*args, **(kwargs or {})))


class _Replacer(_Watcher):
    """Puts other tensors in the place of those found, in the arguments of every operation."""

    def __init__(
        self, z: Tensor, given: dict[int, Tensor], constants: dict[int, Tensor], *, watched: bool
    ) -> None:
        super().__init__(z)
        self._given = given
        self._constants = constants
        self._watched = watched
        self._unused = set(given) if watched else set[int]()
        self.met_stranger = False
        """Whether f used a tensor from outside that it did not use before."""
        self._outer_memory.update(map(_memory, given.values()) if watched else ())
        self._made.update({id(new): new for new in given.values()})

    @property
    def num_unused(self) -> int:
        """How many of the tensors to replace were not met."""
        return len(self._unused)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the arguments, then run the operation."""
        args = pytree.tree_map_only(Tensor, self._seen_as, args)
        named: dict[str, Any] = pytree.tree_map_only(Tensor, self._seen_as, kwargs or {})
        result = func(*args, **named)
        return self._remember(result) if self._watched else result

    def replaced(self, tree: Any) -> Any:
        """A tree with the tensors replaced, where they can be found without an operation.

        Not only a shortcut: what f hands to a transform or a compiled function of its own is
        wrapped out of sight before the first operation.
        """

        def replace(tensor: Tensor) -> Tensor:
            self._unused.discard(id(tensor))
            return self._given.get(id(tensor), tensor)

        return pytree.tree_map_only(Tensor, replace, tree)

    def _seen_as(self, tensor: Tensor) -> Tensor:
        outside = tensor if id(tensor) in self._given else self._outside(tensor)
        if id(outside) in self._given:
            self._unused.discard(id(outside))
            return _rewrapped(tensor, outside, self._given[id(outside)])
        known = not self._watched or id(outside) in self._constants or self._is_inner(outside)
        if not known:
            self.met_stranger = True
            if _matters(outside) or isinstance(outside, nn.Parameter):
                raise TransformError(_STRANGER)
        return tensor


_STRANGER = (
    "f uses other tensors now than when the solve began, so a derivative would be wrong; possible "
    "causes: f keeps tensors from one call to the next, or hides a module whose parameters "
    "torch.func.functional_call exchanges where equilibria does not find it (let f close over the "
    "module itself)"
)

_HIDDEN = (
    "f hands a tensor that it closes over to a torch.func transform or a compiled function of its "
    "own, out of sight of equilibria; let f close over that tensor directly, not over an object "
    "that holds it"
)


def _memory(tensor: Tensor) -> int:
    """The identity of the memory that a tensor lies in, below all transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    with torch._C.DisableTorchFunction():  # an outer solve would put another tensor in its place  # pyright: ignore[reportPrivateUsage]
        if tensor.layout is not torch.strided:
            return id(tensor)  # a sparse tensor has several
        return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _matters(tensor: Tensor) -> bool:
    """Whether a derivative could be taken by this tensor."""
    if _functorch.is_functorch_wrapped_tensor(tensor) or tensor.requires_grad:
        return True
    return is_forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def _rewrapped(tensor: Tensor, outside: Tensor, given: Tensor) -> Tensor:
    """`given`, wrapped by the transforms inside f as `tensor` wraps `outside`."""
    if tensor is outside:
        return given
    level = _functorch.maybe_get_level(tensor)
    inner = _rewrapped(_functorch.get_unwrapped(tensor), outside, given)
    if _functorch.is_batchedtensor(tensor):
        return _functorch._add_batch_dim(inner, _functorch.maybe_get_bdim(tensor), level)  # pyright: ignore[reportPrivateUsage]
    return _functorch._wrap_for_grad(inner, level)  # pyright: ignore[reportPrivateUsage]


def _rebound(f: Callable[..., Any], replaced: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function with the trees that it closes over replaced."""
    if isinstance(f, partial):
        call = cast("partial[Any]", f)
        return partial(
            _rebound(call.func, replaced), *replaced(call.args), **replaced(call.keywords)
        )
    if not isinstance(f, FunctionType) or not f.__closure__:
        return f

    def rebound(cell: CellType) -> CellType:
        try:
            old = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            return cell
        new = replaced(old)
        pairs = zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True)
        # The same cell where nothing changes, so that f can go on writing to it (`nonlocal`).
        return cell if all(one is other for one, other in pairs) else CellType(new)

    cells = tuple(map(rebound, f.__closure__))
    new = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
    new.__kwdefaults__ = f.__kwdefaults__
    return new


def modules_of(f: object, depth: int = 4) -> list[nn.Module]:
    """Every module that a function closes over, their submodules included."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, object] = {}

    def visit(value: object, depth: int) -> None:
        if depth < 0 or id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.update((id(module), module) for module in value.modules())
            return
        for part in _parts(value):
            visit(part, depth - 1)

    visit(f, depth)
    return list(found.values())


def _parts(value: object) -> Iterator[object]:
    """What a function, a container or an object refers to."""
    if isinstance(value, FunctionType):
        yield from _closure_of(value)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        names = value.__code__.co_names
        yield from (value.__globals__[name] for name in names if name in value.__globals__)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        call = cast("partial[Any]", value)
        yield from (call.func, *call.args, *call.keywords.values())
    elif isinstance(value, dict):
        yield from cast("dict[Any, Any]", value).values()
    elif isinstance(value, list | tuple | set):
        yield from cast("list[Any]", value)
    elif not isinstance(value, Tensor | type | ModuleType):
        yield from getattr(value, "__dict__", {}).values()
        slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        yield from (getattr(value, name) for name in slots if hasattr(value, name))


def _closure_of(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
