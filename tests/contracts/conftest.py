"""Problems with known fixed points, and the solvers that every contract is checked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, Picard, Solver

BATCH, WIDTH = 4, 6


@dataclass(frozen=True)
class FixedPointProblem:
    """z = map(z, *parameters) with a known solution; every tensor leads with the batch.

    `hard` problems are beyond plain iteration and beyond a history of one vector. `accuracy`
    bounds the error at a relative residual of 1e-10, that is the norm of (I - J)^-1 times it.
    """

    map: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]
    z_star: Tensor
    z0: Tensor
    hard: bool = False
    accuracy: float = 1e-8

    def f(self, z: Tensor) -> Tensor:
        return self.map(z, *self.parameters)

    def rows(self, rows: slice) -> FixedPointProblem:
        """The same problem for some of its samples."""
        return replace(
            self,
            parameters=tuple(p[rows] for p in self.parameters),
            z_star=self.z_star[rows],
            z0=self.z0[rows],
        )


class Recorder:
    """Wraps a map, keeps every point it was asked for, and may spoil one sample from a call on."""

    def __init__(
        self, f: Callable[[Tensor], Tensor], *, spoil: int | None = None, from_call: int = 0
    ) -> None:
        self.f, self.spoil, self.from_call = f, spoil, from_call
        self.seen: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        image = self.f(z).clone()
        if self.spoil is not None and len(self.seen) >= self.from_call:
            image[self.spoil] = torch.nan
        self.seen.append(z.detach().clone())
        return image


def linear(z: Tensor, matrix: Tensor, constant: Tensor) -> Tensor:
    # Written as a sum, so that the order of additions does not depend on the size of the batch.
    return (matrix * z.unsqueeze(1)).sum(2) + constant


def linear_problem(matrix: Tensor, z_star: Tensor, **traits: object) -> FixedPointProblem:
    constant = z_star - linear(z_star, matrix, torch.zeros(()))
    return FixedPointProblem(linear, (matrix, constant), z_star, torch.zeros_like(z_star), **traits)  # type: ignore[arg-type]


def build(name: str) -> FixedPointProblem:
    draw = torch.Generator().manual_seed(0)
    double = {"dtype": torch.float64, "generator": draw}
    rotation = torch.linalg.qr(torch.randn(BATCH, WIDTH, WIDTH, **double))[0]
    z_star = torch.randn(BATCH, WIDTH, **double).clamp(-0.9, 0.9)
    radius = torch.tensor([0.1, 0.4, 0.6, 0.8], dtype=torch.float64).view(BATCH, 1, 1)

    def symmetric(eigenvalues: Tensor) -> Tensor:
        return rotation @ torch.diag(eigenvalues.double()) @ rotation.mT

    if name == "contraction":
        return linear_problem(radius * symmetric(torch.linspace(-1, 1, WIDTH)), z_star)
    if name == "tanh":
        shift = torch.atanh(z_star) - linear(z_star, 1.2 * radius * rotation, torch.zeros(()))
        return FixedPointProblem(
            lambda z, w, s: torch.tanh(linear(z, w, s)),
            (1.2 * radius * rotation, shift),
            z_star,
            torch.zeros_like(z_star),
        )
    if name == "non-normal":  # eigenvalues 0.5, but a norm of about 5: errors grow before they fall
        triangle = 2 * torch.triu(torch.randn(BATCH, WIDTH, WIDTH, **double), 1)
        matrix = rotation @ (triangle + 0.5 * torch.eye(WIDTH)) @ rotation.mT
        return linear_problem(matrix, z_star, accuracy=1e-6)
    if name == "expansive":
        eigenvalues = torch.tensor([-3.0, -1.5, -0.5, 0.2, 0.6, 2.0])
        return linear_problem(symmetric(eigenvalues), z_star, hard=True)
    if name == "stiff":  # I - J has eigenvalues from 1e-3 to 41
        eigenvalues = torch.tensor([-40.0, -1.0, 0.0, 0.5, 0.9, 0.999])
        return linear_problem(symmetric(eigenvalues), z_star, hard=True, accuracy=1e-5)
    if name == "zero":
        return FixedPointProblem(
            lambda z, r: r * torch.sin(z.flip(1)),
            (0.9 * radius.squeeze(2),),
            torch.zeros_like(z_star),
            z_star,
        )
    if name == "constant":
        return FixedPointProblem(
            lambda z, c: c.clone(), (z_star,), z_star, torch.zeros_like(z_star)
        )
    raise AssertionError(name)


@pytest.fixture(
    params=["contraction", "tanh", "non-normal", "expansive", "stiff", "zero", "constant"]
)
def problem(request: pytest.FixtureRequest) -> FixedPointProblem:
    return build(request.param)


@pytest.fixture
def easy_problem() -> FixedPointProblem:
    """One nonlinear contraction, for contracts that do not depend on the problem."""
    return build("tanh")


SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard-damped": Picard(relaxation=0.8),
    "anderson": Anderson(),
    "anderson-1": Anderson(history_size=1),
    "anderson-damped": Anderson(relaxation=0.8),
    "anderson-long": Anderson(history_size=10, ridge=0.0),
    "broyden": Broyden(),
    "broyden-4": Broyden(history_size=4),
    "broyden-full": Broyden(history_size=None),
    "broyden-damped": Broyden(relaxation=0.9),
}
CONTRACTIONS_ONLY = {"picard", "picard-damped", "anderson-1", "broyden-4"}


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> Solver:
    return SOLVERS[request.param]


@pytest.fixture
def solvable(problem: FixedPointProblem, solver: Solver) -> bool:
    """Whether the solver is expected to solve the problem; the others must say they did not."""
    weak = any(solver == SOLVERS[name] for name in CONTRACTIONS_ONLY)
    return not (problem.hard and weak)


@pytest.fixture
def record() -> type[Recorder]:
    return Recorder
