"""The maps whose training steps are timed: a tiny one, two published blocks, and a wide one.

All take and return one flat state (B, D), so that every library runs the same f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.models.deq_transformer import DEQTransformerCell, DEQTransformerConfig

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """A module, the map it makes of an input, and the shape of the state."""

    about: str
    module: nn.Module
    prepare: Callable[[], Map]
    z0: Tensor


def tiny() -> Work:
    """tanh(W z + U x), 64 units, batch 32: all dispatch, no arithmetic."""
    torch.manual_seed(0)
    hidden, inputs = nn.Linear(64, 64), nn.Linear(32, 64)
    nn.init.orthogonal_(hidden.weight, gain=0.9)
    x = torch.randn(32, 32)

    def prepare() -> Map:
        injection = inputs(x)
        return lambda z: torch.tanh(hidden(z) + injection)

    return Work("tanh, 32 x 64", nn.ModuleList([hidden, inputs]), prepare, torch.zeros(32, 64))


def transformer(d_model: int, num_heads: int, d_inner: int, length: int, batch: int) -> Work:
    """A DEQ-Transformer block without memory, made as well-behaved as a trained one by hand.

    Weights of 0.6 / sqrt(width), those of the injection four times that: about 30 evaluations to
    1e-4. At the small initial weights the block changes its state so little per evaluation,
    beside the layer norms, that no solver gets there soon.
    """
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        d_model=d_model, num_heads=num_heads, d_inner=d_inner, dropout=0.0, weight_norm=False
    )
    cell = DEQTransformerCell(config)
    for name, parameter in cell.named_parameters():
        gain = 2.4 if name.startswith("injection") else 0.6
        nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
    x = torch.randn(batch, length, d_model)

    def prepare() -> Map:
        injection = cell.inject(x)
        return lambda z: cell(z.view_as(x), injection).flatten(1)

    z0 = torch.zeros(batch, length * d_model)
    about = f"DEQ-Transformer block {d_model} / {d_inner}, {batch} x {length} tokens"
    return Work(about, cell, prepare, z0)


class MultiscaleBlock(nn.Module):
    """Two resolutions as in the published CIFAR model: residual blocks, full fusion, group norms.

    Shape: state (B, 24 * 32 * 32 + 24 * 16 * 16) = (B, 30720); injection (B, 24, 32, 32).
    """

    def __init__(self, channels: int = 24, expansion: int = 5, size: int = 32) -> None:
        super().__init__()
        self.channels, self.sizes = channels, (size, size // 2)
        wide = channels * expansion
        self.expand = nn.ModuleList(
            nn.Conv2d(channels, wide, 3, padding=1, bias=False) for _ in self.sizes
        )
        self.reduce = nn.ModuleList(
            nn.Conv2d(wide, channels, 3, padding=1, bias=False) for _ in self.sizes
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.GroupNorm(8, width) for width in (wide, channels, channels, channels))
            for _ in self.sizes
        )
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.up = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in self.sizes)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        """One evaluation."""
        high, low = self.sizes
        split = self.channels * high * high
        states = (
            z[:, :split].unflatten(1, (-1, high, high)),
            z[:, split:].unflatten(1, (-1, low, low)),
        )
        blocks = [
            self._block(i, state, injection if i == 0 else None) for i, state in enumerate(states)
        ]
        fused = (
            blocks[0] + F.interpolate(self.up(blocks[1]), scale_factor=2),
            blocks[1] + self.down(blocks[0]),
        )
        images = [
            norms[3](last(F.relu(x)))
            for norms, last, x in zip(self.norms, self.last, fused, strict=True)
        ]
        return torch.cat([image.flatten(1) for image in images], 1)

    def _block(self, index: int, z: Tensor, injection: Tensor | None) -> Tensor:
        norms = self.norms[index]
        inner = self.reduce[index](F.relu(norms[0](self.expand[index](z))))
        if injection is not None:
            inner = inner + injection
        return norms[2](F.relu(norms[1](inner) + z))


def multiscale(batch: int = 8) -> Work:
    """An MDEQ block on CIFAR shapes, made a contraction by hand and not by training.

    At initial weights the published block is none, and no solver gets anywhere. An injection of
    five times the usual size, four times the weight on the path to the low resolution (which gets
    no injection of its own) and half the last norm's gain give the 20 to 40 evaluations to 1e-4
    that trained models take.
    """
    torch.manual_seed(0)
    block = MultiscaleBlock()
    with torch.no_grad():
        block.down.weight.mul_(4.0)
        for norms in block.norms:
            norms[3].weight.fill_(0.5)
    x = 5.0 * torch.randn(batch, 24, 32, 32)
    gain = nn.Parameter(torch.ones(24, 1, 1))

    def prepare() -> Map:
        injection = gain * x
        return lambda z: block(z, injection)

    z0 = torch.zeros(batch, 24 * 32 * 32 + 24 * 16 * 16)
    module = nn.ModuleDict({"block": block, "gain": nn.ParameterList([gain])})
    return Work(f"MDEQ block, {batch} x 30720", module, prepare, z0)


WORKS: dict[str, Callable[[], Work]] = {
    "tiny": tiny,
    "small transformer": lambda: transformer(128, 4, 512, 64, 8),
    "multiscale": multiscale,
    "wide transformer": lambda: transformer(700, 10, 48000, 32, 1),
}
