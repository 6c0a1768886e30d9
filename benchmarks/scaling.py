"""How does the cost of a training step grow with batch, length, width and number of steps?

A DEQ-Transformer block of width 64 (feed-forward 256), 4 x 32 tokens, of which one dimension at a
time grows. To a relative residual of 1e-4 both ways, by our default and by torchdeq's solvers, each
at the loosest tolerances at which its worst sample gets there at the base size; beside them the
explicit stack of 16 weight-tied layers (another model). Along "steps" all make exactly so many
steps forward and backward, and the explicit stack has so many layers. The exponent is the slope of
a line through the logarithms.

    python -m benchmarks.scaling [--device cuda] [--tiny] [DIMENSION ...]
    python -m benchmarks.plots
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks import cells, explicit, memory, options
from benchmarks.cells import TransformerSize, Work
from benchmarks.methods import Solve, equalised, ours_fastest, peers, worst_residual
from benchmarks.options import Options
from benchmarks.timing import Spread, ratio
from benchmarks.training_step import MINE, TOLERANCE, step_of, training_step
from benchmarks.variants import fastest
from equilibria import Anderson

BASE = TransformerSize(64, 4, 256, length=32, batch=4)
VALUES: dict[str, Sequence[int]] = {
    "batch": (1, 2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128),
    "width": (32, 64, 128, 256),
    "steps": (5, 10, 20, 40, 80),
}
ON_CUDA: dict[str, Sequence[int]] = {
    "batch": (4, 16, 64, 256, 1024),
    "length": (32, 128, 512, 1024),
    "width": (64, 256, 1024, 2048),
    "steps": (5, 10, 20, 40, 80),
}
TINY = TransformerSize(16, 2, 32, length=4, batch=1)
TINY_VALUES: dict[str, Sequence[int]] = {
    "batch": (1, 2), "length": (4, 8), "width": (16, 32), "steps": (2, 4),
}  # fmt: skip
TIED = "explicit, tied layers"


def resized(size: TransformerSize, dimension: str, value: int) -> TransformerSize:
    """The block with one dimension changed."""
    if dimension == "width":
        return replace(size, d_model=value, d_inner=4 * value)
    return replace(size, **{dimension: value})


def fixed_steps(given: Options) -> dict[str, Callable[[int], Solve]]:
    """Exactly so many steps both ways, with a history of 10 as in the defaults."""
    solver = fastest(Anderson(), given.device)
    found = {"ours, Anderson both ways": memory.ours(solver, memory.implicit(solver))}
    return {
        **found,
        **{name: memory.torchdeq(name.split()[1]) for name in peers() if "torchdeq" in name},
    }


def tied(size: TransformerSize, depth: int, given: Options) -> Callable[[], None]:
    """A training step of the explicit stack of one block."""
    _, module, forward = explicit.tied(size, given.device, depth)
    return step_of(module, forward)


def measure(dimension: str, solves: dict[str, Solve], given: Options) -> dict[str, Any]:
    """Seconds of a step over the values of one dimension."""
    base = TINY if given.tiny else BASE
    values = (ON_CUDA if given.device.type == "cuda" else VALUES)[dimension]
    if given.tiny:
        values = TINY_VALUES[dimension]
    points: list[dict[str, Any]] = []
    for value in values:
        size = base if dimension == "steps" else resized(base, dimension, value)
        work = cells.transformer(size, device=given.device)
        if dimension == "steps":
            solves = {name: make(value) for name, make in fixed_steps(given).items()}
        cases = {name: training_step(work, solve_) for name, solve_ in solves.items()}
        cases[TIED] = tied(size, value if dimension == "steps" else explicit.DEPTH, given)
        seconds = given.interleave(cases, rounds=3, seconds=0.05)
        mine = next(iter(solves))
        points.append(
            {
                "value": value,
                "milliseconds": {
                    name: Spread.of([1e3 * s for s in measured]).as_dict()
                    for name, measured in seconds.items()
                },
                "ratios": {
                    f"{name} / {mine}": ratio(seconds[name], seconds[mine]).as_dict()
                    for name in solves
                    if name != mine
                },
                "worst_residual": {
                    name: float(f"{_reached(work, solve_):.3g}") for name, solve_ in solves.items()
                },
            }
        )
        print(
            f"{dimension:8} {value:5}",
            {k: v["median"] for k, v in points[-1]["milliseconds"].items()},
        )
    exponents = {name: _slope(points, name) for name in points[0]["milliseconds"]}
    print(f"{dimension:8} exponents {exponents}")
    return {"dimension": dimension, "points": points, "exponents": exponents}


def _reached(work: Work, solve_: Solve) -> float:
    f = work.prepare()
    z: Tensor = solve_(f, work.z0)
    return worst_residual(f, z.detach())


def _slope(points: list[dict[str, Any]], name: str) -> float:
    """Of the line that fits best through the logarithms."""
    x = [math.log(point["value"]) for point in points]
    y = [math.log(point["milliseconds"][name]["median"]) for point in points]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return round(above / sum((a - middle_x) ** 2 for a in x), 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all dimensions and save them."""
    given = options.parse(__doc__, arguments, list(VALUES))
    base = TINY if given.tiny else BASE
    work = cells.transformer(base, device=given.device)
    solves = {MINE: ours_fastest(Anderson(), given.device)(TOLERANCE, TOLERANCE)}
    tolerances: dict[str, Any] = {}
    for name, make in peers().items():
        # one that does not get there in any case is timed at the nominal tolerance
        found = None if given.tiny else equalised(work, make, TOLERANCE, 10**0.25)
        tolerances[name] = found
        solves[name] = make(*(found or (TOLERANCE, TOLERANCE)))
    rows = [measure(dimension, solves, given) for dimension in given.names]
    given.save(
        "scaling", tolerance=TOLERANCE, base=base.about, tolerances_at_equal_residual=tolerances,
        rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
