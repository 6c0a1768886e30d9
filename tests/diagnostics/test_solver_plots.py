from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equilibria import OneStep, Phantom, Picard, Residual, SolveSettings, UserError, solve
from equilibria.diagnostics.doctor import Finding, Report, Severity, examine
from equilibria.diagnostics.gradient_quality import GradientQuality, gradient_quality_of_solve
from equilibria.diagnostics.path_independence import path_independence_of_solve
from equilibria.diagnostics.solver_plots import (
    plot_gradient_quality,
    plot_path_independence,
    plot_report,
    plot_residuals,
    plot_spectrum,
)
from equilibria.diagnostics.spectrum import spectrum
from equilibria.testing import problem


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_residuals(tmp_path: Path) -> None:
    given = problem("tanh")
    traces = {}
    for name, solver in {"Picard": Picard(), "damped": Picard(relaxation=0.5)}.items():
        solution = solve(
            given.f, given.z0, solver=solver, termination=Residual(1e-8), max_steps=200, trace=True
        )
        assert solution.trace is not None
        traces[name] = solution.trace
    traces["zeros and NaN"] = torch.tensor([[1.0, 0.5], [0.0, torch.nan]])
    file = plot_residuals(traces, tmp_path / "new" / "residuals.png", tolerance=1e-8)
    assert png_size(file) == (1200, 750)
    assert [f.name for f in file.parent.iterdir()] == ["residuals.png"]


def test_gradient_qualities(tmp_path: Path) -> None:
    live = problem("tanh").differentiable()
    tensors = dict(zip(("x", "weight"), live.sources, strict=True))
    qualities: list[GradientQuality] = [
        gradient_quality_of_solve(live.f, live.z0, tensors, adjoint=adjoint)
        for adjoint in (OneStep(), Phantom())
    ]
    file = plot_gradient_quality(qualities, tmp_path / "quality.png")
    assert png_size(file) == (1200, 750)


@pytest.mark.parametrize("name", ["rotation", "expansive_linear"])
def test_eigenvalues(tmp_path: Path, name: str) -> None:
    given = problem(name)
    file = plot_spectrum(spectrum(given.f, given.z_star), tmp_path / "spectrum.png")
    assert png_size(file) == (1200, 750)


@pytest.mark.parametrize("batch", [1, 12])
def test_path_independence(tmp_path: Path, batch: int) -> None:
    """Samples with one fixed point, with three, and with none."""
    gain = torch.linspace(0.5, 2.5, batch).unsqueeze(1)
    drift = (gain > 2.2).float()
    report = path_independence_of_solve(
        lambda z: torch.tanh(gain * z) + drift * z,
        0.1 * torch.ones(batch, 4),
        settings=SolveSettings(solver=Picard(), termination=Residual(1e-5), max_steps=100),
    )
    file = plot_path_independence(report, tmp_path / "paths.png")
    assert png_size(file) == (1200, 750)
    nothing = path_independence_of_solve(lambda z: z, torch.zeros(0, 2))
    with pytest.raises(UserError, match="a batch with at least one"):
        plot_path_independence(nothing, file)


def finding(cause: str, severity: Severity, layer: str = "") -> Finding:
    return Finding(cause, severity, layer, f"what was $measured$ of {cause} " * 5, "do that " * 20)


@pytest.mark.parametrize(
    "report",
    [
        examine(lambda z: 0.5 * z + 1.0, torch.zeros(3, 2)),
        examine(lambda z: -1.5 * z + 1.0, torch.zeros(3, 2)),
        Report(
            tuple(finding(f"cause_{i}", Severity.ERROR, "first.deq") for i in range(7)),
            {
                "first.deq": {"spectral radius": 1.2, "zero": 0.0},
                "second": {"spectral radius": 0.5},
            },
        ),
        Report(()),
    ],
    ids=["healthy", "sick", "many findings and layers", "empty"],
)
def test_reports(tmp_path: Path, report: Report) -> None:
    assert png_size(plot_report(report, tmp_path / "report.png")) == (1200, 750)


def test_nothing_to_draw_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trace=True"):
        plot_residuals({}, tmp_path / "a.png")
    with pytest.raises(UserError, match="'Picard' is NoneType"):
        plot_residuals({"Picard": None}, tmp_path / "a.png")  # type: ignore[dict-item]
    with pytest.raises(UserError, match="gradient_quality"):
        plot_gradient_quality([], tmp_path / "a.png")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = (
        "import sys, equilibria.diagnostics.solver_plots, equilibria.diagnostics.doctor;"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
