"""torchdeq's language model; its numbers are checked against a restatement in tests/compat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import UserError
from equilibria.models.config import unrolled_settings
from equilibria.models.stacked_transformer import StackedTransformer, StackedTransformerConfig


def make(**options: Any) -> StackedTransformer:
    torch.manual_seed(0)
    config = StackedTransformerConfig(
        **{
            "d_model": 8, "num_heads": 2, "d_inner": 12, "num_blocks": 2, "num_steps": 3,
            "dropout": 0.0, "embedding_dropout": 0.0, "init_std": 0.3, **options,
        }
    )  # fmt: skip
    return config.build(11).double()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


def test_no_token_sees_its_future(tokens: Tensor) -> None:
    model, changed = make(), tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_all_blocks_are_applied_at_every_step(tokens: Tensor) -> None:
    model = make()
    stack = model.stack
    injection = stack.inject(model.embed(tokens))
    z = torch.zeros_like(model.embed(tokens))
    for _ in range(3):
        for number, block in enumerate(stack.blocks):
            z = block(z, injection, number)
    torch.testing.assert_close(model(tokens).logits, model.softmax.log_probabilities(z))


def test_the_next_segment_attends_to_the_last_step_of_this_one(tokens: Tensor) -> None:
    model = make()
    first = model(tokens, memory_length=5)
    assert [tuple(t.shape) for t in first.memory] == [(3, 5, 8), (3, 5, 16)]
    with_memory, without = model(tokens, first.memory).logits, model(tokens).logits
    assert not torch.allclose(with_memory, without)
    again = model(tokens, model.memory_from(list(first.memory))).logits
    assert torch.equal(again, with_memory)
    with pytest.raises(UserError, match="belongs to another model"):
        model.memory_from([first.memory.z])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_change_no_gradient(tokens: Tensor, dropout: float) -> None:
    gradients = []
    for checkpoint in (True, False):
        rates = dict.fromkeys(("dropout", "attention_dropout", "position_dropout"), dropout)
        model = make(checkpoint=checkpoint, **rates).train()
        torch.manual_seed(3)
        model(tokens, targets=tokens).losses.mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


def test_a_constant_added_to_the_state_stays(tokens: Tensor) -> None:
    """Why there is no equilibrium to solve for."""
    model = make()
    injection = model.stack.inject(model.embed(tokens))
    z = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(model.stack(z + 2.0, injection), model.stack(z, injection) + 2.0)


def test_what_it_does_not_do(tokens: Tensor) -> None:
    with pytest.raises(UserError, match="pre-norm"):
        StackedTransformerConfig(norm="post")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="num_steps"):
        StackedTransformerConfig(num_steps=0)
    with pytest.raises(UserError, match="explicit|solve"):
        make()(tokens, settings=unrolled_settings(2))
