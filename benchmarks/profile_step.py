"""Where does the time of a solver step on a small state go?

    python -m benchmarks.profile_step [--tiny]

The states, the map and the 30 steps of `benchmarks/overhead.py` at 32 x 128. "Operations" are those
that PyTorch's profiler counts at the top level, per step, and their own time in kinds; the profiler
slows everything down, so shares count and not microseconds. "Isolated" is what the two
factorisations and solves of small systems take by themselves, each called alone in a loop, which no
way of writing the other operations makes smaller.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import options
from benchmarks.options import Options
from benchmarks.overhead import NUM_STEPS, ours, torchdeq
from benchmarks.timing import Spread
from benchmarks.variants import has_torchdeq
from equilibria import Anderson, Broyden, Residual

KINDS = {
    "small systems": ("cholesky", "linalg_lu", "linalg_solve", "tril", "triangular"),
    "products and norms": ("bmm", "norm", "matmul", "addcmul"),
    "copies": ("copy", "clone", "cat", "roll", "flip", "contiguous", "_to_copy", "stack"),
    "views and allocation": (
        "view", "slice", "select", "squeeze", "strided", "expand", "transpose", "diagonal",
        "narrow", "empty", "alias", "reshape", "unbind", "zeros", "ones", "detach", "::to",
    ),
}  # fmt: skip
"""What an operator's name contains; the first kind that fits. The rest is elementwise."""


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """Operators per step, and the share of their own time by kind."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    times: dict[str, float] = defaultdict(float)
    count = 0
    for event in run.key_averages():
        if event.key.startswith("aten::"):
            times[_kind(event.key)] += event.self_cpu_time_total
            count += event.count
    total = sum(times.values())
    return {
        "operators": round(count / NUM_STEPS, 1),
        "shares": {kind: round(time / total, 3) for kind, time in times.items()},
    }


def _kind(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return "elementwise"


def isolated(batch: int, n: int, given: Options) -> dict[str, dict[str, float]]:
    """Microseconds of factorising and solving systems (B, n, n) in float64."""
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(batch, n, n, generator=draw, dtype=torch.float64)
    matrix, right = root @ root.mT + torch.eye(n), root[:, 0]
    cases = {
        "Cholesky factor": lambda: torch.linalg.cholesky_ex(matrix),
        "solve": lambda: torch.linalg.solve_ex(matrix, right),
    }
    seconds = given.interleave(cases, rounds=9)
    return {name: Spread.of([1e6 * s for s in found]).as_dict() for name, found in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and save."""
    given = options.parse(__doc__, arguments)
    batch, width = (2, 16) if given.tiny else (32, 128)
    draw = torch.Generator().manual_seed(0)
    x, z0 = 0.1 * torch.randn(batch, width, generator=draw), torch.zeros(batch, width)
    c = torch.linspace(0.1, 0.9, width)
    f: Callable[[Tensor], Tensor] = lambda z: torch.addcmul(x, z, c)  # noqa: E731
    unreachable = Residual(rtol=1e-30, atol=1e-30)
    calls = {
        "Anderson(6), eager": ours(Anderson(6, fused=False), f, z0, unreachable),
        "Broyden(None), eager": ours(Broyden(None, fused=False), f, z0, unreachable),
    }
    if has_torchdeq():
        calls["torchdeq anderson"] = torchdeq("anderson", f, z0, 6)
        calls["torchdeq broyden"] = torchdeq("broyden", f, z0, 6)
    with torch.no_grad():
        rows = {name: profiled(call) for name, call in calls.items()}
        small = {n: isolated(batch, n, given) for n in ((2,) if given.tiny else (6, 30))}
    for name, row in {**rows, **small}.items():
        print(name, row)
    given.save("profile_step", batch=batch, width=width, profiles=rows, isolated=small)


if __name__ == "__main__":
    main()
