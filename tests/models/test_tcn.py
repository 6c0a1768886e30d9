"""The TCN: causal, as far-sighted as it says, of the size it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import UserError
from equilibria.models.config import unrolled_settings
from equilibria.models.tcn import TCN, TCNConfig

VOCABULARY = 11


def _model(**options: Any) -> TCN:
    torch.manual_seed(0)
    # Large initial kernels: at 0.01 an input fades before it reaches the border of the field.
    defaults = {"d_model": 6, "num_blocks": 3, "kernel_size": 3, "init_std": 0.5}
    return TCNConfig(**{**defaults, **options}).build(VOCABULARY).double().eval()


@pytest.fixture
def tokens() -> Tensor:
    """Ids (2, 40)."""
    return torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


def test_no_logit_depends_on_a_later_token(tokens: Tensor) -> None:
    model = _model()
    reference = model(tokens).logits
    for t in (0, 7, 39):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 3) % VOCABULARY
        change = (model(other).logits - reference).abs()
        assert torch.equal(change[:, :t], torch.zeros_like(change[:, :t]))
        assert change[:, t].amax(dim=1).min() > 1e-6


@pytest.mark.parametrize(("num_blocks", "kernel_size"), [(1, 2), (2, 4), (3, 3)])
def test_the_receptive_field(tokens: Tensor, num_blocks: int, kernel_size: int) -> None:
    """The last position depends on exactly as many as the configuration says."""
    model = _model(num_blocks=num_blocks, kernel_size=kernel_size)
    size = model.config.receptive_field
    embedded = torch.zeros(1, 6, 40, dtype=torch.float64, requires_grad=True)
    model.blocks(embedded + 1.0)[0, :, -1].sum().backward()
    assert embedded.grad is not None
    reached = embedded.grad.abs().sum(dim=1)[0] > 0
    assert reached[-size:].all()
    assert not reached[:-size].any()


def test_the_recipe_sees_the_whole_sequence() -> None:
    assert TCNConfig(d_model=11, num_blocks=8, kernel_size=8).receptive_field == 3571


def test_number_of_parameters() -> None:
    """2 kernels of k D^2 + 2 D per block, V D to read and V D + V to write."""
    model = TCNConfig(d_model=11, num_blocks=8, kernel_size=8).build(10)
    assert model.num_parameters() == 8 * 2 * (8 * 11**2 + 2 * 11) + 2 * 10 * 11 + 10 == 16070
    assert model.num_parameters(embedding=False) == 16070 - 110
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_segments_with_memory_equal_the_whole_text(tokens: Tensor) -> None:
    model = _model()
    whole = model(tokens).logits
    memory, parts = None, []
    for segment in tokens.split([5, 20, 15], dim=1):
        output = model(segment, memory, memory_length=model.config.receptive_field - 1)
        memory = model.memory_from(output.memory)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    assert model(tokens).memory == ()


def test_a_memory_keeps_the_latest_ids(tokens: Tensor) -> None:
    (kept,) = _model()(tokens, memory_length=4).memory
    assert torch.equal(kept, tokens[:, -4:])
    with pytest.raises(UserError, match="needs ids .*; the checkpoint belongs to another model"):
        _model().memory_from([torch.zeros(2, 4)])


def test_dropout_only_in_training(tokens: Tensor) -> None:
    model = _model(dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_there_is_nothing_to_unroll(tokens: Tensor) -> None:
    assert _model()(tokens).solution is None
    with pytest.raises(UserError, match="TCN is an explicit model.*set task.pretrain_steps to 0"):
        _model()(tokens, settings=unrolled_settings(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model=0 must be"),
        ({"num_blocks": 0}, "num_blocks=0 must be"),
        ({"kernel_size": 1}, "kernel_size=1 sees no earlier position; give at least 2"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"init_std": 0.0}, "init_std=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _model(**options)
