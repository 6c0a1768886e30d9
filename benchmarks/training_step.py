"""A whole training step: forward solve, backward solve, optimiser; to the same tolerance.

Relative 1e-4 forward and backward. What was reached is measured afterwards from outside: the worst
sample's residual, forward and backward, and the error of the gradient of all parameters against
that of a solve to 1e-8 in float64. A peer that reaches another residual at that tolerance is timed
once more, "at equal residual": with the loosest tolerances, found by search, at which its worst
samples are below 1e-4 both ways. The "floor" makes as many evaluations and products as ours did,
without a solver. The explicit Transformers of equal parameters (explicit.py) are other models:
what they cost is what a user compares, but they have no residual.

    python -m benchmarks.training_step [--device cuda] [--tiny] [CELL ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cells, explicit, options
from benchmarks.cells import SIZES, TINY_SIZES, Work
from benchmarks.methods import (
    Gradient,
    Method,
    Solve,
    Tolerances,
    equalised,
    loss_of,
    ours,
    ours_fastest,
    peers,
    reached,
)
from benchmarks.options import Options
from benchmarks.peak import peak_bytes
from benchmarks.timing import Spread, ratio
from benchmarks.variants import eager
from equilibria import Anderson, Broyden
from equilibria.linear.gmres import GMRES

TOLERANCE = 1e-4
SLOW = ("multiscale", "wide transformer")
"""On CPU, where their steps take seconds."""
MINE = "ours, Anderson + GMRES"
EQUAL = " at equal residual"


def methods(device: torch.device) -> dict[str, Method]:
    """Everything that is compared at one tolerance."""
    return {
        MINE: ours_fastest(Anderson(), device),
        "ours, Anderson + GMRES, eager": ours(eager(Anderson()), eager(GMRES())),
        "ours, Broyden + GMRES": ours_fastest(Broyden(), device),
        **peers(),
    }


def training_step(work: Work, solve_: Solve) -> Callable[[], None]:
    """One step of SGD."""
    return step_of(work.module, lambda: solve_(work.prepare(), work.z0))


def step_of(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of SGD on the loss of what `forward` gives."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)  # weights stay as they are

    def step() -> None:
        loss_of(forward()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def floor(work: Work, evaluations: int, products: int) -> Callable[[], None]:
    """The same numbers of evaluations and products, and nothing else."""

    def forward() -> Tensor:
        f = work.prepare()
        z = work.z0
        with torch.no_grad():
            for _ in range(evaluations - 1):
                z = f(z)
        z = z.detach().requires_grad_()
        image = f(z)
        u = image.detach()
        for _ in range(products - 1):
            u = torch.autograd.grad(image, z, u, retain_graph=True)[0]
        return image

    return step_of(work.module, forward)


def reference(name: str, given: Options) -> tuple[Gradient, dict[str, float]]:
    """The gradient of a solve in float64, and what that reached."""
    work = cells.build(name, tiny=given.tiny, device=given.device, dtype=torch.float64)
    tolerance = 1e-4 if given.tiny else 1e-8
    costs, gradient = reached(work, ours(Anderson(20), max_steps=300)(tolerance, tolerance))
    return gradient, costs


def measure(name: str, given: Options) -> dict[str, Any]:
    """All methods on one cell."""
    work = cells.build(name, tiny=given.tiny, device=given.device)
    exact, reference_costs = reference(name, given)
    tolerance = 1e-2 if given.tiny else TOLERANCE
    result = compare(
        work, methods(given.device), exact, given, title=name, tolerance=tolerance,
        slow=given.device.type == "cpu" and name in SLOW,
    )  # fmt: skip
    size = (TINY_SIZES if given.tiny else SIZES).get(name)
    if size is not None:
        result["explicit"] = beside(size, result, given)
    return {"name": name, "about": work.about, "reference": reference_costs, **result}


def compare(
    work: Work,
    compared: dict[str, Method],
    exact: Gradient,
    given: Options,
    *,
    slow: bool = False,
    title: str = "",
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Time all methods at one tolerance and the peers at equal residual.

    Args:
        work: the cell.
        compared: the first is ours, which others are compared with.
        exact: the gradient that theirs are compared with.
        given: how to run.
        slow: fewer rounds, and a search in larger steps, for a cell whose steps take seconds.
        title: for what is printed.
        tolerance: relative, forward and backward.
    """
    mine = next(iter(compared))
    solves = {method: make(tolerance, tolerance) for method, make in compared.items()}
    tolerances: dict[str, Tolerances | None] = {}
    factor = 10.0 ** (0.5 if slow or given.tiny else 0.25)
    for method, make in compared.items():
        if method.startswith("ours"):
            continue
        found = equalised(work, make, tolerance, factor)
        tolerances[method] = found
        if found is not None:
            solves[method + EQUAL] = make(*found)
    costs: dict[str, dict[str, float]] = {}
    for method, solve_ in solves.items():
        costs[method], gradient = reached(work, solve_)
        costs[method] |= _rounded(gradient.compared_with(exact))
        del gradient  # as large as the model
    cases = {method: training_step(work, solve_) for method, solve_ in solves.items()}
    for method, case in cases.items():
        costs[method]["peak_mib"] = _mib(peak_bytes(case, given.device, warm=True))
    bare = floor(work, int(costs[mine]["evaluations"]), int(costs[mine]["products"]))
    bare()
    cases["floor"] = bare
    seconds = given.interleave(cases, rounds=3 if slow else 7, seconds=0.1, warm=True)
    others = [method for method in solves if not method.startswith("ours")]
    equal = [method for method in others if method.endswith(EQUAL)]
    ratios = {f"{method} / {mine}": ratio(seconds[method], seconds[mine]) for method in others}
    ratios |= {
        f"{method} / floor": ratio(seconds[method], seconds["floor"])
        for method in solves
        if method.startswith("ours")
    }
    for method, values in seconds.items():
        print(f"{title:18} {method:38} {1e3 * Spread.of(values).median:9.3g} ms  "
              f"{costs.get(method, '')}")  # fmt: skip
    for pair, spread in ratios.items():
        print(f"{title:18} {pair:64} {spread}")
    return {
        "mine": mine,
        "best_peer": _fastest(seconds, others),
        "best_peer_at_equal_residual": _fastest(seconds, equal) if equal else None,
        "tolerances_at_equal_residual": tolerances,
        "parameters": explicit.count(work.module),
        "milliseconds": {method: _milli(values) for method, values in seconds.items()},
        "reached": costs,
        "ratios": {pair: spread.as_dict() for pair, spread in ratios.items()},
    }


