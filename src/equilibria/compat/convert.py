"""Old checkpoints into ours: configuration, weights, and a report of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from equilibria.compat.deq_transformer import convert_transformer, is_transformer
from equilibria.compat.deq_trellisnet import convert_trellisnet, is_trellisnet
from equilibria.compat.reading import read_tensors
from equilibria.compat.tensors import OldTensors
from equilibria.compat.torchdeq_transformer import (
    convert_torchdeq_transformer,
    is_torchdeq_transformer,
)
from equilibria.core.errors import UserError
from equilibria.models.config import ModelConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.stacked_transformer import StackedTransformerConfig


@dataclass(frozen=True)
class Converted:
    """A model in our layout.

    Args:
        config: which model.
        weights: its state dict.
        vocabulary_size: number of token ids.
        mapped: for every old tensor that was used, what it has become.
        left: for every other one, why it is not needed.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    vocabulary_size: int
    mapped: dict[str, str]
    left: dict[str, str]

    def report(self) -> str:
        """A line for every old tensor."""
        width = max(map(len, (*self.mapped, *self.left)))
        lines = [f"{name:{width}}  ->  {becomes}" for name, becomes in self.mapped.items()]
        lines += [f"{name:{width}}  left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert(path: Path, config: ModelConfig | None = None) -> Converted:
    """Read a checkpoint of the first public DEQ code (locuslab/deq), or of torchdeq's.

    Args:
        path: a state dict: version 1 saved them as .pkl, version 2 as .pth.
        config: the rest of the configuration, which no tensor tells: layer norm, window, dropouts,
            how to solve. None takes the defaults.

    Raises:
        UserError: unreadable, tensors that are missing or foreign, a model that we do not have.
    """
    old = read_tensors(path)
    made, weights = _convert(old, config)
    with torch.device("meta"):  # which takes no memory
        model = made.build(_vocabulary_size(weights))
    _check_fit(weights, model.state_dict())
    return Converted(made, weights, _vocabulary_size(weights), old.mapped, old.left)


def _convert(old: OldTensors, config: ModelConfig | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    if is_transformer(old):
        rest = DEQTransformerConfig() if config is None else config
        if isinstance(rest, DEQTransformerConfig):
            return convert_transformer(old, rest)
    elif is_torchdeq_transformer(old):
        rest = StackedTransformerConfig() if config is None else config
        if isinstance(rest, StackedTransformerConfig):
            return convert_torchdeq_transformer(old, rest)
    elif is_trellisnet(old):
        rest = DEQTrellisNetConfig() if config is None else config
        if isinstance(rest, DEQTrellisNetConfig):
            return convert_trellisnet(old, rest)
    else:
        raise UserError(
            f"the checkpoint is of no model that is converted: it has {len(old.tensors)} tensors "
            f"such as {', '.join(list(old.tensors)[:3])}. Converted are DEQ-Transformer and "
            "DEQ-TrellisNet language models of locuslab/deq, and those of torchdeq"
        )
    raise UserError(
        f"the checkpoint is of another model than {type(config).__name__}; give the recipe of one "
        "that is like it (--recipe)"
    )


def _check_fit(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise UserError unless these are all weights of the model, and no others.

    Converters measure every tensor that they take; this is for what none of them has thought of.
    """
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    needed = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = [name for name in given | needed if given.get(name) != needed.get(name)]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the checkpoint makes {name} of shape {given.get(name, 'none')} where the model has "
            f"{needed.get(name, 'none')}; it belongs to a model that we do not have"
        )


def _vocabulary_size(weights: dict[str, Tensor]) -> int:
    for name in ("output_bias", "adaptive_softmax.bias", "mixture.bias"):
        if name in weights:
            return len(weights[name])
    raise RuntimeError("a converted language model has no softmax")
