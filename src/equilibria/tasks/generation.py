"""Sampling from a language model, one token and one equilibrium at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.tasks.language_modeling import LanguageModel


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    num_tokens: int = 200
    """Tokens to generate after the prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw among the k most likely tokens only; None: among all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_positive_integer("num_tokens", self.num_tokens)
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a number of at least 0")
        if self.top_k is not None:
            check_positive_integer("top_k", self.top_k)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be between 0 and 2**63 - 1")


def generate(
    model: LanguageModel, prompt: Tensor, memory_length: int, sampling: SamplingConfig
) -> Tensor:
    """Continue a prompt (T,) of token ids and return the new ids (num_tokens,).

    The prompt is solved as one segment; each new token is then a segment of length one whose
    memory is the equilibrium of what came before. By causality that is the equilibrium of the
    whole text as long as it fits into the memory.

    Raises:
        UserError: an empty prompt, or no memory to carry the context.
    """
    if prompt.numel() == 0:
        raise UserError("the prompt is empty; give at least one character to continue from")
    if memory_length < 1:
        raise UserError(
            f"a memory of {memory_length} positions cannot carry the text from one token to the "
            "next; give --mem-len of at least 1"
        )
    module = cast(nn.Module, model)
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = prompt[-memory_length:].to(device).unsqueeze(0)
    memory, new = None, []
    try:
        with torch.no_grad():
            for _ in range(sampling.num_tokens):
                output = model(tokens, memory, memory_length=memory_length)
                memory = output.memory
                token = _draw(output.logits[0, -1].double().cpu(), sampling, generator)
                new.append(token)
                tokens = token.view(1, 1).to(device)
    finally:
        module.train(was_training)
    return torch.stack(new)


def _draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draw one id () from logits (V,)."""
    if sampling.temperature == 0.0:
        return logits.argmax()
    # The largest becomes 0 before the division, which a tiny temperature would make infinite.
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial(logits.softmax(0), 1, generator=generator)[0]
