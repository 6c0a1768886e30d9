"""Does the Jacobian penalty on its own make solves shorter?

tanh(W z + x), 20 units, 16 samples; W is trained on the penalty alone (weight 1, applied at half of
60 steps, Adam at 0.02), from a contraction and from expansive maps. Counted are the evaluations of
the default Anderson to a relative residual of 1e-4.

    python -m benchmarks.jacobian_penalty
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.record import save
from equilibria import JacobianRegularizer, Residual, Solution, jacobian_penalty, solve

GAINS, SEEDS, STEPS, WIDTH, BATCH = (0.9, 1.2, 1.6), range(4), 60, 20, 16


def train(gain: float, seed: int) -> dict[str, Any]:
    """Penalty and evaluations before and after."""
    torch.manual_seed(seed)
    weight = (gain * torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)).requires_grad_()
    x = torch.randn(BATCH, WIDTH)
    regularizer = JacobianRegularizer(weight=1.0, probability=0.5)
    optimizer = torch.optim.Adam([weight], lr=0.02)

    def solved() -> Solution:
        return solve(
            lambda z: torch.tanh(z @ weight.mT + x),
            torch.zeros(BATCH, WIDTH),
            termination=Residual(1e-4),
            max_steps=200,
            on_failure="ignore",
        )

    def measured() -> dict[str, Any]:
        solution = solved()
        penalty = float(jacobian_penalty(solution, num_probes=20).detach().mean())
        return {"penalty": round(penalty, 3), "evaluations": solution.num_evals}

    before = measured()
    for step in range(STEPS):
        loss = regularizer(solved(), step=step)
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    row = {"gain": gain, "seed": seed, "before": before, "after": measured()}
    print(row)
    return row


if __name__ == "__main__":
    save("jacobian_penalty", rows=[train(gain, seed) for gain in GAINS for seed in SEEDS])
