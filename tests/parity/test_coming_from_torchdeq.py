"""What the migration page says is the same is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Residual,
    solve,
)

torchdeq = pytest.importorskip("torchdeq")

TIGHT = {"f_max_iter": 100, "f_tol": 1e-11, "f_stop_mode": "rel"}
BACKWARD = {"ift": True, "b_max_iter": 100, "b_tol": 1e-11, "b_stop_mode": "rel"}
EXACT = Implicit(rtol=1e-11, max_steps=100)


@pytest.fixture
def hidden() -> nn.Linear:
    linear = nn.Linear(8, 8).double()
    nn.init.orthogonal_(linear.weight, gain=0.5)
    return linear


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"f_solver": "anderson", "b_solver": "anderson", **BACKWARD},
            {"solver": Anderson(), "adjoint": EXACT},
        ),
        (
            {"f_solver": "broyden", "b_solver": "broyden", **BACKWARD},
            {"solver": Broyden(), "adjoint": EXACT},
        ),
        ({"f_solver": "fixed_point_iter"}, {"solver": Picard(), "adjoint": OneStep()}),
        (
            {"f_solver": "fixed_point_iter", "grad": 4, "tau": 0.7},
            {"solver": Picard(), "adjoint": Phantom(num_steps=4, relaxation=0.7)},
        ),
    ],
    ids=["anderson", "broyden", "one step", "phantom"],
)
def test_options_have_the_equivalents_that_the_page_names(
    hidden: nn.Linear, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(hidden(z) + x)

    their_z = torchdeq.get_deq(**TIGHT, **theirs)(f, torch.zeros_like(x))[0][-1]
    our_z = solve(f, torch.zeros_like(x), termination=Residual(1e-11, 0.0), max_steps=100, **ours).z
    torch.testing.assert_close(our_z, their_z, rtol=1e-8, atol=1e-9)
    for found, wanted in zip(
        torch.autograd.grad(our_z.square().sum(), list(hidden.parameters())),
        torch.autograd.grad(their_z.square().sum(), list(hidden.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_their_absolute_tolerance_is_a_euclidean_norm(hidden: nn.Linear) -> None:
    x = torch.randn(1, 8, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(hidden(z) + x)

    settings = {"f_solver": "fixed_point_iter", "f_max_iter": 60, "f_tol": 1e-6}
    _, info = torchdeq.get_deq(**settings, f_stop_mode="abs")(f, torch.zeros_like(x))
    solution = solve(
        f,
        torch.zeros_like(x),
        solver=Picard(),
        termination=Residual(rtol=0.0, atol=1e-6 / 8**0.5),
        adjoint=OneStep(),
    )
    assert abs(float(info["nstep"][0]) - float(solution.num_steps[0])) <= 1
