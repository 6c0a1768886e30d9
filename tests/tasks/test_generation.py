"""Sampling: the same text whether it is carried on or solved again from the start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from equilibria import UserError
from equilibria.models.deq_transformer import DEQTransformer
from equilibria.models.tcn import TCNConfig
from equilibria.tasks.generation import SamplingConfig, generate, generate_batch

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
        return _Output(self.logits.expand(*tokens.shape, -1), (tokens,))

    def memory_from(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors)


def _generate(model: Any, memory_length: int = 50, **options: Any) -> list[int]:
    return generate(model, PROMPT, memory_length, SamplingConfig(**options)).tolist()


def _resolving(model: DEQTransformer, num_tokens: int) -> list[int]:
    """Greedy decoding that solves the whole text anew for every token."""
    text = PROMPT
    with torch.no_grad():
        for _ in range(num_tokens):
            output = model.eval()(text.unsqueeze(0))
            assert output.solution.converged.all()
            text = torch.cat((text, output.logits[0, -1].argmax().view(1)))
    return text[len(PROMPT) :].tolist()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_text_is_that_of_solving_it_whole(make_model: ModelFactory, norm: str) -> None:
    model = make_model(norm=norm)
    expected = _resolving(model, 12)
    assert _generate(model, num_tokens=12, temperature=0.0) == expected
    assert len(set(expected)) > 1  # not a text that any model would give


def test_a_short_memory_forgets(make_model: ModelFactory) -> None:
    model = make_model()
    seen: list[int] = []
    step = model.step

    def watched(tokens: Tensor, cache: Any) -> Any:
        prediction = step(tokens, cache)
        seen.append(prediction.cache.length)
        return prediction

    model.step = watched
    assert len(_generate(model, memory_length=3, num_tokens=6)) == 6
    assert seen == [3] * 5  # the last token needs not be read


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


def test_top_p_draws_among_the_fewest_that_have_it() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    model = _Fixed(probabilities)

    def drawn(**options: Any) -> set[int]:
        return set(_generate(model, num_tokens=150, temperature=1.0, **options))

    assert drawn(top_p=0.49) == {1}
    assert drawn(top_p=1e-9) == {1}
    assert drawn(top_p=0.6) == {1, 3}
    assert drawn(top_p=0.8) == {1, 2, 3}
    assert drawn(top_p=1.0) == {0, 1, 2, 3}
    assert drawn(top_k=2, top_p=0.8) == {1, 3}  # of the two, 0.67 and 0.33


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
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 must be"),
        ({"top_p": float("nan")}, "top_p=nan must be"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be between 0 and"),
    ],
)
def test_impossible_sampling_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig(**options)


PROMPTS = [PROMPT, PROMPT[:2], torch.tensor([9, 2, 6, 5, 3]), PROMPT[1:3]]


@pytest.fixture(params=["equilibrium", "memory"])
def any_model(request: Any, make_model: ModelFactory) -> Any:
    """One with a cache of its own, and one that is called with a memory."""
    if request.param == "equilibrium":
        return make_model()
    torch.manual_seed(0)
    return TCNConfig(d_model=4, num_blocks=2, kernel_size=2, init_std=0.5).build(11).double()


def test_a_text_is_the_same_alone_and_in_any_batch(any_model: Any) -> None:
    sampling = SamplingConfig(num_tokens=12, temperature=1.5, top_p=0.9)

    def texts(numbers: list[int]) -> list[list[int]]:
        prompts, seeds = [PROMPTS[n] for n in numbers], [70 + n for n in numbers]
        generated = generate_batch(any_model, prompts, 50, sampling, seeds=seeds)
        return [new.tolist() for new in generated.tokens]

    together = texts([0, 1, 2, 3])
    assert texts([3, 0]) == [together[3], together[0]]
    assert [texts([n])[0] for n in range(4)] == together
    assert len({tuple(text) for text in together}) == 4


def test_seeds_count_up_from_the_first(make_model: ModelFactory) -> None:
    sampling = SamplingConfig(num_tokens=8, temperature=1.5, seed=2**63 - 1)
    model = make_model()
    counted = generate_batch(model, [PROMPT, PROMPT], 50, sampling).tokens
    given = generate_batch(model, [PROMPT, PROMPT], 50, sampling, seeds=[2**63 - 1, 0]).tokens
    assert [t.tolist() for t in counted] == [t.tolist() for t in given]
    assert counted[0].tolist() == generate(model, PROMPT, 50, sampling).tolist()


def test_a_text_ends_with_its_stop_token(any_model: Any) -> None:
    sampling = SamplingConfig(num_tokens=12, temperature=1.5)
    whole = [t.tolist() for t in generate_batch(any_model, PROMPTS, 50, sampling).tokens]
    stop = whole[0][3]
    ended = [t.tolist() for t in generate_batch(any_model, PROMPTS, 50, sampling, stop=stop).tokens]
    cut = [text[: text.index(stop) + 1] if stop in text else text for text in whole]
    assert ended == cut
    assert len({len(text) for text in ended}) > 1


def test_every_solve_is_reported(make_model: ModelFactory) -> None:
    sampling = SamplingConfig(num_tokens=5)
    generated = generate_batch(make_model(), PROMPTS, 50, sampling)
    # Two lengths of prompts, then four tokens of all; the fifth is not read.
    assert [len(s.num_steps) for s in generated.solves] == [2, 2, 4, 4, 4, 4]
    assert all((s.relative_residual < 1e-9).all() for s in generated.solves)
    assert generate_batch(_Fixed([0.0, 1.0]), PROMPTS[:1], 50, sampling).solves == ()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt; give at least one"),
        ([PROMPT, PROMPT[:0]], {}, "prompt is empty"),
        ([PROMPT, PROMPT], {"seeds": [1]}, "1 seeds for 2 prompts; give one for each, or none"),
        ([PROMPT], {"seeds": [-1]}, "a seed of -1 must be between"),
    ],
)
def test_an_impossible_batch_is_refused(
    prompts: list[Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate_batch(_Fixed([0.0]), prompts, 5, SamplingConfig(), **options)
