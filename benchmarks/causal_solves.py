"""Which solver suits a causal cell, and how many positions should it solve at a time?

    equilibria train ptb-trellisnet-small --data FOLDER
    python -m benchmarks.causal_solves RUN

The trained TrellisNet of a run on the beginning of its validation text, 8 streams of 64 words: mean
evaluations per part, forward to a relative residual of 1e-2 and 1e-3, and products of the backward
solve of a random cotangent to 1e-2, for parts of 1 to 64 positions. All positions of a part are
evaluated at once, so that arithmetic is in proportion to these numbers whatever the length. Counts,
which depend on no clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import record
from equilibria import Anderson, Broyden, Implicit, Picard, Residual
from equilibria.api import SolveSettings
from equilibria.cli.runs import load_task, on_text, open_run
from equilibria.linear.gmres import GMRES
from equilibria.linear.neumann import Neumann
from equilibria.models.deq_trellisnet import DEQTrellisNet
from equilibria.models.trellis_cell import last_position

LENGTHS = (1, 4, 8, 16, 64)
FORWARD = {
    "Picard()": Picard(),
    "Anderson(2)": Anderson(2),
    "Anderson(6)": Anderson(6),
    "Broyden()": Broyden(),
}
BACKWARD = {"Neumann()": Neumann(), "GMRES()": GMRES()}
BUDGET = 100


def forward(model: DEQTrellisNet, tokens: Tensor, length: int, settings: Any) -> dict[str, Any]:
    """Mean evaluations per part, and the share of samples that reached the tolerance."""
    memory, evaluations, converged = None, [], []
    with torch.no_grad():
        for part in model.embed(tokens).split(length, dim=1):
            solution = model.deq.solve(model.cell.inject(part, memory), settings=settings)
            evaluations.append(solution.num_evals)
            converged.append(solution.converged.double().mean().item())
            memory = last_position(cast(Any, solution.z), part)
    count = len(evaluations)
    return {"evaluations": sum(evaluations) / count, "solved": sum(converged) / count}


def backward(model: DEQTrellisNet, tokens: Tensor, length: int, solver: Any) -> float:
    """Mean products per part."""
    settings = SolveSettings(
        solver=Picard(),
        termination=Residual(1e-4),
        adjoint=Implicit(solver=solver, rtol=1e-2, max_steps=BUDGET),
        max_steps=2 * BUDGET,
        on_failure="ignore",
    )
    memory, products = None, []
    generator = torch.Generator().manual_seed(0)
    for part in model.embed(tokens).split(length, dim=1):
        solution = model.deq.solve(model.cell.inject(part, memory), settings=settings)
        h, c = cast(tuple[Tensor, Tensor], solution.z)
        (h * torch.randn(h.shape, generator=generator)).sum().backward(retain_graph=True)
        result = solution.backward.result
        products.append(0 if result is None else int(result.num_steps.max()))
        memory = last_position((h.detach(), c.detach()), part.detach())
    return sum(products) / len(products)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run of a DEQ-TrellisNet")
    parser.add_argument("--output", type=Path, default=record.RESULTS, help="folder of the result")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run, experiment = open_run(given.run)
    task, data, step = load_task(run, experiment, "last")
    _, corpus = on_text(task, data)
    model = cast(DEQTrellisNet, task.model.eval())
    tokens = corpus.valid[: 8 * 64].long().view(8, 64)
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        for name, solver in FORWARD.items():
            for rtol in (1e-2, 1e-3):
                settings = SolveSettings(
                    solver=solver, termination=Residual(rtol), max_steps=BUDGET,
                    on_failure="ignore",
                )  # fmt: skip
                found = forward(model, tokens, length, settings)
                rows.append({"length": length, "solver": name, "rtol": rtol, **found})
                print(rows[-1], flush=True)
        for name, solver in BACKWARD.items():
            products = backward(model, tokens, length, solver)
            rows.append({"length": length, "solver": name, "products": products})
            print(rows[-1], flush=True)
    record.save(
        "causal_solves", given.output, device="cpu", recipe="ptb-trellisnet-small", step=step,
        budget=BUDGET, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
