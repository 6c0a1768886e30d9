"""What does a batch cost whose samples converge at different steps?

Inference on 64 samples, relative 1e-4. Two maps: z -> tanh(a_b W z + x_b), 512 units, W symmetric
with eigenvalues from -1 to 1 and 1 - a_b evenly spaced in logarithm, so that samples need from a
few steps to about sixty; and a small DEQ-Transformer block whose inputs have sizes evenly spaced in
logarithm. Rows are counted by the map itself: what it is given in the first
dimension. Useful are those up to the step at which a sample is done, as our solve reports it. With
compaction, finished samples leave the batch; without, and in other libraries, all are evaluated
until the slowest is done. The "floor" evaluates f on the useful rows and does nothing else; peers
are run with the loosest tolerance at which their worst sample reaches 1e-4.

    python -m benchmarks.mixed_difficulty [--device cuda] [--tiny] [MAP ...]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import cells, options
from benchmarks.cells import Map
from benchmarks.methods import loosest, peers, worst_residual
from benchmarks.options import Options
from benchmarks.timing import Spread, ratio
from benchmarks.variants import can_compact, fastest
from equilibria import Anderson, Broyden, Residual, Solution, solve

TOLERANCE, MAX_STEPS, NUM_SAMPLES = 1e-4, 100, 64
Select = Callable[[Tensor], Map]
"""Indices of samples to the f of these."""


@dataclass
class Counter:
    """Rows that a map has been given."""

    rows: int = 0
    calls: list[int] = field(default_factory=list)

    def wrap(self, f: Map) -> Map:
        """The same map, counted."""

        def counted(z: Tensor) -> Tensor:
            self.rows += z.shape[0]
            self.calls.append(z.shape[0])
            return f(z)

        return counted


@dataclass(frozen=True)
class Batch:
    """A map of a batch, the map of some of its samples, and where to start."""

    about: str
    f: Map
    select: Select
    z0: Tensor


def tanh(options: Options) -> Batch:
    """Contraction factors evenly spaced in the logarithm of their distance from 1."""
    torch.manual_seed(0)
    batch, width = (6, 16) if options.tiny else (NUM_SAMPLES, 512)
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    weight = (basis * torch.linspace(-1.0, 1.0, width) @ basis.mT).to(options.device)
    factor = 1.0 - torch.logspace(-0.02, -2.0, batch).unsqueeze(1)
    factor, x = factor.to(options.device), (0.01 * torch.randn(batch, width)).to(options.device)

    def select(rows: Tensor) -> Map:
        some_factors, some_x = factor[rows], x[rows]
        return lambda z: torch.tanh(some_factors * (z @ weight.mT) + some_x)

    return Batch(
        f"tanh(a W z + x), {batch} x {width}",
        lambda z: torch.tanh(factor * (z @ weight.mT) + x),
        select,
        torch.zeros_like(x),
    )


def transformer(options: Options) -> Batch:
    """Inputs of sizes evenly spaced in logarithm."""
    batch = 6 if options.tiny else NUM_SAMPLES
    size = cells.TransformerSize(16, 2, 32, 4, batch) if options.tiny else \
        cells.TransformerSize(128, 4, 512, length=16, batch=batch)  # fmt: skip
    torch.manual_seed(0)
    cell = size.cell().to(options.device)
    scale = torch.logspace(1.5, 0.0, batch)[:, None, None]
    x = (scale * torch.randn(batch, size.length, size.d_model)).to(options.device)
    with torch.no_grad():
        injection = cell.inject(x)

    def of(part: Any, state: Tensor) -> Tensor:
        return cell(state.view(-1, size.length, size.d_model), part).flatten(1)

    def select(rows: Tensor) -> Map:
        part = cell.select(injection, rows)
        return lambda z: of(part, z)

    return Batch(size.about, lambda z: of(injection, z), select, torch.zeros_like(x).flatten(1))


BATCHES: dict[str, Callable[[Options], Batch]] = {"tanh": tanh, "transformer": transformer}


def ours(solver: Any, batch: Batch, *, compact: bool) -> Callable[[Counter], Solution]:
    """A solve that counts its rows."""

    def run(counter: Counter) -> Solution:
        options: dict[str, Any] = {}
        if compact:
            options["select"] = lambda rows: counter.wrap(batch.select(rows))
        return solve(
            counter.wrap(batch.f), batch.z0, solver=solver, termination=Residual(TOLERANCE, 0.0),
            max_steps=MAX_STEPS, on_failure="ignore", **options,
        )  # fmt: skip

    return run


def only_rows(batch: Batch, num_steps: Tensor) -> Callable[[], None]:
    """f on the samples that go on, step by step, and nothing else."""
    parts = []
    for step in range(int(num_steps.max()) + 1):
        rows = (num_steps >= step).nonzero().squeeze(1)
        parts.append((batch.select(rows), batch.z0[rows]))

    def run() -> None:
        for f, z in parts:
            f(z)

    return run


def measure(name: str, given: Options) -> dict[str, Any]:
    """All methods on one batch."""
    batch = BATCHES[name](given)
    cases: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for kind, plain in {"Anderson": Anderson(), "Broyden": Broyden()}.items():
            solver = fastest(plain, given.device)
            for compact in (True, False) if can_compact() else (False,):
                label = f"ours, {kind}, compaction {'on' if compact else 'off'}"
                run, counter = ours(solver, batch, compact=compact), Counter()
                solution = run(counter)
                rows[label] = _rows(solution, counter, batch)
                cases[label] = lambda run=run: run(Counter())
            cases[f"floor, {kind}"] = only_rows(batch, solution.num_steps)
        for label, make in peers(max_steps=MAX_STEPS).items():

            def run_peer(tolerance: float, f: Map, make: Any = make) -> Tensor:
                return make(tolerance, 1.0)(f, batch.z0)

            found = loosest(
                lambda tolerance, run=run_peer: (
                    worst_residual(batch.f, run(tolerance, batch.f)) <= TOLERANCE
                ),
                TOLERANCE,
            )
            tolerance, counter = TOLERANCE if found is None else found, Counter()
            z = run_peer(tolerance, counter.wrap(batch.f))
            rows[label] = {
                "evaluated": counter.rows,
                "evaluations": len(counter.calls),
                "tolerance": tolerance,
                "reached": found is not None,
                "residual": float(f"{worst_residual(batch.f, z):.3g}"),
            }
            cases[label] = lambda run=run_peer, tolerance=tolerance: run(tolerance, batch.f)
        seconds = given.interleave(cases, rounds=5, seconds=0.1)
    mine = next(iter(rows))
    ratios = {
        **{f"{label} / {mine}": ratio(seconds[label], seconds[mine]) for label in rows},
        f"{mine} / floor": ratio(seconds[mine], seconds["floor, Anderson"]),
    }
    del ratios[f"{mine} / {mine}"]
    milliseconds = {
        label: Spread.of([1e3 * s for s in values]) for label, values in seconds.items()
    }
    for label, spread in milliseconds.items():
        print(f"{name:12} {label:34} {spread} ms  {rows.get(label, '')}")
    for pair, spread in ratios.items():
        print(f"{name:12} {pair:70} {spread}")
    return {
        "name": name,
        "about": batch.about,
        "mine": mine,
        "rows": rows,
        "milliseconds": {label: spread.as_dict() for label, spread in milliseconds.items()},
        "ratios": {pair: spread.as_dict() for pair, spread in ratios.items()},
    }


def _rows(solution: Solution, counter: Counter, batch: Batch) -> dict[str, Any]:
    """Evaluated and useful rows, and how the number of steps is spread."""
    useful = int((solution.num_steps + 1).sum())
    quantiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    steps = solution.num_steps.float().cpu().quantile(quantiles)
    return {
        "evaluated": counter.rows,
        "useful": useful,
        "evaluated_over_useful": float(f"{counter.rows / useful:.4g}"),
        "evaluations": len(counter.calls),
        "steps_quartiles": [float(step) for step in steps],
        "converged": int(solution.converged.sum()),
        "residual": float(f"{worst_residual(batch.f, solution.z):.3g}"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all maps and save them."""
    given = options.parse(__doc__, arguments, list(BATCHES))
    if not can_compact():
        print("solve() of this version has no select=: compaction is not measured")
    results = [measure(name, given) for name in given.names]
    given.save("mixed_difficulty", tolerance=TOLERANCE, compaction=can_compact(), results=results)


if __name__ == "__main__":
    main()
