"""Sampling: the same text whether it is carried in memory or solved again from the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from equilibria import UserError
from equilibria.models.deq_transformer import DEQTransformer
from equilibria.tasks.generation import SamplingConfig, generate

ModelFactory = Callable[..., DEQTransformer]
PROMPT = torch.tensor([3, 1, 4, 1, 5])


class _Output(NamedTuple):
    logits: Tensor
    memory: tuple[Tensor, ...]


class _Fixed(nn.Module):
    """Always the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.seen: list[tuple[list[int], int]] = []

    def forward(self, tokens: Tensor, memory: Any = None, *, memory_length: int = 0) -> _Output:
        self.seen.append((tokens[0].tolist(), memory_length))
        return _Output(self.logits.expand(1, tokens.shape[1], -1), ())


def _generate(model: Any, memory_length: int = 50, **options: Any) -> list[int]:
    return generate(model, PROMPT, memory_length, SamplingConfig(**options)).tolist()


def _resolving(model: DEQTransformer, num_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy decoding that solves the whole text anew for every token."""
    text, logits = PROMPT, []
    with torch.no_grad():
        for _ in range(num_tokens):
            output = model.eval()(text.unsqueeze(0))
            assert output.solution.converged.all()
            logits.append(output.logits[0, -1])
            text = torch.cat((text, logits[-1].argmax().view(1)))
    return text[len(PROMPT) :].tolist(), torch.stack(logits)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_memory_gives_the_text_of_solving_it_whole(make_model: ModelFactory, norm: str) -> None:
    model = make_model(norm=norm)
    expected, logits = _resolving(model, 12)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _m, _a, output: seen.append(output.logits[0, -1]))
    assert _generate(model, num_tokens=12, temperature=0.0) == expected
    torch.testing.assert_close(torch.stack(seen), logits, rtol=0, atol=1e-9)
    assert len(set(expected)) > 1  # not a text that any model would give


def test_a_short_memory_forgets(make_model: ModelFactory) -> None:
    model = make_model()
    seen: list[int] = []
    model.register_forward_hook(lambda _m, _a, output: seen.append(output.memory.length))
    assert len(_generate(model, memory_length=3, num_tokens=6)) == 6
    assert seen == [3] * 6


def test_prompt_is_one_segment_and_each_token_another() -> None:
    model = _Fixed([0.0, 5.0, 0.0])
    _generate(model, memory_length=4, num_tokens=3, temperature=0.0)
    assert model.seen == [([1, 4, 1, 5], 4), ([1], 4), ([1], 4)]


def test_greedy_takes_the_most_likely() -> None:
    model = _Fixed([0.0, 1.0, 3.0, 2.0])
    assert _generate(model, num_tokens=5, temperature=0.0) == [2] * 5
    assert _generate(model, num_tokens=5, temperature=0.0, top_k=3, seed=8) == [2] * 5
    assert _generate(model, num_tokens=5, top_k=1) == [2] * 5


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    model = _Fixed([0.0, -1000.0, 3.0, 2.9])
    assert _generate(model, num_tokens=5, temperature=temperature) == [2] * 5


def test_top_k_draws_among_the_k_most_likely() -> None:
    model = _Fixed([1.0, 0.9, 0.8, 0.7])
    assert set(_generate(model, num_tokens=60, temperature=1.0, top_k=2)) == {0, 1}
    assert set(_generate(model, num_tokens=200, temperature=1.0, top_k=99)) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0]
    n = 2000
    drawn = _generate(_Fixed(logits), num_tokens=n, temperature=temperature)
    for token, p in enumerate((torch.tensor(logits) / temperature).softmax(0).tolist()):
        assert abs(drawn.count(token) / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5


def test_the_seed_decides_and_global_random_numbers_do_not() -> None:
    model = _Fixed([0.0] * 10)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _generate(model, num_tokens=20, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert _generate(model, num_tokens=20, seed=5) == first
    assert _generate(model, num_tokens=20, seed=6) != first


def test_a_prefix_does_not_depend_on_how_much_follows() -> None:
    model = _Fixed([0.0] * 10)
    assert _generate(model, num_tokens=30)[:7] == _generate(model, num_tokens=7)


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_evaluation_and_leaves_the_mode(
    make_model: ModelFactory, training: bool
) -> None:
    model = make_model(dropout=0.5, embedding_dropout=0.5).train(training)
    before = torch.get_rng_state()
    first = _generate(model, num_tokens=8, temperature=0.0)
    assert first == _generate(model, num_tokens=8, temperature=0.0)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)


def test_an_empty_prompt_is_refused(make_model: ModelFactory) -> None:
    with pytest.raises(UserError, match="prompt is empty; give at least one character"):
        generate(make_model(), PROMPT[:0], 5, SamplingConfig())


@pytest.mark.parametrize("memory_length", [0, -3])
def test_generation_needs_a_memory(make_model: ModelFactory, memory_length: int) -> None:
    with pytest.raises(UserError, match=f"memory of {memory_length} positions cannot carry"):
        generate(make_model(), PROMPT, memory_length, SamplingConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be an integer of at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"top_k": 0}, "top_k=0 must be an integer of at least 1"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be between 0 and"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)
