"""Between tensors that are whole, as in files, and their shards, as FSDP keeps them.

Every function here is to be called by all processes alike. Without shards they copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor, nn

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


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into a model, sharded or not; names and shapes are known to fit."""
    own = model.state_dict()
    model.load_state_dict({name: _cut(weight, own[name]) for name, weight in weights.items()})


def cut_optimizer_state(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """A whole state of an optimiser, cut like the parameters that it belongs to."""
    like = dict(enumerate(parameters))
    entries = {
        number: {name: _cut(value, like.get(number)) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
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
