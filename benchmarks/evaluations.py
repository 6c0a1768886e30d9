"""How many evaluations of f does it take to reach a relative residual of 1e-3, 1e-4 and 1e-6?

    python -m benchmarks.evaluations [--libraries equilibria scipy ...] [--families Bratu ...]

Runs every solver of this library and of the others on every instance of every family, each
instance a problem of its own, from the same start in float64, and writes the counts of each
library to `results/evaluations_LIBRARY.json`. Counts are defined in counting.py, problems in
families.py, settings in ours.py and peers.py. Deterministic; how fast the machine is does not
matter.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks import ours, peers
from benchmarks.counting import TOLERANCES, Counter, Enough
from benchmarks.families import FAMILIES, NUM_INSTANCES, Family
from benchmarks.record import save

BUDGET = 500
"""Evaluations and products together, per instance."""

Run = Callable[[Counter, Tensor], None]


def main() -> None:
    """Run what is asked for and save it."""
    arguments = _parse()
    families = [f for f in FAMILIES if f.name in (arguments.families or [f.name])]
    libraries = {
        "equilibria": {name: ours.run(solver) for name, solver in ours.SOLVERS.items()},
        **peers.LIBRARIES,
    }
    for library in arguments.libraries:
        counts: dict[str, dict[str, Any]] = {}
        for family in families:
            started = time.perf_counter()
            counts[family.name] = {
                name: _measure(run, family) for name, run in libraries[library].items()
            }
            print(f"{library}, {family.name}: {time.perf_counter() - started:.1f} s", flush=True)
        save(
            f"evaluations_{library}",
            tolerances=TOLERANCES,
            budget=BUDGET,
            seeds=list(range(NUM_INSTANCES)),
            families={family.name: family.about for family in families},
            counts=counts,
        )


def _measure(run: Run, family: Family) -> list[Any]:
    """For each instance: evaluations to each tolerance, and products among them at the last."""
    results: list[Any] = []
    for _, instance in family.instances():
        counter = Counter(instance.f, BUDGET)
        failure = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of overflow, on the way to infinity
                run(counter, instance.z0)
        except Enough:
            pass
        except peers.Skipped as reason:
            return [{"skipped": str(reason)}]
        except Exception as error:  # noqa: BLE001  # a peer that gives up has its say
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        results.append(
            {
                "evaluations": [count.num_evals for count in counter.counts],
                "products": [count.num_products for count in counter.counts],
                "gave_up": failure,
            }
        )
    return results


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["equilibria", *peers.LIBRARIES]
    parser.add_argument("--libraries", nargs="+", choices=names, default=names)
    parser.add_argument("--families", nargs="+", choices=[family.name for family in FAMILIES])
    return parser.parse_args()


if __name__ == "__main__":
    main()
