"""The solvers of this library, as the comparison runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.counting import Counter
from equilibria.core.loop import iterate
from equilibria.core.problem import Problem
from equilibria.core.solver import Solver
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.picard import Picard
from equilibria.solvers.reversible import Reversible
from equilibria.terminations.fixed_steps import FixedSteps

MAX_STEPS = 2000

SOLVERS: dict[str, Solver] = {
    "Picard()": Picard(),
    "Anderson()": Anderson(),
    "Anderson(20)": Anderson(20),
    "Anderson(None)": Anderson(None),
    "Anderson(kind='II')": Anderson(kind="II"),
    "Anderson(20, kind='II')": Anderson(20, kind="II"),
    "Anderson(None, kind='II')": Anderson(None, kind="II"),
    "Broyden()": Broyden(),
    "Broyden(None)": Broyden(None),
    "NewtonKrylov()": NewtonKrylov(products="forward"),
    "Reversible()": Reversible(reconstruction_tolerance=None),
    "Fallback(Anderson(), Broyden())": Fallback(Anderson(), Broyden()),
}


def run(solver: Solver) -> Callable[[Counter, Tensor], None]:
    """A run that goes on until the counter has seen enough."""

    def go(counter: Counter, z0: Tensor) -> None:
        with torch.no_grad():
            iterate(Problem(counter, z0), solver, FixedSteps(MAX_STEPS), max_steps=MAX_STEPS)

    return go
