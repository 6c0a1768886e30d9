"""LSTM and GRU: causal, with a state across segments, of the size they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import UserError
from equilibria.models.config import unrolled_settings
from equilibria.models.recurrent import Recurrent, RecurrentConfig

VOCABULARY = 11
UNITS = pytest.mark.parametrize("unit", ["lstm", "gru"])


def _model(unit: str, **options: Any) -> Recurrent:
    torch.manual_seed(0)
    config = RecurrentConfig(unit=unit, **{"d_embedding": 5, "d_hidden": 7, **options})  # pyright: ignore[reportArgumentType]
    return config.build(VOCABULARY).double().eval()


@pytest.fixture
def tokens() -> Tensor:
    """Ids (2, 12)."""
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@UNITS
def test_no_logit_depends_on_a_later_token(tokens: Tensor, unit: str) -> None:
    model = _model(unit, num_layers=2)
    reference = model(tokens).logits
    for t in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 3) % VOCABULARY
        change = (model(other).logits - reference).abs()
        assert torch.equal(change[:, :t], torch.zeros_like(change[:, :t]))
        assert change[:, t].amax(dim=1).min() > 1e-6


@UNITS
@pytest.mark.parametrize("num_layers", [1, 2])
def test_segments_with_memory_equal_the_whole_text(
    tokens: Tensor, unit: str, num_layers: int
) -> None:
    model = _model(unit, num_layers=num_layers)
    whole = model(tokens).logits
    memory, parts = None, []
    for segment in tokens.split([5, 1, 6], dim=1):
        output = model(segment, memory, memory_length=1)
        assert not any(tensor.requires_grad for tensor in output.memory)
        memory = model.memory_from(output.memory)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    assert model(tokens).memory == ()


def test_number_of_parameters() -> None:
    """g gates of D E + D^2 + 2 D, V E to read and V D + V to write."""
    lstm = RecurrentConfig(unit="lstm", d_embedding=10, d_hidden=52).build(10)
    gru = RecurrentConfig(unit="gru", d_embedding=10, d_hidden=61).build(10)
    assert lstm.num_parameters() == 4 * (520 + 52**2 + 104) + 100 + 530 == 13942
    assert gru.num_parameters() == 3 * (610 + 61**2 + 122) + 100 + 620 == 14079
    assert lstm.num_parameters(embedding=False) == 13942 - 100


def test_an_lstm_begins_by_remembering() -> None:
    model = _model("lstm", forget_bias=2.5, num_layers=2)
    for layer in (0, 1):
        biases = [getattr(model.layers, f"bias_{kind}_l{layer}") for kind in ("ih", "hh")]
        assert torch.equal(sum(biases)[7:14], torch.full((7,), 2.5, dtype=torch.float64))
        assert (sum(biases)[:7] != 2.5).all()


@UNITS
def test_dropout_only_in_training(tokens: Tensor, unit: str) -> None:
    model = _model(unit, dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@UNITS
def test_a_foreign_memory_is_refused(unit: str) -> None:
    with pytest.raises(UserError, match="the saved memory has shapes.*belongs to another model"):
        _model(unit).memory_from([torch.zeros(2, 1, 8)])


@UNITS
def test_there_is_nothing_to_unroll(tokens: Tensor, unit: str) -> None:
    assert _model(unit)(tokens).solution is None
    with pytest.raises(UserError, match="Recurrent is an explicit model: it has no equilibrium"):
        _model(unit)(tokens, settings=unrolled_settings(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "rnn"}, "unit='rnn' is neither 'lstm' nor 'gru'"),
        ({"unit": "gru", "d_embedding": 0}, "d_embedding=0 must be"),
        ({"unit": "gru", "d_hidden": 0}, "d_hidden=0 must be"),
        ({"unit": "gru", "num_layers": 0}, "num_layers=0 must be"),
        ({"unit": "gru", "dropout": -0.1}, "dropout=-0.1 must be"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _model(**options)
