"""What is GMRES's own: orthogonal directions, and an exhausted space."""

from __future__ import annotations

import pytest
import torch

from equilibria import GMRES, Status

pytestmark = pytest.mark.usefixtures("steps")


def test_directions_stay_orthogonal_on_an_ill_conditioned_system() -> None:
    """Orthogonalised once they do not, and 150 steps bring the residual to 0.9 of what it was."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(-5, 0, 60, dtype=torch.float64)) @ basis.mT
    b = torch.randn(1, 60, dtype=torch.float64)
    result = GMRES().solve(lambda u: u - u @ matrix.mT, b, rtol=1e-9, atol=0.0, max_steps=61)
    assert result.status[0] == Status.SUCCESS
    assert (b - result.u @ matrix.mT).norm() < 1e-9 * b.norm()


def test_an_exhausted_space_takes_nothing_off_the_residual() -> None:
    """(I - A) e_1 = e_2 and (I - A) e_2 = 0, so e_1 stays what it is."""
    a = torch.eye(3, dtype=torch.float64)
    a[1, 0] = -1.0
    b = torch.eye(3, dtype=torch.float64)[:2]
    result = GMRES().solve(lambda u: u @ a.mT, b, rtol=1e-6, atol=0.0, max_steps=5, trace=True)
    assert (result.status == Status.MAX_STEPS).all()
    assert result.trace is not None
    torch.testing.assert_close(result.trace, torch.ones_like(result.trace))


def test_cycles_that_gain_nothing_have_stalled() -> None:
    """More of them would not help, as more steps of the first one would."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)

    def solved(restart: int, max_steps: int) -> Status:
        result = GMRES(restart).solve(
            lambda u: u - u @ turn, b, rtol=1e-6, atol=0.0, max_steps=max_steps
        )
        assert result.num_steps[0] <= 2
        return Status(int(result.status[0]))

    assert solved(1, 50) == Status.STALLED
    assert "larger restart" in Status.STALLED.message
    assert solved(2, 1) == Status.MAX_STEPS
    assert solved(2, 50) == Status.SUCCESS
