"""Going on token by token gives what reading the whole text anew would have given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import Anderson
from equilibria.models.config import SolveConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig

Make = Callable[[], Any]
XL: dict[str, Any] = {"d_model": 8, "num_heads": 2, "d_inner": 20, "init_std": 0.4}
TRELLIS: dict[str, Any] = {"d_embed": 4, "d_hidden": 6, "init_std": 0.4}
TIGHT = SolveConfig(solver=Anderson(), rtol=1e-12, max_steps=100)

DEQ = {
    "post-norm": {},
    "pre-norm": {"norm": "pre"},
    "no-weight-norm": {"weight_norm": False},
    "adaptive": {"cutoffs": (4, 8), "div_val": 2, "seed": 7},
    "biases": {"attention_bias": True},
    "window": {"attention_window": 4},
    "window-of-one": {"attention_window": 1},
}
OTHERS = {
    "xl-untied": TransformerXLConfig(**XL, num_layers=3),
    "xl-tied": TransformerXLConfig(**XL, num_layers=3, tied=True),
    "xl-pre-norm": TransformerXLConfig(**XL, num_layers=2, norm="pre"),
    "xl-window": TransformerXLConfig(**XL, num_layers=2, tied=True, attention_window=3),
    "deq-trellisnet": DEQTrellisNetConfig(**TRELLIS, solve=TIGHT),
    "deq-trellisnet-in-parts": DEQTrellisNetConfig(**TRELLIS, solve=TIGHT, subsequence_length=3),
    "deq-trellisnet-mixture": DEQTrellisNetConfig(**TRELLIS, solve=TIGHT, num_softmaxes=2),
    "deq-trellisnet-forgetful": DEQTrellisNetConfig(**TRELLIS, solve=TIGHT, remember_input=False),
    "deq-trellisnet-forgetful-in-parts": DEQTrellisNetConfig(
        **TRELLIS, solve=TIGHT, remember_input=False, subsequence_length=3
    ),
    "trellisnet": TrellisNetConfig(**TRELLIS, num_layers=5),
    "trellisnet-of-one-layer": TrellisNetConfig(**TRELLIS, num_layers=1),
    "lstm": RecurrentConfig(d_embedding=4, d_hidden=6, num_layers=2),
    "gru": RecurrentConfig(unit="gru", d_embedding=4, d_hidden=6),
}
TEXT = torch.randint(11, (2, 14), generator=torch.Generator().manual_seed(8))


@pytest.fixture(params=[*DEQ, *OTHERS])
def model(request: Any, make_model: Callable[..., nn.Module]) -> Any:
    if request.param in DEQ:
        return make_model(**DEQ[request.param]).eval()
    torch.manual_seed(3)
    return OTHERS[request.param].build(11).double().eval()


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def read(model: Any, text: Tensor, first: int, memory_length: int = 50) -> list[Any]:
    """Predictions after a prompt of `first` tokens, and after every further one."""
    predictions = [model.prefill(text[:, :first], memory_length)]
    for token in text[:, first:].unbind(1):
        predictions.append(model.step(token, predictions[-1].cache))
    return predictions


def logits(predictions: list[Any]) -> Tensor:
    return torch.stack([p.logits for p in predictions], 1)


@pytest.mark.parametrize("first", [1, 6])
def test_every_token_is_as_in_the_whole_text(model: Any, first: int) -> None:
    found = logits(read(model, TEXT, first))
    wanted = model(TEXT).logits[:, first - 1 :]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_texts_of_different_lengths_go_on_together(model: Any) -> None:
    alone = [read(model, TEXT[:1], 3), read(model, TEXT[1:, 2:], 7), read(model, TEXT[1:], 7)]
    prompts = [(0, 3), (2, 9), (0, 7)]
    caches = [
        model.prefill(TEXT[:1, :3], 50).cache,
        model.prefill(TEXT[1:, 2:9], 50).cache,
        model.prefill(TEXT[1:, :7], 50).cache,
    ]
    cache = model.join(caches)
    for step in range(4):
        rows = zip((0, 1, 1), prompts, strict=True)
        tokens = torch.stack([TEXT[row, end + step] for row, (_, end) in rows])
        prediction = model.step(tokens, cache)
        cache = prediction.cache
        wanted = torch.cat([one[step + 1].logits for one in alone])
        torch.testing.assert_close(prediction.logits, wanted, rtol=0, atol=1e-8)


def test_caches_that_were_joined_can_be_joined_and_taken_apart(model: Any) -> None:
    short, long = (model.prefill(TEXT[:1, :n], 50).cache for n in (2, 6))
    cache = model.join([model.join([short, long]), long]).select(torch.tensor([2, 0]))
    prediction = model.step(TEXT[0, :2], cache)
    for row, alone in enumerate((long, short)):
        wanted = model.step(TEXT[0, row : row + 1], alone).logits[0]
        torch.testing.assert_close(prediction.logits[row], wanted, rtol=0, atol=1e-8)


def test_a_step_leaves_the_cache_as_it_was(model: Any) -> None:
    cache = model.prefill(TEXT[:, :5], 50).cache
    first = model.step(TEXT[:, 5], cache).logits
    model.step(TEXT[:, 6], cache)
    assert torch.equal(model.step(TEXT[:, 5], cache).logits, first)


def test_a_window_needs_no_more_memory_than_it_sees(make_model: Callable[..., Any]) -> None:
    model = make_model(attention_window=4).eval()
    enough = read(model, TEXT, 6, memory_length=6)
    assert all(p.cache.length == 3 for p in enough)
    torch.testing.assert_close(logits(enough), model(TEXT).logits[:, 5:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_short_memory_is_that_of_segments(make_model: Callable[..., Any], norm: str) -> None:
    """What falls out of the memory is forgotten as where segments follow one another."""
    model = make_model(norm=norm).eval()
    memory, wanted = None, []
    for part in (TEXT[:, :3], *TEXT[:, 3:].split(1, 1)):
        output = model(part, memory, memory_length=3)
        wanted.append(output.logits[:, -1])
        memory = output.memory
    found = read(model, TEXT, 3, memory_length=3)
    torch.testing.assert_close(logits(found), torch.stack(wanted, 1), rtol=0, atol=1e-8)
    assert found[-1].cache.length == 3


def test_padding_that_falls_out_of_the_memory_is_forgotten(make_model: Callable[..., Any]) -> None:
    model = make_model().eval()
    caches = [model.prefill(TEXT[:1, :n], 4).cache for n in (1, 4)]
    cache = model.join(caches)
    assert cache.layers[0].num_padded.tolist() == [3, 0]
    for step in range(4):
        cache = model.step(TEXT[:, step], cache).cache
    assert cache.layers[0].num_padded.tolist() == [0, 0]
    assert cache.layers[0].length == 4


def test_logits_are_made_for_the_last_position_alone(model: Any) -> None:
    sizes: list[int] = []

    class Counting:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def log_probabilities(self, hidden: Tensor) -> Tensor:
            sizes.append(hidden[..., 0].numel())
            return self.inner.log_probabilities(hidden)

    if not hasattr(type(model), "softmax"):
        pytest.skip("its last layer is a plain linear one")
    kind = type(model)
    plain = kind.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "softmax", property(lambda self: Counting(plain.fget(self))))
        read(model, TEXT, 10)
    assert sizes == [2] * 5


def test_memory_is_projected_once(make_model: Callable[..., Any]) -> None:
    """Matrices see the positions of the prompt once, and then one position at a time."""
    model = make_model().eval()
    prediction = model.prefill(TEXT[:, :10], 50)
    seen: list[int] = []
    plain = torch.nn.functional.linear

    def linear(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x.shape[-2] if x.dim() > 1 else 1)
        return plain(x, *arguments)

    prediction = model.step(TEXT[:, 10], prediction.cache)  # room for more distances
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        model.step(TEXT[:, 11], prediction.cache)
    assert set(seen) == {1}
