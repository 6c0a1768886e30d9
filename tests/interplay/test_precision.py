"""Devices without double precision: nothing wider than the state is made there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria import (
    Anderson,
    Broyden,
    Fallback,
    FixedSteps,
    Implicit,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    Unrolled,
    solve,
)
from equilibria.core import precision
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.gmres import GMRES
from equilibria.linear.neumann import Neumann

SOLVERS = [
    Picard(),
    Anderson(),
    Anderson(kind="II", safeguard=2.0),
    Broyden(),
    Broyden(kind="bad", line_search=True),
    NewtonKrylov(),
    Reversible(reconstruction_tolerance=None),
    Fallback(Anderson(), Picard()),
]
ADJOINTS = [
    Implicit(GMRES()),
    Implicit(BiCGStab()),
    Implicit(Neumann()),
    Implicit(Anderson()),
    OneStep(),
    Phantom(),
    NeumannSeries(clip=1.0),
    Unrolled(),
]


class NoDouble(TorchDispatchMode):
    """Refuses what MPS has no memory for; Python numbers, which are double, stay on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() > 0:
                raise TypeError(f"{func} made a float64 tensor")
        return result


@pytest.fixture(autouse=True)
def a_device_without_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "DEVICES_WITHOUT_DOUBLE", {"cpu"})


def differentiate(**settings: Any) -> None:
    x = torch.randn(3, 4)
    weight = torch.full((4, 4), 0.1, requires_grad=True)
    solution = solve(
        lambda z: torch.tanh(z @ weight + x), torch.zeros(3, 4), on_failure="raise", **settings
    )
    solution.z.square().mean().backward()


def test_the_watch_is_awake() -> None:
    with NoDouble(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_no_solver_makes_double(solver: Any) -> None:
    with NoDouble():
        differentiate(solver=solver)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_no_gradient_makes_double(adjoint: Any) -> None:
    with NoDouble():
        differentiate(adjoint=adjoint)


def test_fixed_steps_and_records_make_no_double() -> None:
    with NoDouble():
        differentiate(termination=FixedSteps(3), trace=True, states="all")


def test_segments_make_no_double() -> None:
    index = torch.tensor([0, 1, 1])
    with NoDouble():
        differentiate(segments=index, termination=Residual(1e-4))
