from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from equilibria import (
    DEQ,
    Cell,
    FixedSteps,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Residual,
    SolveSettings,
    Unrolled,
    UserError,
)
from equilibria.diagnostics.gradient_quality import (
    TensorQuality,
    gradient_quality,
    gradient_quality_of_solve,
)
from equilibria.testing import problem


class Masked(Cell):
    """A contraction with dropout in its injection and a spectral norm, to be left as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = parametrizations.spectral_norm(nn.Linear(6, 6))
        self.input, self.dropout = nn.Linear(3, 6), nn.Dropout(0.3)

    def inject(self, x: Tensor) -> Any:
        return self.recurrent.weight, self.dropout(self.input(x))

    def initial_state(self, injection: Any) -> Tensor:
        return torch.zeros_like(injection[1])

    def forward(self, z: Tensor, injection: Any) -> Tensor:
        weight, shift = injection
        return torch.tanh(0.8 * nn.functional.linear(z, weight, self.recurrent.bias) + shift)


@pytest.fixture
def deq() -> DEQ:
    return DEQ(Masked(), termination=Residual(1e-6))


def test_the_exact_method_agrees_with_itself(deq: DEQ) -> None:
    quality = gradient_quality(deq, torch.randn(4, 3))
    assert quality.overall.cosine == pytest.approx(1.0, abs=1e-5)
    assert quality.overall.norm_ratio == pytest.approx(1.0, abs=1e-3)
    assert {item.name for item in quality.parameters} == {n for n, _ in deq.cell.named_parameters()}
    assert quality.forward_converged == quality.exact_converged == 1.0


def test_cheap_methods_are_ranked_as_the_theory_says() -> None:
    """z = w z + 1 has dz/dw = z / (1 - w), one step gives z: a ratio of 1 - w per sample."""
    w = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(3, 2, dtype=torch.float64)
    settings = SolveSettings(termination=Residual(1e-12, 0.0), max_steps=200)

    def ratio(adjoint: Any) -> float:
        quality = gradient_quality_of_solve(
            lambda z: w * z + 1.0, z0, {"w": w}, adjoint=adjoint, settings=settings
        )
        assert quality.overall.cosine == pytest.approx(1.0)
        return quality.overall.norm_ratio

    assert ratio(OneStep()) == pytest.approx(0.25, rel=1e-6)
    # k plain steps sum the first k terms of the geometric series
    assert ratio(Phantom(num_steps=4, relaxation=1.0)) == pytest.approx(1 - 0.75**4, rel=1e-6)
    assert ratio(Implicit(rtol=1e-10)) == pytest.approx(1.0, rel=1e-6)


def test_a_parameter_whose_gradient_is_wrong_is_seen_by_name() -> None:
    """Two scales in one state: only the slow one suffers from a one-step gradient."""
    fast = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    slow = torch.tensor(0.95, dtype=torch.float64, requires_grad=True)
    quality = gradient_quality_of_solve(
        lambda z: torch.stack((fast * z[:, 0] + 1.0, slow * z[:, 1] + 1.0), dim=1),
        torch.zeros(2, 2, dtype=torch.float64),
        {"fast": fast, "slow": slow},
        adjoint=OneStep(),
        loss=lambda z: z.sum(),
    )
    ratios = {item.name: item.norm_ratio for item in quality.parameters}
    assert ratios["fast"] == pytest.approx(0.9, rel=1e-3)
    assert ratios["slow"] == pytest.approx(0.05, rel=1e-2)
    assert "slow" in str(quality)
    assert "0.050" in str(quality)


def test_ragged_batches_and_one_global_problem() -> None:
    """z = w n z + 1 where every row sees the sum of its n: one step gives 1 - w n of the length."""

    class Sums(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def inject(self, index: Tensor) -> Tensor:
            return (index[:, None] == index).double()

        def initial_state(self, injection: Tensor) -> Tensor:
            return injection.new_zeros(len(injection), 1)

        def forward(self, z: Tensor, injection: Tensor) -> Tensor:
            return self.w * (injection @ z) + 1.0

    deq = DEQ(Sums(), termination=Residual(1e-12, 0.0), adjoint=OneStep())
    index = torch.tensor([0, 1, 1, 0])
    ragged = gradient_quality(deq, index, segments=index, loss=torch.sum)
    assert ragged.overall.norm_ratio == pytest.approx(1 - 0.2 * 2, rel=1e-5)
    alone = gradient_quality(deq, 0 * index, batch_dims=0, loss=torch.sum)
    assert alone.overall.norm_ratio == pytest.approx(1 - 0.2 * 4, rel=1e-5)
    of_map = gradient_quality_of_solve(
        lambda z: deq.cell(z, deq.cell.inject(index)),
        torch.zeros(4, 1, dtype=torch.float64),
        {"w": deq.cell.w},
        adjoint=OneStep(),
        settings=deq.settings,
        segments=index,
        loss=torch.sum,
    )
    assert of_map.overall == replace(ragged.overall, name="all together")


def test_nothing_is_touched(deq: DEQ) -> None:
    x = torch.randn(4, 3)
    deq(x).z.sum().backward()
    gradients = {name: p.grad.clone() for name, p in deq.named_parameters()}
    buffers = {name: b.clone() for name, b in deq.named_buffers()}
    random_state = torch.get_rng_state()
    first = gradient_quality(deq, x, adjoint=OneStep())
    assert first == gradient_quality(deq, x, adjoint=OneStep())
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, p in deq.named_parameters():
        assert torch.equal(p.grad, gradients[name])
    for name, b in deq.named_buffers():
        assert torch.equal(b, buffers[name])
    assert deq.training


def test_a_failed_reference_is_called_in_doubt() -> None:
    w = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    quality = gradient_quality_of_solve(
        lambda z: w * z + 1.0,
        torch.zeros(2, 1, dtype=torch.float64),
        {"w": w},
        adjoint=OneStep(),
        exact=Implicit(Picard(), max_steps=3),
    )
    assert quality.exact_converged == 0.0
    assert quality.exact_residual == pytest.approx(3.0)  # the best is u = g, and J^T g is -3 g
    assert f"residual up to {quality.exact_residual:.1e}" in str(quality)
    assert "in doubt" in str(quality)


def test_a_reference_that_solves_nothing_has_no_residual(deq: DEQ) -> None:
    settings = replace(deq.settings, solver=Picard(), termination=FixedSteps(30))
    live = problem("tanh").differentiable()
    quality = gradient_quality_of_solve(
        live.f,
        live.z0,
        {"weight": live.sources[1]},
        adjoint=OneStep(),
        settings=settings,
        exact=Unrolled(),
    )
    assert math.isnan(quality.exact_residual)
    assert quality.exact_converged == 1.0
    assert isinstance(quality.overall, TensorQuality)
    assert 0.0 < quality.overall.cosine < 1.0


def test_bad_arguments(deq: DEQ) -> None:
    with pytest.raises(UserError, match="itself an approximation"):
        gradient_quality(deq, torch.randn(4, 3), exact=OneStep())
    with pytest.raises(UserError, match="no parameter requires a gradient"):
        gradient_quality(deq.requires_grad_(False), torch.randn(4, 3))
