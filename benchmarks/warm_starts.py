"""What do warm starts save in training?

A DEQ, z = tanh(W z + U x + b), 64 wide, reads eight characters of Python's own documentation
(one-hot) and predicts the ninth: 512 fixed windows, 15 epochs of batches of 64 in an order drawn
anew every epoch, Adam. The same data, initial weights and order for every warm start; "augmented"
replaces one character of each window at every visit. Evaluations and products are counted by the
map itself, as the mean per batch over the last epoch; a batch is evaluated until its slowest
sample is done. The gradient of W at the last batch is compared with a dense solve at a fixed point
found from a cold start.

    python -m benchmarks.warm_starts
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass, field, replace
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import save
from equilibria import DEQ, Cached, Cell, Implicit, Previous, Residual, WarmStart, solve
from equilibria.testing import implicit_gradients

WIDTH, CONTEXT, SAMPLES, BATCH, EPOCHS, SEEDS = 64, 8, 512, 64, 15, range(2)
LETTERS = " abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Case:
    """A warm start forward and one backward, and the conditions."""

    name: str
    forward: WarmStart | None = None
    backward: WarmStart | None = None
    rtol: float = 1e-4
    learning_rate: float = 1e-3
    augmented: bool = False


CACHED = Cached(SAMPLES)
STARTS = [
    Case("cold"),
    Case("Previous() forward", Previous()),
    Case("Cached forward", CACHED),
    Case("Cached, bfloat16, forward", Cached(SAMPLES, dtype=torch.bfloat16)),
    Case("Cached, half the samples, forward", Cached(SAMPLES // 2)),
    Case("Cached forward and backward", CACHED, CACHED),
]
BOTH = (STARTS[0], STARTS[-1])
CASES = [
    *STARTS,
    *(replace(case, rtol=1e-2) for case in BOTH),
    *(replace(case, learning_rate=1e-4) for case in BOTH),
    *(replace(case, augmented=True) for case in BOTH),
]


@dataclass
class Counted:
    """Evaluations and products since the last reset."""

    evaluations: int = 0
    products: int = 0
    history: list[tuple[int, int]] = field(default_factory=list)

    def close(self) -> None:
        """End of a batch."""
        self.history.append((self.evaluations, self.products))
        self.evaluations = self.products = 0


class Reader(Cell):
    """tanh(W z + U x + b), counting."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.input = nn.Linear(CONTEXT * len(LETTERS), WIDTH, bias=False)
        nn.init.orthogonal_(self.hidden.weight, gain=0.9)
        nn.init.normal_(self.input.weight, std=0.5)

    def inject(self, x: Tensor) -> Tensor:
        return self.input(F.one_hot(x, len(LETTERS)).flatten(1).to(self.input.weight))

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        self.counted.evaluations += 1
        image = torch.tanh(self.hidden(z) + injection)
        if image.requires_grad:
            image.register_hook(self._count)
        return image

    def _count(self, cotangent: Tensor) -> None:
        self.counted.products += 1


def windows(seed: int) -> tuple[Tensor, Tensor]:
    """Contexts (N, CONTEXT) and next letters (N,) from random places of the text."""
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).lower().split())
    codes = torch.tensor([LETTERS.index(c) for c in text if c in LETTERS])
    draw = torch.Generator().manual_seed(seed)
    places = torch.randint(len(codes) - CONTEXT - 1, (SAMPLES, 1), generator=draw)
    both = codes[places + torch.arange(CONTEXT + 1)]
    return both[:, :CONTEXT], both[:, CONTEXT]


def train(case: Case, seed: int) -> dict[str, float]:
    """One training run."""
    x, y = windows(seed)
    torch.manual_seed(seed)
    cell, head = Reader(), nn.Linear(WIDTH, len(LETTERS))
    deq = DEQ(
        cell,
        termination=Residual(case.rtol),
        adjoint=Implicit(rtol=case.rtol, max_steps=100, warm_start=case.backward),
        max_steps=100,
        on_failure="raise",
        warm_start=case.forward,
    )
    optimizer = torch.optim.Adam([*deq.parameters(), *head.parameters()], lr=case.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in range(EPOCHS):
        for index in torch.randperm(SAMPLES, generator=draw).split(BATCH):
            given = augmented(x[index], draw) if case.augmented else x[index]
            solution = deq(given, sample_index=index)
            loss = F.cross_entropy(head(solution.z), y[index])
            optimizer.zero_grad()
            loss.backward()
            cell.counted.close()
            losses.append(loss.item())
            optimizer.step()
    # once more, without a step, to look at the gradient
    optimizer.zero_grad()
    F.cross_entropy(head(deq(given, sample_index=index).z), y[index]).backward()
    num_batches = SAMPLES // BATCH
    evaluations, products = zip(*cell.counted.history[-num_batches:], strict=True)
    return {
        "evaluations": statistics.mean(evaluations),
        "products": statistics.mean(products),
        "loss": statistics.mean(losses[-num_batches:]),
        "gradient_error": gradient_error(cell, head, given, y[index]),
    }


def augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """One letter of each window replaced."""
    places = torch.randint(CONTEXT, (len(x), 1), generator=draw)
    letters = torch.randint(len(LETTERS), (len(x), 1), generator=draw)
    return x.scatter(1, places, letters)


def gradient_error(cell: Reader, head: nn.Linear, x: Tensor, y: Tensor) -> float:
    """Relative error of the gradient of W, against a dense solve in float64 from a cold start."""
    twin, head = copy.deepcopy(cell).double(), copy.deepcopy(head).double()
    injection = twin.inject(x).detach()

    def f(z: Tensor) -> Tensor:
        return twin(z, injection)

    with torch.no_grad():
        cold = torch.zeros_like(injection)
        z = solve(
            f, cold, termination=Residual(1e-11, 0.0), max_steps=500, on_failure="raise"
        ).z.requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(head(z), y), z)
    (exact,) = implicit_gradients(f, z.detach(), g, (twin.hidden.weight,))
    return float((cell.hidden.weight.grad - exact).norm() / exact.norm())


def run() -> list[dict[str, Any]]:
    """All cases; medians over the seeds."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        runs = [train(case, seed) for seed in SEEDS]
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        about = {
            "rtol": case.rtol,
            "learning_rate": case.learning_rate,
            "augmented": case.augmented,
            "start": case.name,
        }
        rows.append({**about, **medians})
        print(*(f"{value:>35}" if isinstance(value, str) else value for value in about.values()),
              *(f"{value:9.4g}" for value in medians.values()))  # fmt: skip
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    save("warm_starts", seeds=list(SEEDS), width=WIDTH, samples=SAMPLES, batch=BATCH,
         epochs=EPOCHS, rows=run())  # fmt: skip
