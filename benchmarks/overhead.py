"""What does one solver step cost besides f?

f is one elementwise operation, z -> c z + x, so nearly all the time is the solver's. Every solver
makes the same 30 steps (its tolerance is out of reach); the bare loop of f is timed in the same
round and subtracted. Peers run with their own defaults and the same history.

The floor is the time of one `torch.add(a, b, out=c)`, timed in the same round too, that moves as
many words as a step has to besides those of f, per float of the state: 2 for plain iteration and
the norm of its residual, 2 n + 6 for Anderson with n differences, 4 n + 10 for Broyden with n
pairs in product form, 3 n + 10 in compact form with limited memory; n grows to the history over
the steps, and the mean over the 30 steps counts.

    python -m benchmarks.overhead [--device cuda] [--tiny] [small large largest sweep]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import options, published
from benchmarks.options import Options
from benchmarks.timing import Spread, difference, ratio
from benchmarks.variants import eager_and_fused, has_torchdeq
from equilibria import Anderson, Broyden, FixedSteps, Picard, Residual, Solver, Termination, solve

NUM_STEPS = 30
HISTORY, PAIRS = 6, 10
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A batch of states, the history of Anderson, and whether there is more to time than that."""

    batch: int
    width: int
    history: int = HISTORY
    rounds: int = 9
    only_anderson: bool = False


SHAPES: dict[str, list[Shape]] = {
    "small": [Shape(32, 128)],
    "large": [Shape(8, 100_000, rounds=5)],
    "largest": [Shape(8, 262_144, rounds=3)],
    "sweep": [Shape(8, 100_000, m, rounds=5, only_anderson=True) for m in (3, 10, 20)],
}
"""The sweep over the history leaves out 6, which "large" has."""
TINY = {
    "small": [Shape(2, 16)],
    "large": [],
    "largest": [],
    "sweep": [Shape(2, 16, 3, only_anderson=True)],
}


@dataclass(frozen=True)
class Method:
    """One of our solvers, what it is compared with, and the words that a step has to move."""

    solver: Solver
    torchdeq: str
    published: str | None
    words: Callable[[int], float]
    """Of the number of steps made so far."""

    @property
    def mean_words(self) -> float:
        """Over all steps."""
        return statistics.mean(self.words(step) for step in range(1, NUM_STEPS + 1))


def methods(history: int, *, only_anderson: bool) -> dict[str, Method]:
    """What is measured of ours."""

    def anderson(step: int) -> float:
        return 2 * min(step, history) + 6

    mixing = {
        "anderson": Method(Anderson(history), "anderson", "anderson", anderson),
        "anderson II": Method(Anderson(history, kind="II"), "anderson", "anderson", anderson),
    }
    if only_anderson:
        return mixing
    return {
        "picard": Method(Picard(), "fixed_point_iter", None, lambda step: 2),
        **mixing,
        "broyden": Method(Broyden(None), "broyden", "broyden", lambda step: 4 * step + 10),
        f"broyden, {PAIRS} pairs": Method(
            Broyden(PAIRS), "broyden", "broyden", lambda step: 3 * min(step, PAIRS) + 10
        ),
    }


def ours(solver: Solver, f: Map, z0: Tensor, termination: Termination) -> Callable[[], object]:
    """A solve of NUM_STEPS steps."""
    return lambda: solve(
        f, z0, solver=solver, termination=termination, max_steps=NUM_STEPS, on_failure="ignore"
    )


def torchdeq(name: str, f: Map, z0: Tensor, history: int) -> Callable[[], object]:
    """torchdeq's solver of that name."""
    from torchdeq.solver import get_solver

    run = get_solver(name)
    options = {"m": history} if name == "anderson" else {}
    return lambda: run(f, z0, max_iter=NUM_STEPS, tol=0.0, stop_mode="rel", **options)


def restated(name: str, f: Map, z0: Tensor, history: int) -> Callable[[], object]:
    """The published algorithm of that name."""
    limits: dict[str, Any] = {"max_steps": NUM_STEPS, "tolerance": 0.0}
    if name == "broyden":
        return lambda: published.broyden(f, z0, **limits)
    return lambda: published.anderson(f, z0, history_size=history, **limits)


