"""The explicit Transformer-XL, untied and weight-tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibria import UserError
from equilibria.models.config import unrolled_settings
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.transformer_xl import TransformerXL, TransformerXLConfig

SMALL: dict[str, Any] = {
    "d_model": 8,
    "num_heads": 2,
    "d_inner": 20,
    "dropout": 0.0,
    "embedding_dropout": 0.0,
    "init_std": 0.4,
}
both = pytest.mark.parametrize("tied", [False, True])


def make(**options: Any) -> TransformerXL:
    torch.manual_seed(4)
    return TransformerXLConfig(**{**SMALL, "num_layers": 3, **options}).build(11).double()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_norm": False, "attention_bias": True},
        {"cutoffs": (4, 8), "div_val": 2, "tie_first_projection": False},
        {"attention_window": 3, "position_dropout": 0.3, "attention_dropout": 0.3, "dropout": 0.3},
    ],
    ids=["plain", "bias", "adaptive", "dropped"],
)
@pytest.mark.parametrize("num_layers", [1, 5])
def test_tied_layers_are_an_unrolled_deq(num_layers, options, norm, tokens):
    """In training mode: the seed draws the same masks for both, once for all layers."""
    options = {"norm": norm, **options}
    tied = make(tied=True, num_layers=num_layers, **options)
    deq = DEQTransformerConfig(**{**SMALL, **options}).build(11).double()
    names = {
        name.replace("layers.0.", "deq.cell."): value for name, value in tied.state_dict().items()
    }
    deq.load_state_dict(names)
    targets = tokens.roll(-1, 1)
    found = []
    for model, settings in ((tied, None), (deq, unrolled_settings(num_layers))):
        torch.manual_seed(7)
        losses = model(tokens, targets=targets, settings=settings).losses
        found.append((losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))))
    for mine, unrolled in zip(*found, strict=True):
        torch.testing.assert_close(mine, unrolled)


@both
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_token_sees_its_future(tied, norm, tokens):
    model = make(tied=tied, norm=norm).eval()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    change = (model(tokens).logits - model(other).logits).abs().amax((0, 2))
    assert (change[:5] == 0).all()
    assert (change[5:] > 0).all()


@both
def test_segments_with_a_long_memory_are_the_whole_text(tied, tokens):
    """Every layer sees its own past, so that nothing is lost at the border."""
    model = make(tied=tied).eval()
    whole = model(tokens).logits
    first = model(tokens[:, :4], memory_length=9)
    second = model(tokens[:, 4:], first.memory, memory_length=9)
    parts = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(parts, whole)
    assert [m.shape[1] for m in second.memory] == [9] * (4 if tied else 3)


@both
def test_a_layer_attends_to_its_own_inputs_of_the_last_segment(tied, tokens):
    """What is remembered is what every layer was given, and nothing reaches back by gradients."""
    model = make(tied=tied).eval()
    given: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    memory = model(tokens, memory_length=4).memory
    for kept, inputs in zip(memory[:3], given, strict=True):
        assert torch.equal(kept, inputs[:, -4:])
        assert not kept.requires_grad
    longer = model(tokens, memory, memory_length=11).memory
    assert all(torch.equal(new[:, :2], old[:, 2:]) for new, old in zip(longer, memory, strict=True))


@both
def test_memory_survives_its_tensors(tied, tokens):
    model = make(tied=tied).eval()
    memory = model(tokens, memory_length=4).memory
    again = model.memory_from([m.clone() for m in memory])
    assert torch.equal(model(tokens, memory).logits, model(tokens, again).logits)
    with pytest.raises(UserError, match="belongs to another model"):
        model.memory_from(list(memory)[:-1])
    assert model(tokens).memory == ()


@both
def test_parameters(tied):
    block = 8 * 24 * (2 if tied else 1) + 2 * 64 + 2 * 160 + 20 + 8 + 2 * 8 + (24 + 8 + 20 + 8)
    model = make(tied=tied)
    assert model.num_parameters(embedding=False) == block * (1 if tied else 3)
    assert model.num_parameters() == block * (1 if tied else 3) + 11 * 9


def test_gradients(tokens):
    model = make()
    targets = tokens.roll(-1, 1)
    model(tokens, targets=targets).losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_it_does_not_do(tokens):
    with pytest.raises(UserError, match="TransformerXL is an explicit model"):
        make()(tokens, settings=unrolled_settings(2))
    with pytest.raises(UserError, match="num_layers=0"):
        TransformerXLConfig(num_layers=0)


@both
def test_dropout_is_drawn_for_every_layer_or_once(tied, tokens):
    model = make(tied=tied, dropout=0.5)
    masks: list[Any] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: masks.append(arguments[1].masks))
    model(tokens)
    assert len(masks) == 3
    assert torch.equal(masks[0].inner, masks[1].inner) == tied


def test_adaptive_softmax(tokens):
    model = make(cutoffs=(4, 8), div_val=2)
    losses = model(tokens, targets=tokens).losses
    assert losses.shape == tokens.shape
    torch.testing.assert_close(model(tokens).logits.exp().sum(-1), torch.ones(2, 9))
