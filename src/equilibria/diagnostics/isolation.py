"""Looking at a model without changing it: no gradients, random numbers or buffers are touched."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(*modules: nn.Module) -> Generator[None]:
    """Give back what a look costs: the random state, buffers, `.grad`, training flags.

    Buffers are restored in place, so that views and optimisers keep pointing at them. Attributes
    that a module sets on itself during its forward pass are its own affair.
    """
    buffers = [(b, b.detach().clone()) for m in modules for b in m.buffers()]
    gradients = [(p, p.grad, _copy(p.grad)) for m in modules for p in m.parameters()]
    modes = [(part, part.training) for m in modules for part in m.modules()]
    devices = {t.device for m in modules for t in (*m.parameters(), *m.buffers())}
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
                for parameter, gradient, saved in gradients:
                    if gradient is not None and saved is not None:
                        gradient.copy_(saved)
                    parameter.grad = gradient
            for part, training in modes:
                part.training = training


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
