"""The DEQ-Transformer block of WikiText-103 size: a training step, and the solver's share of it.

Width 700, feed-forward 48000, 8 x 150 tokens after 150 of memory. In bfloat16 (autocast; state,
solver and weights in float32, the large weights cast once per solve for every library alike) to a
relative residual of 1e-2, about what f can be held to in that precision; and in float32 to 1e-4.
Peers are timed at equal residual, as in training_step.py. The share is the time that a solve of 30
fixed steps takes beyond its evaluations of f, over the time of those.

    python -m benchmarks.gpu.wt103_block [--device cuda] [--tiny] [bfloat16 float32]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import cells, options
from benchmarks.cells import TransformerSize, Work
from benchmarks.methods import Gradient, ours, reached
from benchmarks.options import Options
from benchmarks.timing import Spread, difference, ratio
from benchmarks.training_step import compare, methods
from benchmarks.variants import eager_and_fused, has_torchdeq
from equilibria import Anderson, Broyden, FixedSteps, solve

NUM_STEPS = 30
SIZE = TransformerSize(700, 10, 48000, length=150, batch=8, memory=150)
TINY = TransformerSize(16, 2, 64, length=4, batch=2, memory=4)
PRECISIONS: dict[str, tuple[torch.dtype | None, float]] = {
    "bfloat16": (torch.bfloat16, 1e-2),
    "float32": (None, 1e-4),
}
"""What f computes in, and the tolerance."""


def measure(precision: str, given: Options) -> dict[str, Any]:
    """Training steps and shares in one precision."""
    autocast, tolerance = PRECISIONS[precision]
    if given.tiny:
        tolerance = max(tolerance, 1e-2)
    size = TINY if given.tiny else SIZE
    work = cells.transformer(size, device=given.device, autocast=autocast)
    result = compare(
        work, methods(given.device), _exact(work, given), given,
        title=precision, tolerance=tolerance, slow=given.device.type == "cpu",
    )  # fmt: skip
    return {
        "name": precision,
        "about": work.about,
        "tolerance": tolerance,
        "share_of_f": shares(work, given, precision),
        **result,
    }


def _exact(work: Work, given: Options) -> Gradient:
    """The gradient of the same map, in the same precision, solved as far as that goes."""
    tolerance = 1e-3 if given.tiny else 1e-6
    return reached(work, ours(Anderson(20), max_steps=100)(tolerance, tolerance))[1]


def shares(work: Work, given: Options, title: str) -> dict[str, dict[str, float]]:
    """Time of a solve beyond its evaluations, over the time of these."""
    num_steps = 3 if given.tiny else NUM_STEPS
    with torch.no_grad():
        f = work.prepare()

        def bare() -> Tensor:
            z = work.z0
            for _ in range(num_steps + 1):
                z = f(z)
            return z

        cases: dict[str, Callable[[], object]] = {"f": bare}
        for name, plain in {"Anderson()": Anderson(), "Broyden()": Broyden()}.items():
            for variant, solver in eager_and_fused(plain, given.device).items():
                cases[f"{name}, {variant}"] = lambda solver=solver: solve(
                    f, work.z0, solver=solver, termination=FixedSteps(num_steps),
                    max_steps=num_steps, on_failure="ignore",
                )  # fmt: skip
        if has_torchdeq():
            from torchdeq.solver import get_solver

            for name in ("anderson", "broyden"):
                cases[f"torchdeq {name}"] = lambda run=get_solver(name): run(
                    f, work.z0, max_iter=num_steps, tol=0.0, stop_mode="rel"
                )
        seconds = given.interleave(cases, seconds=0.2)
    bare_seconds = seconds.pop("f")
    found: dict[str, Spread] = {
        name: ratio(difference(whole, bare_seconds), bare_seconds)
        for name, whole in seconds.items()
    }
    for name, spread in found.items():
        print(f"{title:10} {name:22} solver over f {spread}")
    return {name: spread.as_dict() for name, spread in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all precisions and save them."""
    given = options.parse(__doc__, arguments, list(PRECISIONS))
    rows = [measure(name, given) for name in given.names]
    given.save("wt103_block", rows=rows)


if __name__ == "__main__":
    main()
