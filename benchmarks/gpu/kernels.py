"""How fast are the fused steps, and how much of the memory's bandwidth do they reach?

One step with a full history and no f at all: the next image is given. Plain operations and fused
kernels of Anderson (both types) and Broyden over state and history. The bandwidth counts the words
that a step has to move, 2 n + 6 per float for Anderson with n differences (3 n + 10 for Broyden
with n pairs), and is given as a share of what `torch.add` reaches on as many bytes in the same
round; above 1 means that part of it came out of the cache.

    python -m benchmarks.gpu.kernels [--device cuda] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import options
from benchmarks.options import Options
from benchmarks.overhead import stream
from benchmarks.timing import Spread, ratio
from benchmarks.variants import eager_and_fused
from equilibria import Anderson, Broyden
from equilibria.core.iterate import Iterate

SHAPES = ((32, 128), (32, 4096), (8, 100_000), (8, 262_144), (64, 262_144))
HISTORIES = (6, 10, 20)


def solvers(history: int) -> dict[str, tuple[Any, int]]:
    """Solvers and the words per float of one step."""
    return {
        "Anderson": (Anderson(history), 2 * history + 6),
        "Anderson, kind='II'": (Anderson(history, kind="II"), 2 * history + 6),
        "Broyden": (Broyden(history), 3 * history + 10),
    }


def step(solver: Any, history: int, batch: int, width: int, device: Any) -> Callable[[], object]:
    """One step after the history has been filled, from one of two iterates in turn."""
    draw = torch.Generator().manual_seed(0)
    iterates = [
        Iterate(*(torch.randn(batch, width, generator=draw).to(device) for _ in range(2)))
        for _ in range(2)
    ]
    state = solver.init(iterates[0], history)
    images = [torch.randn(batch, width, generator=draw).to(device) for _ in range(2)]
    count = 0

    def evaluate(z: Tensor) -> Iterate:
        return Iterate(z, images[count % 2])

    def run() -> None:
        nonlocal count, state
        count += 1
        # new objects: what an iterate remembers about itself is not to be found again
        _, state = solver.step(evaluate, Iterate(*iterates[count % 2]), state)

    for _ in range(history + 2):
        run()
    return run


def measure(batch: int, width: int, history: int, given: Options) -> dict[str, Any]:
    """All solvers at one size."""
    like = torch.zeros(batch, width, device=given.device)
    cases: dict[str, Callable[[], object]] = {}
    belongs: dict[str, str] = {}
    words: dict[str, int] = {}
    for name, (plain, number) in solvers(history).items():
        words[name] = number
        cases[f"floor, {name}"] = stream(number, like)
        for variant, solver in eager_and_fused(plain, given.device).items():
            belongs[f"{name}, {variant}"] = name
            cases[f"{name}, {variant}"] = step(solver, history, batch, width, given.device)
    with torch.no_grad():
        seconds = given.interleave(cases)
    rows: dict[str, dict[str, Any]] = {}
    for case, name in belongs.items():
        median = Spread.of(seconds[case]).median
        share = ratio(seconds[f"floor, {name}"], seconds[case])
        rows[case] = {
            "microseconds": Spread.of([1e6 * s for s in seconds[case]]).as_dict(),
            "gigabytes_per_second": float(f"{4e-9 * words[name] * like.numel() / median:.4g}"),
            "share_of_streaming": share.as_dict(),
        }
        if case.endswith("fused"):
            plain_name = f"{name}, eager"
            rows[case]["speed_up"] = ratio(seconds[plain_name], seconds[case]).as_dict()
        print(f"{batch:3} x {width:7}, {history:2}  {case:28} {rows[case]}")
    return {"batch": batch, "width": width, "history": history, "steps": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all sizes and save them."""
    given = options.parse(__doc__, arguments)
    if given.device.type != "cuda":
        print("Triton kernels: needs CUDA, skipped; on CPU the fused steps are others")
    shapes, histories = (((2, 64),), (3,)) if given.tiny else (SHAPES, HISTORIES)
    with torch.no_grad():
        rows = [
            measure(batch, width, history, given)
            for batch, width in shapes
            for history in histories
        ]
    given.save("kernels", rows=rows)


if __name__ == "__main__":
    main()
