"""What do CUDA graphs save in a solve of fixed steps, and in one to a tolerance?

Inference, 30 steps: eager; the same solve under torch.compile(mode="reduce-overhead"); and captured
once by torch.cuda.graph and replayed. The tanh cell at two batches, where launching is all there
is, and the small DEQ-Transformer block. Results are compared with the eager one. Then the same
cells solved to 1e-4, eagerly with a look at every step, and by `GraphedSolve`, which replays blocks
of eight steps and looks after each.

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
from equilibria import Anderson, Broyden, FixedSteps, GraphedSolve, Picard, solve

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
    return {
        "about": work.about,
        "num_steps": num_steps,
        "cases": rows,
        "to_tolerance": to_tolerance(work, given) if given.device.type == "cuda" else None,
    }


def to_tolerance(work: Work, given: Options) -> dict[str, Any]:
    """Solves that stop by themselves: microseconds, evaluations, and the ratio."""
    f = work.prepare()
    rows: dict[str, Any] = {}
    for name, solver in {"Anderson()": Anderson(), "Broyden()": Broyden()}.items():
        plain = lambda solver=solver: solve(f, work.z0, solver=solver, on_failure="ignore")  # noqa: E731
        graphed = GraphedSolve(f, work.z0, solver=solver)
        seconds = given.interleave({"plain": plain, "graphed": graphed}, warm=True)
        rows[name] = {
            "plain_microseconds": Spread.of([1e6 * s for s in seconds["plain"]]).as_dict(),
            "graphed_microseconds": Spread.of([1e6 * s for s in seconds["graphed"]]).as_dict(),
            "speed_up": ratio(seconds["plain"], seconds["graphed"]).as_dict(),
            "plain_evaluations": plain().num_evals,
            "graphed_evaluations": graphed().num_evals,
            "converged": bool(graphed().converged.all()),
        }
        print(f"{work.about:50} {name:30} {rows[name]}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and save them."""
    given = options.parse(__doc__, arguments)
    with torch.no_grad():
        rows = [measure(work, given) for work in works(given)]
    given.save("cuda_graphs", rows=rows)


if __name__ == "__main__":
    main()
