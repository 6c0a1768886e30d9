"""Which models can be shared, and how many modules their configurations ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from equilibria.core.errors import UserError, nearest
from equilibria.models.config import ModelConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.stacked_transformer import StackedTransformerConfig
from equilibria.models.tcn import TCNConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Args:
        default: a configuration, for the types of its options.
        num_modules: how many layers with parameters of their own a configuration asks for.
    """

    default: ModelConfig
    num_modules: Callable[[Any], int]


ARCHITECTURES = {
    "DEQTransformer": Architecture(DEQTransformerConfig(), lambda _: 1),
    "TransformerXL": Architecture(TransformerXLConfig(), lambda c: 1 if c.tied else c.num_layers),
    "StackedTransformer": Architecture(StackedTransformerConfig(), lambda c: c.num_blocks),
    "DEQTrellisNet": Architecture(DEQTrellisNetConfig(), lambda _: 1),
    "TrellisNet": Architecture(TrellisNetConfig(), lambda _: 1),
    "Recurrent": Architecture(RecurrentConfig(), lambda c: c.num_layers),
    "TCN": Architecture(TCNConfig(), lambda c: c.num_blocks),
}
"""By the names of the models' classes. A file names one of these, never a class to import."""


def architecture(name: object) -> Architecture:
    """The architecture of a name.

    Raises:
        UserError: there is none.
    """
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        shown = repr(name)[:60]
        raise UserError(
            f"the architecture {shown} is none of ours{nearest(shown, ARCHITECTURES)} (there are: "
            f"{', '.join(ARCHITECTURES)}); give a folder that 'equilibria share' has written, or "
            "load the model with the library that made it"
        )
    return found


def name_of(config: ModelConfig) -> str:
    """The name under which a configuration's model is shared.

    Raises:
        UserError: it is no model of equilibria.models.
    """
    for name, known in ARCHITECTURES.items():
        if type(known.default) is type(config):
            return name
    raise UserError(
        f"{type(config).__name__} is no configuration of equilibria.models, which are what can be "
        f"shared ({', '.join(ARCHITECTURES)})"
    )
