"""Adaptive softmax, attention windows and the dropouts of attention in the DEQ-Transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equilibria import UserError
from equilibria.layers.relative_attention import future_mask, relative_attention
from equilibria.models.deq_transformer import DEQTransformerConfig

ADAPTIVE = {"cutoffs": (4, 8), "div_val": 2, "tie_first_projection": False}


def test_an_adaptive_model_learns_from_losses(make_model, tokens):
    model = make_model(**ADAPTIVE)
    targets = tokens.roll(-1, 1)
    output = model(tokens, targets=targets)
    logits = model(tokens).logits
    assert logits.shape == (2, 9, 11)
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(2, 9)
    torch.testing.assert_close(output.losses, wanted, rtol=1e-5, atol=1e-5)
    output.losses.mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(UserError, match="called with targets"):
        _ = output.logits


def test_a_width_of_its_own_is_projected(make_model, tokens):
    model = make_model(d_embed=3)
    assert model(tokens).logits.shape == (2, 9, 11)
    assert [tuple(p.shape) for p in model.embedding.parameters()] == [(11, 3), (8, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie_first_projection": False}, "no projection to tie"),
        ({"attention_window": 0}, "attention_window=0"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0"),
        ({"position_dropout": -0.1}, "position_dropout"),
        ({"cutoffs": (2, 4), "div_val": 128}, "div_val=128 leaves nothing"),
        ({"d_embed": 0}, "d_embed=0"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        DEQTransformerConfig(**options)


def test_a_window_hides_what_is_further_back():
    mask = future_mask(3, 5, torch.device("cpu"), window=2)
    wanted = torch.tensor(
        [[True, False, False, True, True], [True, True, False, False, True],
         [True, True, True, False, False]]
    )  # fmt: skip
    assert torch.equal(mask, wanted)
    assert torch.equal(future_mask(3, 5, mask.device, 9), future_mask(3, 5, mask.device))


def test_a_window_as_wide_as_all_changes_nothing(make_model, tokens):
    wide, all_ = make_model(attention_window=9), make_model()
    torch.testing.assert_close(wide(tokens).logits, all_(tokens).logits)
    narrow = make_model(attention_window=1)
    assert not torch.allclose(narrow(tokens).logits, all_(tokens).logits)


def test_a_window_of_one_sees_no_other_token_directly(make_model, tokens):
    """With one position attended to, tokens before it have no influence at all."""
    model = make_model(attention_window=1).eval()
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 11
    torch.testing.assert_close(model(tokens).logits[:, 1:], model(other).logits[:, 1:])


def test_masked_weights_without_dropping_are_plain_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind(0)
    position, u, w = (
        torch.randn(2, 5, 4).double(),
        torch.randn(2, 4).double(),
        torch.randn(2, 4).double(),
    )
    future = future_mask(5, 5, q.device)
    plain = relative_attention(q, k, v, position, u, w, future)
    ones = torch.ones(2, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(relative_attention(q, k, v, position, u, w, future, ones), plain)
    assert (relative_attention(q, k, v, position, u, w, future, 0 * ones) == 0).all()


@pytest.mark.parametrize("name", ["attention_dropout", "position_dropout"])
def test_dropouts_of_attention_act_in_training_alone(name, make_model, tokens):
    model, plain = make_model(**{name: 0.5}), make_model()
    first, second = model(tokens), model(tokens)
    assert first.solution.converged.all()
    assert not torch.allclose(first.logits, second.logits)
    torch.testing.assert_close(model.eval()(tokens).logits, plain.eval()(tokens).logits)


def test_checkpoints_of_models_without_these_options_still_fit(make_model):
    model = make_model()
    assert {"embedding.weight", "output_bias"} <= set(model.state_dict())
    config = replace(model.config, dropout=0.1)
    assert config == DEQTransformerConfig(**{**vars(model.config), "dropout": 0.1})
