"""`torch.export` of an inference solve with fixed steps."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    FixedSteps,
    Implicit,
    OneStep,
    Picard,
    Residual,
    Reversible,
    Unrolled,
    solve,
)
from equilibria.core.errors import UserError


class StateOnly(nn.Module):
    """What leaves an exported program are tensors, so not the `Solution`."""

    def __init__(self, deq: DEQ) -> None:
        super().__init__()
        self.deq = deq

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        solution = self.deq(x)
        return solution.z, solution.residual


def exported(module: nn.Module, x: Tensor) -> ExportedProgram:
    with torch.no_grad():
        return export(
            module.eval(), (x,), dynamic_shapes={"x": {0: Dim("batch", min=1)}}, strict=False
        )


def through_a_file(program: ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    "solver",
    [
        Picard(),
        pytest.param(Anderson(), marks=pytest.mark.slow),
        pytest.param(Anderson(kind="II", safeguard=2.0), marks=pytest.mark.slow),
        pytest.param(Broyden(), marks=pytest.mark.slow),
        pytest.param(Broyden(kind="bad"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_inputs_and_batch_sizes_after_saving_and_loading(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any
) -> None:
    model = StateOnly(
        make_deq(eval_solver=solver, eval_termination=FixedSteps(4), on_failure="warn")
    )
    loaded = through_a_file(exported(model, x))
    for batch in (1, 2, 4, 7):
        inputs = torch.randn(batch, 3, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs), model(inputs))


@pytest.mark.slow
def test_channels_last_and_a_half_precision_state() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Conv2d(2, 2, 3, padding=1).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return solve(
                lambda z: torch.tanh(0.3 * self.kernel(z) + x),
                torch.zeros_like(x),
                solver=Picard(),
                termination=FixedSteps(3),
            ).z

    x = torch.randn(2, 2, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    model = Convolution()
    with torch.no_grad():
        z = export(model, (x,), strict=False).module()(x)
        torch.testing.assert_close(z, model(x))
    assert z.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"termination": Residual(1e-4)},
        {"termination": FixedSteps(4), "solver": Reversible()},
        {"termination": FixedSteps(4), "on_failure": "raise"},
    ],
    ids=str,
)
def test_what_asks_for_numbers_is_refused(
    make_deq: Callable[..., DEQ], x: Tensor, settings: dict[str, Any]
) -> None:
    model = StateOnly(make_deq(**({"on_failure": "warn"} | settings)))
    with pytest.raises(UserError, match=r"termination=FixedSteps\(\.\.\.\)"):
        exported(model, x)


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=str)
def test_gradients_are_not_exported_and_never_lost_silently(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    model = StateOnly(make_deq(termination=FixedSteps(2), on_failure="warn", adjoint=adjoint))
    with pytest.raises(UserError, match="torch.no_grad()"):
        export(model, (x,), strict=False)
