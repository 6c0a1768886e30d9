"""What does a history in bfloat16 cost in evaluations?

    python -m benchmarks.rounded_history [--tiny]

The problem families of the comparison with other libraries, in float32, once with the history in
the precision of the state and once rounded (`history_dtype="bfloat16"`): evaluations of f to a
relative residual of 1e-3, 1e-4 and 1e-6. Deterministic; how fast the machine is does not matter.
Time is measured on a GPU, in `benchmarks/gpu/bf16_history.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmarks import options, ours
from benchmarks.counting import TOLERANCES, Counter, Enough
from benchmarks.families import FAMILIES
from equilibria import Anderson, Broyden

BUDGET = 500
SOLVERS = {
    "Anderson()": Anderson(),
    "Anderson(kind='II')": Anderson(kind="II"),
    "Broyden()": Broyden(),
}


def counted(solver: Anderson | Broyden, f: Any, z0: Tensor) -> list[int | None]:
    """Evaluations to each tolerance on one instance, in float32."""
    counter = Counter(lambda z: f(z.double()).float(), BUDGET)
    with contextlib.suppress(Enough):
        ours.run(solver)(counter, z0.float())
    return [count.num_evals for count in counter.counts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Count on all families and save."""
    given = options.parse(__doc__, arguments)
    families = FAMILIES[:1] if given.tiny else FAMILIES
    rows: list[dict[str, Any]] = []
    for name, solver in SOLVERS.items():
        for family in families:
            instances = [instance for _, instance in family.instances()][
                : 1 if given.tiny else None
            ]
            plain, rounded = (
                [counted(one, instance.f, instance.z0) for instance in instances]
                for one in (solver, replace(solver, history_dtype="bfloat16"))
            )
            rows.append({"solver": name, "family": family.name, "plain": plain, "rounded": rounded})
            print(f"{name:20} {family.name:30} {_summary(plain, rounded)}", flush=True)
    given.save("rounded_history", tolerances=TOLERANCES, budget=BUDGET, rows=rows)


def _summary(plain: list[list[int | None]], rounded: list[list[int | None]]) -> str:
    """Solved by either, and the ratio of evaluations where both did, per tolerance."""
    shown: list[str] = []
    for i in range(len(TOLERANCES)):
        pairs = [(p[i], r[i]) for p, r in zip(plain, rounded, strict=True)]
        both = [(p, r) for p, r in pairs if p is not None and r is not None]
        ratio = sum(r for _, r in both) / sum(p for p, _ in both) if both else float("nan")
        solved = [sum(pair[j] is not None for pair in pairs) for j in (0, 1)]
        shown.append(f"{ratio:.2f} ({solved[0]}, {solved[1]})")
    return ", ".join(shown)


if __name__ == "__main__":
    main()
