"""Weights are compared with a configuration before a model is made, whatever sizes it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from equilibria import UserError
from equilibria.models.config import ModelConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.stacked_transformer import StackedTransformerConfig
from equilibria.models.tcn import TCNConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig
from equilibria.train.fit import check_fits
from equilibria.train.tensor_files import TensorFiles

SMALL: dict[str, Any] = {"d_model": 8, "num_heads": 2, "d_inner": 12}
MANY = 10**9


def _files(folder: Path, config: ModelConfig) -> TensorFiles:
    weights = config.build(11).state_dict()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "w.safetensors")
    return TensorFiles(folder, "w", "do something")


@pytest.mark.parametrize(
    "config",
    [
        DEQTransformerConfig(**SMALL, cutoffs=(4, 8), div_val=2),
        TransformerXLConfig(**SMALL, num_layers=3),
        TransformerXLConfig(**SMALL, num_layers=60, tied=True),
        StackedTransformerConfig(**SMALL, num_blocks=2),
        TrellisNetConfig(d_embed=4, d_hidden=6, num_layers=3, num_softmaxes=2),
        RecurrentConfig(d_embedding=4, d_hidden=6, num_layers=2),
        TCNConfig(d_model=4, num_blocks=2),
    ],
)
def test_the_own_weights_fit(tmp_path: Path, config: ModelConfig) -> None:
    torch.manual_seed(0)
    files, before = _files(tmp_path, config), torch.get_rng_state()
    check_fits(files, config, 11)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="of shape"):
        check_fits(files, config, 13)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (DEQTransformerConfig(**SMALL), DEQTransformerConfig(4 * MANY, 2, MANY)),
        (DEQTransformerConfig(**SMALL), DEQTransformerConfig(2 * MANY**3, 2)),
        (TransformerXLConfig(**SMALL), TransformerXLConfig(**SMALL, num_layers=MANY)),
        (StackedTransformerConfig(**SMALL), StackedTransformerConfig(**SMALL, num_blocks=MANY)),
        (RecurrentConfig(d_hidden=6), RecurrentConfig(d_hidden=6, num_layers=MANY)),
        (TCNConfig(d_model=4, num_blocks=2), TCNConfig(d_model=4, num_blocks=MANY)),
    ],
)
def test_sizes_beyond_all_bounds(tmp_path: Path, small: ModelConfig, large: ModelConfig) -> None:
    files = _files(tmp_path, small)
    with pytest.raises(UserError, match=r"of shape|no model can be made \(|belongs to another"):
        check_fits(files, large, 11)


def test_a_model_of_another_package_is_let_through(tmp_path: Path) -> None:
    """It need not know what a shape without numbers is."""

    @dataclass(frozen=True)
    class Foreign(ModelConfig):
        def build(self, vocabulary_size: int) -> nn.Module:
            raise AssertionError

    check_fits(_files(tmp_path, TCNConfig(d_model=4, num_blocks=2)), Foreign(), 11)
