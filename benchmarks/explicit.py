"""Explicit Transformers to stand beside a DEQ-Transformer block: other models, without a residual.

Weight-tied: the very block of the DEQ, applied 16 times, as many layers as the published
Transformer-XL has; the same parameters. Untied: a stack of post-norm Transformer-XL layers of the
same width and heads, as deep as equal parameters allow with feed-forward layers not narrower than
the model, at most 16; the width of the feed-forward layers then takes up what is left, so that the
numbers of parameters agree within 2%.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cells import Device, TransformerSize
from equilibria.layers.relative_attention import future_mask, relative_attention, sinusoids

DEPTH = 16

Forward = Callable[[], Tensor]
"""The output (B, L, D) for the input of the block."""


class Layer(nn.Module):
    """h = LN(z + A(z)),  LN(h + FF(h)), with relative positions: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, num_heads: int, inner: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        shape = (num_heads, width // num_heads)
        self.content_bias = nn.Parameter(torch.zeros(shape))
        self.position_bias = nn.Parameter(torch.zeros(shape))

    def forward(self, z: Tensor) -> Tensor:
        """Apply the layer."""
        length, width = z.shape[1:]
        q, k, v = (self._heads(part) for part in self.qkv(z).chunk(3, dim=-1))
        position = self.position(sinusoids(length, width, z)).unflatten(-1, (self.num_heads, -1))
        attended = relative_attention(
            q, k, v, position.transpose(0, 1), self.content_bias, self.position_bias,
            future_mask(length, length, z.device),
        )  # fmt: skip
        h = F.layer_norm(z + self.output(attended.transpose(1, 2).flatten(2)), (width,))
        return F.layer_norm(h + self.contract(F.relu(self.expand(h))), (width,))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def count(module: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def tied(
    size: TransformerSize, device: Device, depth: int = DEPTH
) -> tuple[str, nn.Module, Forward]:
    """The block of the DEQ as a stack of its own."""
    cell = size.cell().to(device)
    x = torch.randn(size.batch, size.length, size.d_model).to(device)

    def forward() -> Tensor:
        injection = cell.inject(x)
        z = cell.initial_state(injection)
        for _ in range(depth):
            z = cell(z, injection)
        return z

    return f"explicit, {depth} tied layers", cell, forward


def untied(size: TransformerSize, device: Device) -> tuple[str, nn.Module, Forward]:
    """Layers of their own, with as many parameters in all as the block of the DEQ has."""
    depth, inner = fitted(size)
    torch.manual_seed(0)
    layers = [Layer(size.d_model, size.num_heads, inner) for _ in range(depth)]
    stack = nn.Sequential(*layers).to(device)
    x = torch.randn(size.batch, size.length, size.d_model).to(device)
    return f"explicit, {depth} untied layers of {inner}", stack, lambda: stack(x)


def fitted(size: TransformerSize) -> tuple[int, int]:
    """Number of layers and width of their feed-forward layers for equal parameters."""
    width, wanted = size.d_model, count(size.cell())
    for depth in range(DEPTH, 0, -1):
        rest = wanted / depth - 5 * width * width - 3 * width  # attention and the biases
        inner = round(rest / (2 * width + 1))
        if inner >= width:
            break
    else:
        raise ValueError(f"not even one layer of width {width} fits into {wanted} parameters")
    found = depth * count(Layer(width, size.num_heads, inner))
    if abs(found - wanted) > 0.02 * wanted:
        raise ValueError(f"{found} parameters instead of {wanted}")
    return depth, inner