def stream(words: float, like: Tensor) -> Callable[[], object]:
    """Moves so many words per float of a state: two read and one written by one kernel."""
    size = max(1, round(words * like.numel() / 3))
    a, b, c = (torch.ones(size, device=like.device) for _ in range(3))
    return lambda: torch.add(a, b, out=c)


def measure(shape: Shape, options: Options) -> dict[str, Any]:
    """Overhead per step of every case, over the floor, and peers' overhead over ours."""
    batch, width, device = shape.batch, shape.width, options.device
    draw = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(batch, width, generator=draw)).to(device)
    c = torch.linspace(0.1, 0.9, width, device=device)
    z0 = torch.zeros(batch, width, device=device)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(x, z, c)

    def bare() -> Tensor:
        z = z0
        for _ in range(NUM_STEPS + 1):
            z = f(z)
        return z

    unreachable, fixed = Residual(rtol=1e-30, atol=1e-30), FixedSteps(NUM_STEPS)
    compared = methods(shape.history, only_anderson=shape.only_anderson)
    cases: dict[str, Callable[[], object]] = {"bare": bare}
    belongs: dict[str, str] = {}
    for base, method in compared.items():
        cases[f"floor, {base}"] = stream(method.mean_words, z0)
        variants = eager_and_fused(method.solver, device)
        for variant, solver in variants.items():
            name = base if isinstance(solver, Picard) else f"{base}, {variant}"
            belongs[name] = base
            cases[name] = ours(solver, f, z0, unreachable)
        if z0.numel() < 10_000:  # nobody can see the waiting of others at larger ones
            belongs[f"{name}, fixed steps"] = base
            cases[f"{name}, fixed steps"] = ours(solver, f, z0, fixed)
        if has_torchdeq():
            cases[f"torchdeq {method.torchdeq}"] = torchdeq(method.torchdeq, f, z0, shape.history)
        if method.published:
            cases[f"published {method.published}"] = restated(
                method.published, f, z0, shape.history
            )
    with torch.no_grad():
        large = z0.numel() > 100_000  # slow enough for what the first call compiles not to matter
        measured = options.interleave(cases, rounds=shape.rounds, warm=large)
    return {
        "batch": batch,
        "width": width,
        "history": shape.history,
        **_evaluated(measured, compared, belongs, f"{batch:4} x {width:7}, {shape.history:2}"),
    }


def _evaluated(
    measured: dict[str, list[float]], compared: dict[str, Method], belongs: dict[str, str],
    title: str,
) -> dict[str, Any]:  # fmt: skip
    """Overhead per step, floors and ratios of the seconds per call."""
    bare = measured.pop("bare")
    floors = {base: measured.pop(f"floor, {base}") for base in compared}
    per_step = {
        name: [seconds / NUM_STEPS for seconds in difference(whole, bare)]
        for name, whole in measured.items()
    }
    pairs = [
        (peer, mine)
        for mine, base in belongs.items()
        for peer in (f"torchdeq {compared[base].torchdeq}", f"published {compared[base].published}")
        if peer in per_step
    ]
    results = {
        "microseconds_per_step": {name: _micro(seconds) for name, seconds in per_step.items()},
        "floor_microseconds": {base: _micro(seconds) for base, seconds in floors.items()},
        "over_floor": {name: ratio(per_step[name], floors[base]) for name, base in belongs.items()},
        "ratios": {
            f"{peer} / {mine}": ratio(per_step[peer], per_step[mine]) for peer, mine in pairs
        },
    }
    for kind, spreads in results.items():
        for name, spread in spreads.items():
            print(f"{title}  {kind:22} {name:50} {spread}")
    words = {base: round(method.mean_words, 1) for base, method in compared.items()}
    return {
        "words": words,
        **{kind: {k: v.as_dict() for k, v in spreads.items()} for kind, spreads in results.items()},
    }


def _micro(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e6 * s for s in seconds])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all shapes and save them."""
    given = options.parse(__doc__, arguments, list(SHAPES))
    shapes = TINY if given.tiny else SHAPES
    rows = [measure(shape, given) for name in given.names for shape in shapes[name]]
    given.save("overhead", num_steps=NUM_STEPS, rows=rows)


if __name__ == "__main__":
    main()