def beside(size: cells.TransformerSize, deq: dict[str, Any], given: Options) -> dict[str, Any]:
    """The explicit models of equal parameters: time, parameters and peak memory of a step."""
    models = [make(size, given.device) for make in (explicit.tied, explicit.untied)]
    cases = {about: step_of(module, forward) for about, module, forward in models}
    slow = size.d_inner > 10_000
    seconds = given.interleave(cases, rounds=2 if slow else 7, seconds=0.1)
    results = {
        about: {
            "milliseconds": _milli(seconds[about]),
            "parameters": explicit.count(module),
            "peak_mib": _mib(peak_bytes(cases[about], given.device, warm=True)),
        }
        for about, module, _ in models
    }
    print(f"DEQ: {deq['parameters']} parameters; {results}")
    return results


def _fastest(seconds: dict[str, list[float]], names: Sequence[str]) -> str:
    return min(names, key=lambda name: Spread.of(seconds[name]).median)


def _milli(seconds: Sequence[float]) -> dict[str, float]:
    return Spread.of([1e3 * s for s in seconds]).as_dict()


def _mib(size: int) -> float:
    return float(f"{size / 2**20:.4g}")


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and save them."""
    given = options.parse(__doc__, arguments, cells.NAMES)
    rows = [measure(name, given) for name in given.names]
    given.save("training_step", tolerance=TOLERANCE, rows=rows)


if __name__ == "__main__":
    main()
