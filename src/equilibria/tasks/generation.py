"""Sampling from a language model: prompts are read once, then token after token.

Shape suffixes: B texts that still go on, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.tasks.language_modeling import LanguageModel
from equilibria.tasks.task import SolveFigures

_MAX_SEED = 2**63


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    num_tokens: int = 200
    """Tokens to generate after the prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens only; None: among all."""
    top_p: float | None = None
    """Draw among as few of the most likely tokens as have this probability together, after
    temperature and top_k; None: among all."""
    seed: int = 0
    """Seed of the draws of the first text; every further one has the next."""

    def __post_init__(self) -> None:
        check_positive_integer("num_tokens", self.num_tokens)
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None:
            check_positive_integer("top_k", self.top_k)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"top_p={self.top_p} must be above 0 and at most 1; leave it out to draw among all"
            )
        if not 0 <= self.seed < _MAX_SEED:
            raise UserError(f"seed={self.seed} must be between 0 and 2**63 - 1")


class Cache(Protocol):
    """What a model keeps of the texts that it has read."""

    def select(self, rows: Tensor) -> Any: ...


class Prediction(Protocol):
    """Logits (B, V) of the next token, and what the model keeps."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def cache(self) -> Any: ...
    @property
    def solution(self) -> Solution | None: ...


@runtime_checkable
class Reader(Protocol):
    """A model that goes on with a text without reading it again: equilibria.models.decoding."""

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction: ...
    def step(self, tokens: Tensor, cache: Any) -> Prediction: ...
    def join(self, caches: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Generated:
    """Texts that went on, and what that took."""

    tokens: tuple[Tensor, ...]
    """New ids of every prompt, (num_tokens,) or fewer where a text stopped."""
    solves: tuple[SolveFigures, ...]
    """Of every token; empty of an explicit model."""


def generate(
    model: LanguageModel, prompt: Tensor, memory_length: int, sampling: SamplingConfig
) -> Tensor:
    """Continue a prompt (T,) of token ids and return the new ids (num_tokens,).

    See `generate_batch`.
    """
    return generate_batch(model, [prompt], memory_length, sampling).tokens[0]


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    memory_length: int,
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int] | None = None,
    stop: int | None = None,
) -> Generated:
    """Continue prompts (T_i,) of token ids, which may differ in length.

    Prompts are read once, those of one length together; each new token is then an equilibrium of
    one position that attends to the keys and values of what came before. By causality that is the
    equilibrium of the whole text as long as it fits into the memory.

    Every text has its own random numbers: with one seed it is the same alone and in any batch, up
    to the rounding of matrix products of other sizes.

    Args:
        model: of `equilibria.models`, or any other that can be called as one; the latter is
            called with a memory, prompts of one length at a time.
        prompts: at least one, each of at least one token; of longer ones the last `memory_length`
            are read.
        memory_length: positions to attend to besides a token's own.
        sampling: how tokens are drawn.
        seeds: of the draws of each text; None for `sampling.seed` and those after it.
        stop: the id after which a text ends; it is its last token.

    Raises:
        UserError: no prompt or an empty one, no memory to carry the context, other than one seed
            per prompt.
    """
    _check(prompts, memory_length)
    generators = _generators(seeds, sampling.seed, len(prompts))
    module = cast(nn.Module, model)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return _generate(model, prompts, memory_length, sampling, generators, stop)
    finally:
        module.train(was_training)


def _generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    memory_length: int,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    stop: int | None,
) -> Generated:
    reader = model if isinstance(model, Reader) else _ByMemory(model)
    device = next(cast(nn.Module, model).parameters()).device
    texts = [_Text(generator, []) for generator in generators]
    figures: list[SolveFigures] = []
    for batch in _batches(reader, prompts, memory_length, device):
        figures += _go_on(reader, batch, texts, sampling, stop)
    return Generated(tuple(torch.stack(text.new) for text in texts), tuple(figures))


class _Text(NamedTuple):
    """One text that goes on."""

    generator: torch.Generator
    new: list[Tensor]


class _Batch(NamedTuple):
    """Texts (B,) that go on together, by their numbers, after their prompts have been read."""

    numbers: list[int]
    logits: Tensor
    cache: Cache
    solutions: list[Solution]


def _batches(
    reader: Reader | _ByMemory, prompts: Sequence[Tensor], memory_length: int, device: torch.device
) -> list[_Batch]:
    """Read prompts, those of one length together; one batch of all where the reader can join."""
    read: list[_Batch] = []
    for numbers in _by_length([min(len(prompt), memory_length) for prompt in prompts]).values():
        tokens = torch.stack([prompts[number][-memory_length:] for number in numbers]).to(device)
        prediction = reader.prefill(tokens, memory_length)
        solutions = [] if prediction.solution is None else [prediction.solution]
        read.append(_Batch(numbers, prediction.logits, prediction.cache, solutions))
    if len(read) == 1 or isinstance(reader, _ByMemory):
        return read
    joined = _Batch(
        [number for batch in read for number in batch.numbers],
        torch.cat([batch.logits for batch in read]),
        reader.join([batch.cache for batch in read]),
        [solution for batch in read for solution in batch.solutions],
    )
    return [joined]


