"""Adaptive softmax, attention windows and the dropouts of attention in the DEQ-Transformer."""

from __future__ import annotations

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
        ({"tie_tail_projections": False}, "no clusters whose projections could be tied"),
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


def test_masks_of_attention_and_positions_are_drawn_once_per_solve(make_model, tokens):
    model = make_model(attention_dropout=0.3, position_dropout=0.3)
    seen = []
    model.cell.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    solves = []
    for _ in range(2):
        seen.clear()
        output = model(tokens)
        output.logits.sum().backward()
        assert len(seen) == output.solution.num_evals > 5
        assert all(torch.equal(one.position_HKE, seen[0].position_HKE) for one in seen)
        whole = [one for one in seen if one.qkv.shape[0] == 2]
        assert all(one.masks.weights_BHLK is whole[0].masks.weights_BHLK for one in whole)
        solves.append(seen[0])
    first, second = solves
    assert not torch.equal(first.position_HKE, second.position_HKE)
    assert not torch.equal(first.masks.weights_BHLK, second.masks.weights_BHLK)


def test_attention_dropout_keeps_the_mean():
    """Entries of the mask are 0 or 1 / (1 - p), for every sequence and head its own."""
    config = DEQTransformerConfig(d_model=8, num_heads=2, d_inner=8, attention_dropout=0.25)
    injection = config.build(11).cell.inject(torch.randn(4, 30, 8))
    mask = injection.masks.weights_BHLK
    assert mask.shape == (4, 2, 30, 30)
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert mask.mean().item() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[:, 0], mask[:, 1])


EVERYTHING = {
    **ADAPTIVE,
    "tie_tail_projections": False,
    "dropout": 0.2,
    "attention_dropout": 0.2,
    "position_dropout": 0.2,
    "attention_window": 4,
    "attention_bias": True,
}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_some_sequences_of_a_batch_are_the_rows_of_all(norm, make_model):
    """With memory and every mask: what leaves the batch is solved as it would be in it."""
    model = make_model(norm=norm, **EVERYTHING)
    text = torch.randint(11, (5, 9), generator=torch.Generator().manual_seed(2))
    memory = model(text.flip(1), memory_length=3).memory
    injection = model.cell.inject(model.embed(text), memory)
    z = torch.randn(5, 9, 8, dtype=torch.float64)
    rows = torch.tensor([4, 1, 2])
    wanted = model.cell(z, injection)[rows]
    torch.testing.assert_close(model.cell(z[rows], model.cell.select(injection, rows)), wanted)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_with_every_option(norm, make_model, tokens):
    """Against finite differences; the seed draws the same masks again."""
    model = make_model(norm=norm, **EVERYTHING)
    with torch.no_grad():
        memory = model(tokens.flip(1), memory_length=3).memory

    def loss():
        torch.manual_seed(5)
        output = model(tokens, memory, targets=tokens.roll(-1, 1))
        return output.losses.double().mean()

    names, parameters = zip(*model.named_parameters(), strict=True)
    assert {"adaptive_softmax.tail_projections.1", "deq.cell.injection.bias"} <= set(names)
    gradients = torch.autograd.grad(loss(), parameters)
    generator, step = torch.Generator().manual_seed(3), 1e-3
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        difference = ((above - below) / (2 * step)).item()
        wanted = (gradient * direction).sum().item()
        # Losses are float32, whose rounding the difference has.
        assert difference == pytest.approx(wanted, rel=1e-3, abs=2e-4), name


def test_checkpoints_of_models_without_these_options_still_fit(make_model):
    model = make_model()
    assert {"embedding.weight", "output_bias"} <= set(model.state_dict())
