"""Between tensors that are whole and their shards, as FSDP keeps them.

Every function here is to be called by all processes alike. Without shards they copy nothing, but
for what they read from files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor, nn, no_grad

from equilibria.train.tensor_files import TensorFiles

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole(state: Any) -> Any:
    """A tensor or a state dictionary, however deep, with every shard made whole."""
    if isinstance(state, Tensor):
        return state.full_tensor() if _is_shard(state) else state
    if isinstance(state, dict):
        return {name: whole(value) for name, value in cast(dict[Any, Any], state).items()}
    if isinstance(state, list):
        return [whole(value) for value in cast(list[Any], state)]
    return state


def held_here(state: dict[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """What this process writes of a state: its shards, and of the first one what is not sharded."""
    held = {name: value.to_local() for name, value in state.items() if _is_shard(value)}
    return {**held, **{n: v for n, v in state.items() if first and not _is_shard(v)}}


def split_optimizer_state(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The shards of an optimiser by name, here and in every process, and the rest of its state."""
    shards: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for number, entry in cast(dict[int, dict[str, Any]], state["state"]).items():
        rest[number] = {}
        for name, value in entry.items():
            if isinstance(value, Tensor) and _is_shard(value):
                shards[f"{number}.{name}"] = value.to_local()
            else:
                rest[number][name] = value
    return shards, {**state, "state": rest}


def load_weights(model: nn.Module, files: TensorFiles) -> None:
    """Copy weights into a model, sharded or not; names and shapes are known to fit."""
    with no_grad():
        for name, own in model.state_dict().items():
            own.copy_(_cut(files.read(name), own))


def cut_optimizer_state(
    state: dict[str, Any], parameters: Iterable[Tensor], files: TensorFiles | None = None
) -> dict[str, Any]:
    """A whole state of an optimiser, cut like the parameters that it belongs to.

    Args:
        state: as `state_dict` returned it, or what `split_optimizer_state` left of it.
        parameters: in the order of the optimiser.
        files: with what `split_optimizer_state` took out of it.
    """
    like = dict(enumerate(parameters))
    entries = {
        number: {name: _cut(value, like.get(number)) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    for key in files.shapes if files else ():
        number, name = key.split(".", 1)
        entries[int(number)][name] = _cut(cast(TensorFiles, files).read(key), like[int(number)])
    return {**state, "state": entries}


def _cut(value: Any, like: Tensor | None) -> Any:
    """A tensor as the shard that `like` is; anything else, or of another shape, as it is."""
    if like is None or not _is_shard(like) or not isinstance(value, Tensor):
        return value
    if value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    # By its method and not its class, whose import takes a second.
    return hasattr(tensor, "full_tensor")
