"""What does one solver step cost besides f?

f is one elementwise operation, z -> c z + x, so nearly all the time is the solver's. Every solver
makes the same 30 steps (its tolerance is out of reach); the bare loop of f is timed in the same
round and subtracted. Peers run with their own defaults and the same history.

    python -m benchmarks.overhead
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.record import save
from benchmarks.timing import Spread, difference, interleave, ratio
from equilibria import Anderson, Broyden, FixedSteps, Picard, Residual, Solver, Termination, solve

NUM_STEPS = 30
HISTORY = 6
SHAPES = ((32, 128), (8, 100_000), (8, 262_144))
Map = Callable[[Tensor], Tensor]


def ours(solver: Solver, f: Map, z0: Tensor, termination: Termination) -> Callable[[], object]:
    """A solve of NUM_STEPS steps."""
    return lambda: solve(
        f, z0, solver=solver, termination=termination, max_steps=NUM_STEPS, on_failure="ignore"
    )


def peer(name: str, f: Map, z0: Tensor, **options: Any) -> Callable[[], object]:
    """torchdeq's solver of that name."""
    from torchdeq.solver import get_solver

    run = get_solver(name)
    return lambda: run(f, z0, max_iter=NUM_STEPS, tol=0.0, stop_mode="rel", **options)


def cases(f: Map, z0: Tensor) -> dict[str, Callable[[], object]]:
    """Everything that is compared, by name."""

    def bare() -> Tensor:
        z = z0
        for _ in range(NUM_STEPS + 1):
            z = f(z)
        return z

    unreachable, fixed = Residual(rtol=1e-30, atol=1e-30), FixedSteps(NUM_STEPS)
    steps = NUM_STEPS
    return {
        "bare": bare,
        "picard": ours(Picard(), f, z0, unreachable),
        "picard, fixed steps": ours(Picard(), f, z0, fixed),
        "anderson": ours(Anderson(HISTORY), f, z0, unreachable),
        "anderson, fixed steps": ours(Anderson(HISTORY), f, z0, fixed),
        "broyden": ours(Broyden(None), f, z0, unreachable),
        "broyden, fixed steps": ours(Broyden(None), f, z0, fixed),
        "broyden, 10 pairs": ours(Broyden(10), f, z0, unreachable),
        "torchdeq picard": peer("fixed_point_iter", f, z0),
        "torchdeq anderson": peer("anderson", f, z0, m=HISTORY),
        "torchdeq broyden": peer("broyden", f, z0),
        "published anderson": lambda: published.anderson(
            f, z0, max_steps=steps, tolerance=0.0, history_size=HISTORY
        ),
        "published broyden": lambda: published.broyden(f, z0, max_steps=steps, tolerance=0.0),
    }


PAIRS = {
    "picard": ("torchdeq picard",),
    "picard, fixed steps": ("torchdeq picard",),
    "anderson": ("torchdeq anderson", "published anderson"),
    "anderson, fixed steps": ("torchdeq anderson", "published anderson"),
    "broyden": ("torchdeq broyden", "published broyden"),
    "broyden, fixed steps": ("torchdeq broyden", "published broyden"),
    "broyden, 10 pairs": ("torchdeq broyden", "published broyden"),
}


def measure(batch: int, width: int) -> dict[str, Any]:
    """Overhead per step of every case, and peers' overhead over ours."""
    draw = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(batch, width, generator=draw)
    c = torch.linspace(0.1, 0.9, width)
    with torch.no_grad():
        measured = interleave(cases(lambda z: torch.addcmul(x, z, c), torch.zeros(batch, width)))
    bare = measured.pop("bare")
    overhead = {name: difference(seconds, bare) for name, seconds in measured.items()}
    microseconds = {
        name: Spread.of([1e6 * s / NUM_STEPS for s in seconds])
        for name, seconds in overhead.items()
    }
    ratios = {
        f"{theirs} / {mine}": ratio(overhead[theirs], overhead[mine])
        for mine, peers in PAIRS.items()
        for theirs in peers
    }
    for name, spread in (*microseconds.items(), *ratios.items()):
        print(f"{batch:4} x {width:7}  {name:45} {spread}")
    return {
        "batch": batch,
        "width": width,
        "microseconds_per_step": {k: v.as_dict() for k, v in microseconds.items()},
        "ratios": {k: v.as_dict() for k, v in ratios.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    save("overhead", num_steps=NUM_STEPS, history=HISTORY, rows=[measure(*s) for s in SHAPES])