def _go_on(
    reader: Reader | _ByMemory,
    batch: _Batch,
    texts: Sequence[_Text],
    sampling: SamplingConfig,
    stop: int | None,
) -> list[SolveFigures]:
    """Draw and read token after token until every text has enough or has stopped."""
    numbers, logits, cache, solutions = batch
    figures = [SolveFigures.of(solution) for solution in solutions]
    for place in range(sampling.num_tokens):
        drawn = [
            _draw(row, sampling, texts[number].generator)
            for row, number in zip(logits.double().cpu(), numbers, strict=True)
        ]
        for token, number in zip(drawn, numbers, strict=True):
            texts[number].new.append(token)
        going = [i for i, token in enumerate(drawn) if stop is None or int(token) != stop]
        if not going or place == sampling.num_tokens - 1:
            break
        if len(going) < len(numbers):
            cache = cache.select(torch.tensor(going, device=logits.device))
            numbers = [numbers[i] for i in going]
        tokens = torch.stack([drawn[i] for i in going]).to(logits.device)
        logits, cache, solution = _parts(reader.step(tokens, cast(Any, cache)))
        if solution is not None:
            figures.append(SolveFigures.of(solution))
    return figures


def _parts(prediction: Prediction) -> tuple[Tensor, Cache, Solution | None]:
    return prediction.logits, prediction.cache, prediction.solution


class _Remembered(NamedTuple):
    """The memory of a model as a cache."""

    model: LanguageModel
    memory: Any
    memory_length: int

    def select(self, rows: Tensor) -> _Remembered:
        """Of some texts only."""
        memory = self.model.memory_from([tensor[rows] for tensor in self.memory])
        return self._replace(memory=memory)


class _Answer(NamedTuple):
    """What a model without a cache of its own says."""

    logits: Tensor
    cache: _Remembered
    solution: Solution | None


class _ByMemory:
    """Reads with any language model: every token is a segment with the memory of those before.

    It cannot join: memories of different lengths have no common form.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    def prefill(self, tokens: Tensor, memory_length: int) -> _Answer:
        """Read prompts (B, L)."""
        return self._read(tokens, _Remembered(self._model, None, memory_length))

    def step(self, tokens: Tensor, cache: _Remembered) -> _Answer:
        """Read one more token of every text (B,)."""
        return self._read(tokens.unsqueeze(1), cache)

    def _read(self, tokens: Tensor, cache: _Remembered) -> _Answer:
        output = self._model(tokens, cache.memory, memory_length=cache.memory_length)
        kept = cache._replace(memory=output.memory)
        return _Answer(output.logits[:, -1], kept, getattr(output, "solution", None))


def _check(prompts: Sequence[Tensor], memory_length: int) -> None:
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    if not all(prompt.numel() for prompt in prompts):
        raise UserError("the prompt is empty; give at least one character to continue from")
    if memory_length < 1:
        raise UserError(
            f"a memory of {memory_length} positions cannot carry the text from one token to the "
            "next; give --mem-len of at least 1"
        )


def _generators(seeds: Sequence[int] | None, first: int, count: int) -> list[torch.Generator]:
    """Random numbers of every text."""
    if seeds is None:
        seeds = [(first + i) % _MAX_SEED for i in range(count)]
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} prompts; give one for each, or none")
    for seed in seeds:
        if not 0 <= seed < _MAX_SEED:
            raise UserError(f"a seed of {seed} must be between 0 and 2**63 - 1")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _by_length(lengths: Sequence[int]) -> Mapping[int, list[int]]:
    """Numbers of the prompts of each length."""
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    return groups


def _draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draw one id () from logits (V,)."""
    if sampling.temperature == 0.0:
        return logits.argmax()
    # The largest becomes 0 before the division, which a tiny temperature would make infinite.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p is not None:
        logits = _nucleus(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(0), 1, generator=generator)[0]


def _nucleus(logits: Tensor, share: float) -> Tensor:
    """Logits (V,) of the fewest most likely tokens that have `share` together, others -inf.

    Source: Holtzman et al., The curious case of neural text degeneration, arXiv 1904.09751,
    section 3.1.
    """
    ordered, order = logits.sort(descending=True)
    p = ordered.softmax(0)
    before = p.cumsum(0) - p  # of those that are more likely; 0 of the first, which always stays
    return torch.full_like(logits, -torch.inf).index_copy(
        0, order, ordered.masked_fill(before >= share, -torch.inf)
    )
