"""What does a history in bfloat16 cost in evaluations, and what does it save in time?

Anderson type II with ten differences, restated here with a history of its own dtype: differences
are taken in float32 and rounded when they are kept; inner products are of what was kept, so that
the small system fits the differences that are mixed. Counted are evaluations to a relative residual
of 1e-3, 1e-4 and 1e-6 on symmetric contractions of factor 0.9 and 0.99, the worst sample of a batch
counting; timed are steps on large states. Should the library's solver get an option for it, its
cases belong here, too.

    python -m benchmarks.gpu.bf16_history [--device cuda] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks import options
from benchmarks.cells import Map
from benchmarks.options import Options
from benchmarks.timing import Spread, ratio

HISTORY, RIDGE, BUDGET = 10, 1e-8, 300
TOLERANCES = (1e-3, 1e-4, 1e-6)
FACTORS = (0.9, 0.99)
SHAPES = ((8, 100_000), (8, 262_144), (64, 262_144))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def anderson(f: Map, z: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Points and residuals of Anderson type II with its history in `dtype`, without end."""
    batch, width = z.shape
    residuals, images = (z.new_zeros(batch, HISTORY, width, dtype=dtype) for _ in range(2))
    gram = z.new_zeros(batch, HISTORY, HISTORY, dtype=torch.float64)
    ridge = RIDGE * torch.eye(HISTORY, dtype=gram.dtype, device=z.device)
    image = f(z)
    residual = image - z
    yield z, residual
    z = image
    for count in range(10**9):
        last_image, last_residual = image, residual
        image = f(z)
        residual = image - z
        yield z, residual
        slot, n = count % HISTORY, min(count + 1, HISTORY)
        residuals[:, slot] = residual - last_residual
        images[:, slot] = image - last_image
        kept = residuals[:, :n]
        # both operands in the dtype of the history; products are summed in float32 by the device
        both = torch.stack([kept[:, slot], residual.to(dtype)], 1)
        row, right = torch.bmm(both, kept.mT).double().unbind(1)
        gram[:, slot, :n] = row
        gram[:, :n, slot] = row
        scale = gram[:, :n, :n].diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        unit = gram[:, :n, :n] * scale.unsqueeze(1) * scale.unsqueeze(2) + ridge[:n, :n]
        weights = scale * torch.linalg.solve_ex(unit, scale * right)[0]
        weights = torch.where(weights.isfinite(), weights, 0.0).to(dtype)
        z = image - torch.bmm(weights.unsqueeze(1), images[:, :n]).squeeze(1).to(z.dtype)


def counted(factor: float, dtype: torch.dtype, given: Options) -> list[int | None]:
    """Evaluations until the worst sample is at each tolerance."""
    batch, width = (2, 16) if given.tiny else (16, 512)
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    weight = (basis * torch.linspace(-1.0, 1.0, width) @ basis.mT).to(given.device)
    x = (0.1 * torch.randn(batch, width, generator=draw)).to(given.device)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(factor * (z @ weight.mT) + x)

    found: list[int | None] = [None] * len(TOLERANCES)
    steps = anderson(f, torch.zeros_like(x), dtype)
    for evaluations, (z, residual) in enumerate(islice(steps, 20 if given.tiny else BUDGET), 1):
        reached = float((residual.norm(dim=1) / (z + residual).norm(dim=1)).max())
        for i, tolerance in enumerate(TOLERANCES):
            if found[i] is None and reached <= tolerance:
                found[i] = evaluations
    return found


def timed(batch: int, width: int, given: Options) -> dict[str, Any]:
    """Seconds of 30 steps with either history, f being one operation."""
    x = 0.1 * torch.randn(batch, width, device=given.device)
    c = torch.linspace(0.1, 0.9, width, device=given.device)
    num_steps = 3 if given.tiny else 30

    def run(dtype: torch.dtype) -> Callable[[], object]:
        steps = lambda: anderson(lambda z: torch.addcmul(x, z, c), torch.zeros_like(x), dtype)  # noqa: E731
        return lambda: list(islice(steps(), num_steps))[-1]

    seconds = given.interleave({name: run(dtype) for name, dtype in DTYPES.items()}, rounds=7)
    row = {
        "batch": batch,
        "width": width,
        "microseconds_per_step": {
            name: Spread.of([1e6 * s / num_steps for s in values]).as_dict()
            for name, values in seconds.items()
        },
        "speed_up": ratio(seconds["float32"], seconds["bfloat16"]).as_dict(),
    }
    print(row)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, time and save."""
    given = options.parse(__doc__, arguments)
    with torch.no_grad():
        counts = {
            f"factor {factor}, {name}": counted(factor, dtype, given)
            for factor in FACTORS
            for name, dtype in DTYPES.items()
        }
        for name, found in counts.items():
            print(f"{name:24} evaluations to {TOLERANCES}: {found}")
        rows = [timed(*shape, given) for shape in (((2, 64),) if given.tiny else SHAPES)]
    given.save("bf16_history", tolerances=TOLERANCES, evaluations=counts, rows=rows)


if __name__ == "__main__":
    main()
