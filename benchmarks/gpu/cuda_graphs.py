"""What do CUDA graphs save in a solve of fixed steps?

Inference, 30 steps: eager; the same solve under torch.compile(mode="reduce-overhead"); and captured
once by torch.cuda.graph and replayed. The tanh cell at two batches, where launching is all there
is, and the small DEQ-Transformer block. Results are compared with the eager one.

    python -m benchmarks.gpu.cuda_graphs [--device cuda] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import cells, options
from benchmarks.cells import Work
from benchmarks.options import Options
from benchmarks.timing import Spread, ratio
from benchmarks.variants import eager, eager_and_fused
from equilibria import Anderson, Broyden, FixedSteps, Picard, solve

NUM_STEPS = 30


def works(given: Options) -> list[Work]:
    """Small cells."""
    if given.tiny:
        return [cells.build("tiny", tiny=True, device=given.device)]
    return [
        cells.tanh(32, device=given.device),
        cells.tanh(1024, device=given.device),
        cells.build("small transformer", device=given.device),
    ]


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays what one call has launched; the result is always the same tensor."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def measure(work: Work, given: Options) -> dict[str, Any]:
    """All solvers on one cell."""
    num_steps = 3 if given.tiny else NUM_STEPS
    f = work.prepare()
    cases: dict[str, Callable[[], Tensor]] = {}
    solvers = {"Picard()": Picard(), "Anderson()": Anderson(), "Broyden()": Broyden()}

    def solved(solver: Any) -> Callable[[], Tensor]:
        return lambda: solve(
            f, work.z0, solver=solver, termination=FixedSteps(num_steps), max_steps=num_steps,
            on_failure="ignore",
        ).z  # fmt: skip

    for name, plain in solvers.items():
        base = plain if isinstance(plain, Picard) else eager(plain)
        cases[f"{name}, eager"] = solved(base)
        if given.device.type != "cuda":
            continue
        compiled = torch.compile(solved(base), mode="reduce-overhead")
        cases[f"{name}, compiled"] = lambda compiled=compiled: compiled().clone()
        cases[f"{name}, captured"] = captured(solved(base))
        if "fused" in (variants := {} if base is plain else eager_and_fused(plain, given.device)):
            cases[f"{name}, fused"] = solved(variants["fused"])
            cases[f"{name}, fused, captured"] = captured(solved(variants["fused"]))
    if given.device.type != "cuda":
        print("torch.compile(mode='reduce-overhead') and torch.cuda.graph: needs CUDA, skipped")
    errors: dict[str, float] = {}
    for case, run in cases.items():
        for _ in range(3):  # compiled code warms up, records and replays
            z = run().clone()
        expected = cases[case.split(",")[0] + ", eager"]()
        errors[case] = float(f"{float((z - expected).norm() / expected.norm()):.3g}")
    seconds = given.interleave(cases, warm=True)
    rows = {
        case: {
            "microseconds_per_step": Spread.of([1e6 * s / num_steps for s in values]).as_dict(),
            "difference": errors[case],
            "speed_up": ratio(seconds[case.split(",")[0] + ", eager"], values).as_dict(),
        }
        for case, values in seconds.items()
    }
    for case, row in rows.items():
        print(f"{work.about:50} {case:30} {row}")
    return {"about": work.about, "num_steps": num_steps, "cases": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and save them."""
    given = options.parse(__doc__, arguments)
    with torch.no_grad():
        rows = [measure(work, given) for work in works(given)]
    given.save("cuda_graphs", rows=rows)


if __name__ == "__main__":
    main()
