"""The maps whose training steps are timed: a tiny one, two published blocks, and a wide one.

All take and return one flat state (B, D), so that every library runs the same f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.models.deq_transformer import (
    DEQTransformerCell,
    DEQTransformerConfig,
    Memory,
)

Map = Callable[[Tensor], Tensor]
Device = torch.device | str


@dataclass(frozen=True)
class Work:
    """A module, the map it makes of an input, and the shape of the state."""

    about: str
    module: nn.Module
    prepare: Callable[[], Map]
    z0: Tensor


def tanh(
    batch: int = 32,
    *,
    compiled: bool = False,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Work:
    """tanh(W z + U x), 64 units: all dispatch, no arithmetic."""
    torch.manual_seed(0)
    hidden, inputs = nn.Linear(64, 64), nn.Linear(32, 64)
    nn.init.orthogonal_(hidden.weight, gain=0.9)
    module = nn.ModuleList([hidden, inputs]).to(device, dtype)
    x = torch.randn(batch, 32).to(device, dtype)

    def evaluate(z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(hidden(z) + injection)

    call = torch.compile(evaluate) if compiled else evaluate

    def prepare() -> Map:
        injection = inputs(x)
        return lambda z: call(z, injection)

    about = f"tanh, {batch} x 64{', compiled' if compiled else ''}"
    return Work(about, module, prepare, x.new_zeros(batch, 64))


@dataclass(frozen=True)
class TransformerSize:
    """A DEQ-Transformer block and what is given to it."""

    d_model: int
    num_heads: int
    d_inner: int
    length: int
    batch: int
    memory: int = 0
    """Positions before the segment that are attended to."""

    @property
    def about(self) -> str:
        """In one line."""
        memory = f" after {self.memory}" if self.memory else ""
        return (
            f"DEQ-Transformer block {self.d_model} / {self.d_inner}, "
            f"{self.batch} x {self.length} tokens{memory}"
        )

    def cell(self) -> DEQTransformerCell:
        """The block, made as well-behaved as a trained one by hand.

        Weights of 0.6 / sqrt(width), those of the injection four times that: about 30 evaluations
        to 1e-4. At the small initial weights the block changes its state so little per evaluation,
        beside the layer norms, that no solver gets there soon.
        """
        torch.manual_seed(0)
        config = DEQTransformerConfig(
            d_model=self.d_model, num_heads=self.num_heads, d_inner=self.d_inner,
            dropout=0.0, weight_norm=False,
        )  # fmt: skip
        cell = DEQTransformerCell(config)
        for name, parameter in cell.named_parameters():
            gain = 2.4 if name.startswith("injection") else 0.6
            nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
        return cell


def transformer(
    size: TransformerSize,
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    scale: Tensor | None = None,
) -> Work:
    """A DEQ-Transformer block and its input.

    Args:
        size: of the block and its input.
        device: where to.
        dtype: of weights and state.
        autocast: what f computes in, if not in `dtype`. The large weights are cast once per solve,
            for every library alike.
        scale: of the input of every sample (B,).
    """
    cell = size.cell().to(device, dtype)
    draw = (torch.randn(size.batch, length, size.d_model) for length in (size.length, size.memory))
    x, past = (drawn.to(device, dtype) for drawn in draw)
    if scale is not None:
        x = x * scale.to(device, dtype)[:, None, None]

    def prepare() -> Map:
        memory = None
        if size.memory:
            memory = Memory(torch.tanh(past), cell.injection(past)[..., size.d_model :])
        injection = cell.inject(x, memory)
        if autocast is None:
            return lambda z: cell(z.view_as(x), injection).flatten(1)
        weights = type(injection.weights)(*(w.to(autocast) for w in injection.weights))
        narrow = injection._replace(weights=weights)

        def f(z: Tensor) -> Tensor:
            with torch.autocast(x.device.type, autocast):
                image = cell(z.view_as(x), narrow)
            return image.to(z.dtype).flatten(1)

        return f

    z0 = x.new_zeros(size.batch, size.length * size.d_model)
    return Work(size.about, cell, prepare, z0)


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


def multiscale(
    batch: int = 4,
    *,
    channels: int = 24,
    size: int = 32,
    compiled: bool = False,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Work:
    """An MDEQ block on CIFAR shapes, made a contraction by hand and not by training.

    At initial weights the published block is none, and no solver gets anywhere. An injection of
    five times the usual size, four times the weight on the path to the low resolution (which gets
    no injection of its own) and half the last norm's gain give the 20 to 40 evaluations to 1e-4
    that trained models take.
    """
    torch.manual_seed(0)
    block = MultiscaleBlock(channels, size=size)
    with torch.no_grad():
        block.down.weight.mul_(4.0)
        for norms in block.norms:
            norms[3].weight.fill_(0.5)
    x = (5.0 * torch.randn(batch, channels, size, size)).to(device, dtype)
    gain = nn.Parameter(torch.ones(channels, 1, 1))
    module = nn.ModuleDict({"block": block, "gain": nn.ParameterList([gain])}).to(device, dtype)
    (gain,) = module["gain"]
    if compiled:
        block.compile()

    def prepare() -> Map:
        injection = gain * x
        return lambda z: block(z, injection)

    z0 = x.new_zeros(batch, channels * (size**2 + (size // 2) ** 2))
    about = f"MDEQ block, {batch} x {z0.shape[1]}{', compiled' if compiled else ''}"
    return Work(about, module, prepare, z0)


SIZES = {
    "small transformer": TransformerSize(128, 4, 512, length=64, batch=8),
    "wide transformer": TransformerSize(700, 10, 48000, length=32, batch=1),
}
TINY_SIZES = {
    "small transformer": TransformerSize(16, 2, 32, length=8, batch=2),
    "wide transformer": TransformerSize(16, 2, 64, length=4, batch=1),
}
NAMES = ("tiny", "small transformer", "multiscale", "wide transformer")


def build(
    name: str, *, tiny: bool = False, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> Work:
    """One of `NAMES`; in a dry run as small as it can be."""
    if name == "tiny":
        return tanh(4 if tiny else 32, device=device, dtype=dtype)
    if name == "multiscale":
        sizes = {"batch": 1, "channels": 8, "size": 4} if tiny else {}
        return multiscale(**sizes, device=device, dtype=dtype)
    return transformer((TINY_SIZES if tiny else SIZES)[name], device=device, dtype=dtype)
