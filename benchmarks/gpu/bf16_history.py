"""What does a history in bfloat16 save in time, and in memory?

Steps of Anderson and Broyden on large states, f being one operation, with the history in the
precision of the state and rounded (`history_dtype="bfloat16"`), plain and fused. What it costs in
evaluations is counted in `benchmarks/rounded_history.py`.

    python -m benchmarks.gpu.bf16_history [--device cuda] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import options
from benchmarks.options import Options
from benchmarks.peak import peak_bytes
from benchmarks.timing import Spread, ratio
from benchmarks.variants import eager_and_fused
from equilibria import Anderson, Broyden, Residual, Solver, solve

SHAPES = ((8, 100_000), (8, 262_144), (64, 262_144))
SOLVERS: dict[str, Anderson | Broyden] = {"Anderson(10)": Anderson(10), "Broyden(20)": Broyden(20)}


def measured(name: str, shape: tuple[int, int], given: Options) -> dict[str, Any]:
    """Microseconds of a step and peak memory with either history."""
    batch, width = shape
    x = 0.1 * torch.randn(batch, width, device=given.device)
    c = torch.linspace(0.1, 0.9, width, device=given.device)
    z0, num_steps = torch.zeros_like(x), 3 if given.tiny else 30
    unreachable = Residual(rtol=1e-30, atol=1e-30)

    def run(solver: Solver) -> Callable[[], object]:
        return lambda: solve(
            lambda z: torch.addcmul(x, z, c), z0, solver=solver, termination=unreachable,
            max_steps=num_steps, on_failure="ignore",
        )  # fmt: skip

    cases: dict[str, Callable[[], object]] = {}
    for variant, solver in eager_and_fused(SOLVERS[name], given.device).items():
        cases[variant] = run(solver)
        if variant == "eager" or given.device.type == "cuda":  # Numba knows no bfloat16
            cases[f"{variant}, rounded"] = run(replace(solver, history_dtype="bfloat16"))
    with torch.no_grad():
        seconds = given.interleave(cases, rounds=7)
        peaks = {case: peak_bytes(call, given.device) for case, call in cases.items()}
    state = x.numel() * x.element_size()
    row = {
        "solver": name,
        "batch": batch,
        "width": width,
        "microseconds_per_step": {
            case: Spread.of([1e6 * s / num_steps for s in values]).as_dict()
            for case, values in seconds.items()
        },
        "speed_up": {
            case: ratio(values, seconds[f"{case}, rounded"]).as_dict()
            for case, values in seconds.items()
            if f"{case}, rounded" in seconds
        },
        "peak_states": {case: round(peak / state, 2) for case, peak in peaks.items()},
    }
    print(row)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and save."""
    given = options.parse(__doc__, arguments)
    shapes = ((2, 64),) if given.tiny else SHAPES
    rows = [measured(name, shape, given) for name in SOLVERS for shape in shapes]
    given.save("bf16_history", rows=rows)


if __name__ == "__main__":
    main()
