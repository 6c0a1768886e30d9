"""A model for every cause that the doctor knows, and healthy ones with no finding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from equilibria import (
    DEQ,
    Anderson,
    AnyOf,
    Broyden,
    Cell,
    FixedPoint,
    FixedSteps,
    Implicit,
    OneStep,
    Picard,
    Residual,
    Reversible,
    ReversibleAdjoint,
    Shine,
    SolveSettings,
    Stagnation,
    Unrolled,
    UserError,
)
from equilibria.diagnostics.doctor import Finding, Report, Severity, doctor, examine

WIDTH = 6


class Plain(Cell):
    """tanh(W z + U x), |W| = gain; what the others vary."""

    def __init__(self, gain: float = 0.7) -> None:
        super().__init__()
        self.recurrent, self.input = nn.Linear(WIDTH, WIDTH), nn.Linear(3, WIDTH)
        with torch.no_grad():
            self.recurrent.weight.mul_(gain / torch.linalg.matrix_norm(self.recurrent.weight, 2))

    def inject(self, x: Tensor) -> Any:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injection)


class WithPart(Plain):
    """A module more, applied inside the map."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.part(self.recurrent(z)) + injection)


class Other(Plain):
    """Another map of the same parameters."""

    def __init__(self, f: Callable[[Plain, Tensor, Tensor], Tensor], gain: float = 0.7) -> None:
        super().__init__(gain)
        self.f = f

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return self.f(self, z, injection)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, z: Tensor) -> Tensor:
        self.mean.lerp_(z.detach().mean(0), 0.1)
        return z - 0.1 * self.mean


def with_weight_norm() -> Cell:
    cell = Plain()
    parametrizations.weight_norm(cell.recurrent)
    return cell


def diverging_backward() -> DEQ:
    """Expansive, so that the Neumann series cannot solve the backward system."""
    cell = Other(lambda c, z, u: torch.tanh(-2.0 * z + 0.01 * c.recurrent(z)) + 0.1 * u)
    return DEQ(cell, solver=Broyden(), adjoint=Implicit(FixedPoint(Picard())), max_steps=100)


class NearlySingular(Plain):
    """An eigenvalue of .9995 in a direction that the injection has no part in."""

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x) * torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        slope = torch.tensor([0.9995, 0.0, 0.1, 0.2, 0.3, 0.4])
        return slope * z + injection + 0.0 * self.recurrent(z)


def rotation(cell: Plain, z: Tensor, injection: Tensor) -> Tensor:
    """Turns by 90 degrees and stretches by 1.5: all eigenvalues are +-1.5 i."""
    turned = torch.stack((-z[:, 1::2], z[:, ::2]), dim=2).flatten(1)
    return 1.5 * torch.tanh(turned) + 0.01 * (cell.recurrent(z) + injection)


BATCH_STATISTICS = "batch-statistics"
SICK: dict[str, tuple[Callable[[], Cell | DEQ], set[str], set[str]]] = {
    # name: (model, causes that have to be named, causes that may be named besides)
    "batch norm": (
        lambda: WithPart(nn.BatchNorm1d(WIDTH)),
        {BATCH_STATISTICS},
        {"spectral-radius-above-one", "forward-solve-fails", "no-gradient"},
    ),
    "dropout": (lambda: WithPart(nn.Dropout(0.5)), {"randomness-inside-the-map"}, set()),
    "noise": (
        lambda: Other(lambda c, z, u: torch.tanh(c.recurrent(z) + u + 0.1 * torch.randn_like(z))),
        {"randomness-inside-the-map"},
        set(),
    ),
    "weight norm": (with_weight_norm, {"weights-recomputed-per-evaluation"}, set()),
    "spectral norm": (
        lambda: WithPart(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
        {"weights-recomputed-per-evaluation"},
        {"buffers-updated-inside-the-map"},  # while its power iteration still moves
    ),
    "running mean": (
        lambda: WithPart(RunningMean()),
        {"buffers-updated-inside-the-map"},
        {"forward-solve-fails", "cross-sample-coupling"},  # it updates, then uses the update
    ),
    "mean over the batch": (
        lambda: Other(lambda c, z, u: torch.tanh(c.recurrent(z - z.mean(0)) + u)),
        {"cross-sample-coupling"},
        set(),
    ),
    "unbounded": (
        lambda: Other(lambda c, z, u: -1.5 * z + c.recurrent(z) + u),
        {"unbounded-map", "spectral-radius-above-one"},
        set(),
    ),
    "rotation": (
        lambda: DEQ(Other(rotation), solver=Broyden()),
        {"spectral-radius-above-one"},
        {"unbounded-map"},
    ),
    "tolerance": (
        lambda: DEQ(Plain(), termination=Residual(1e-9, 0.0), adjoint=Implicit(rtol=1e-9)),
        {"tolerance-below-dtype"},
        {"forward-solve-fails", "backward-solve-fails"},
    ),
    "too few steps": (
        lambda: DEQ(Plain(), solver=Picard(), max_steps=2),
        {"forward-solve-fails"},
        set(),
    ),
    "no fixed point": (
        lambda: Other(lambda c, z, u: z + 1.0 + 0.0 * c.recurrent(z)),
        {"forward-solve-fails", "spectral-radius-above-one", "unbounded-map"},
        {"backward-solve-fails", "no-gradient"},
    ),
    "division by zero": (
        lambda: Other(lambda c, z, u: c.recurrent(z) / z.norm() + u),
        {"non-finite"},
        set(),
    ),
    "backward": (
        diverging_backward,
        {"backward-solve-fails", "spectral-radius-above-one"},
        set(),
    ),
    "sensitive": (
        NearlySingular,
        {"sensitive-to-injection"},
        {"backward-solve-fails"},
    ),
    "detached": (
        lambda: Other(lambda c, z, u: torch.tanh(c.recurrent(z).detach() + u)),
        {"no-gradient"},
        set(),
    ),
    "root at zero": (
        lambda: Other(lambda c, z, u: 0.3 * (c.recurrent(z) * 0.0).abs().sqrt() + 0.5 * z.tanh()),
        {"non-finite-gradient"},
        {"backward-solve-fails", "no-gradient"},
    ),
    "wrong shape": (
        lambda: Other(lambda c, z, u: c.recurrent(z)[:, :3]),
        {"form-of-state"},
        set(),
    ),
}


def as_deq(model: Cell | DEQ) -> DEQ:
    return model if isinstance(model, DEQ) else DEQ(model)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3)


@pytest.mark.parametrize("name", SICK)
def test_every_cause_is_named(name: str, x: Tensor) -> None:
    make, wanted, allowed = SICK[name]
    report = doctor(as_deq(make()), x)
    found = set(report.causes)
    assert wanted <= found, f"\n{report}"
    assert found <= wanted | allowed, f"\n{report}"
    assert not report.healthy
    assert all(len(f.evidence) > 20 and len(f.advice) > 20 for f in report.findings)


HEALTHY: dict[str, Callable[[], DEQ]] = {
    "tanh": lambda: DEQ(Plain()),
    "double": lambda: DEQ(Plain(), termination=Residual(1e-10, 0.0)).double(),
    "layer norm inside": lambda: DEQ(
        Other(
            lambda c, z, u: torch.tanh(nn.functional.layer_norm(0.2 * c.recurrent(z) + u, (WIDTH,)))
        )
    ),
    "picard": lambda: DEQ(Plain(), solver=Picard()),
    "one step": lambda: DEQ(Plain(), adjoint=OneStep()),
    "anderson backward": lambda: DEQ(Plain(), adjoint=Implicit(Anderson())),
    "fixed steps": lambda: DEQ(Plain(), termination=FixedSteps(20)),
    "batch norm in eval mode": lambda: DEQ(WithPart(nn.BatchNorm1d(WIDTH))).eval(),
    "dropout in eval mode": lambda: DEQ(WithPart(nn.Dropout(0.5))).eval(),
    "linear": lambda: DEQ(Other(lambda c, z, u: c.recurrent(z) + u)),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_finding(name: str, x: Tensor) -> None:
    deq = HEALTHY[name]()
    report = doctor(deq, x.to(next(deq.parameters()).dtype))
    assert report.healthy, f"\n{report}"
    assert "no findings" in str(report)
    assert report.measurements[""]["spectral radius"] < 1


def test_nothing_of_the_model_changes(x: Tensor) -> None:
    cell = WithPart(nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)))
    deq = DEQ(cell, on_failure="ignore")
    parametrizations.spectral_norm(cell.recurrent)
    deq(x).z.sum().backward()
    before = {name: tensor.clone() for name, tensor in deq.state_dict().items()}
    gradients = [p.grad.clone() for p in deq.parameters() if p.grad is not None]
    hooks = sum(len(part._forward_pre_hooks) for part in deq.modules())
    random_state = torch.get_rng_state()
    assert not doctor(deq, x).healthy
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in deq.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    after = [p.grad for p in deq.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, gradients, strict=True))
    assert sum(len(part._forward_pre_hooks) for part in deq.modules()) == hooks
    assert deq.training


def test_layers_inside_a_model_are_found_by_name(x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DEQ(Plain())
            self.second = DEQ(WithPart(nn.Dropout(0.5)))
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.head(self.first(x).z)).z)

    report = doctor(Model(), x)
    assert {finding.layer for finding in report.findings} == {"second"}
    assert set(report.measurements) == {"first", "second"}
    assert "in second" in str(report)
    assert "part (p=0.5)" in str(report)


def test_a_plain_map(x: Tensor) -> None:
    matrix = torch.diag(torch.tensor([0.5, -1.5, 0.2]))
    report = examine(lambda z: z @ matrix + x, torch.zeros_like(x))
    assert report.causes == ("unbounded-map", "spectral-radius-above-one")
    assert {finding.severity for finding in report.findings} == {Severity.WARNING}
    assert report.measurements[""]["spectral radius"] == pytest.approx(1.5, rel=1e-3)
    assert examine(lambda z: 0.5 * z + x, torch.zeros_like(x)).healthy


class Graph(Plain):
    """Messages between the rows of one graph, or between all rows where no graphs are given."""

    def inject(self, x: Tensor, graph: Tensor | None = None) -> Any:
        graph = torch.zeros(len(x)) if graph is None else graph
        same = (graph[:, None] == graph).float()
        return same / same.sum(1, keepdim=True), self.input(x)

    def initial_state(self, injection: Any) -> Tensor:
        return torch.zeros_like(injection[1])

    def forward(self, z: Tensor, injection: Any) -> Tensor:
        mean, u = injection
        return torch.tanh(self.recurrent(mean @ z) + u)


GRAPHS = torch.tensor([1, 0, 1, 1, 3])  # of different size, one without a node


def test_ragged_batches_and_one_global_problem_are_healthy(x: Tensor) -> None:
    deq = DEQ(Graph())
    ragged = doctor(deq, x, GRAPHS, segments=GRAPHS)
    assert ragged.healthy, f"\n{ragged}"
    assert ragged.measurements[""].keys() >= {"spectral radius", "sensitivity to the injection"}
    alone = doctor(deq, x, batch_dims=0)
    assert alone.healthy, f"\n{alone}"
    assert alone.measurements[""].keys() >= {"spectral radius", "sensitivity to the injection"}
    assert doctor(deq, x).causes == ("cross-sample-coupling",)
    assert "cross-sample-coupling" in doctor(deq, x, None, segments=GRAPHS).causes


def test_how_a_model_calls_its_layer_is_how_it_is_examined(x: Tensor) -> None:
    """Segments and settings come from inside, by `forward` or by `solve`."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = DEQ(Graph()), DEQ(Graph(), max_steps=1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(x, GRAPHS, segments=GRAPHS).z
            injection = self.second.cell.inject(z[:, :3])
            return self.second.solve(injection, batch_dims=0, settings=self.first.settings).z

    model = Model()
    report = doctor(model, x)
    assert report.healthy, f"\n{report}"
    assert "solve" not in vars(model.first)


def test_a_plain_map_of_graphs() -> None:
    same = (GRAPHS[:, None] == GRAPHS).double()
    c = torch.randn(5, 2, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(0.2 * same @ z + c)

    assert examine(f, torch.zeros_like(c), segments=GRAPHS).healthy
    assert examine(f, torch.zeros_like(c), batch_dims=0).healthy
    assert not examine(f, torch.zeros_like(c)).healthy


@pytest.mark.parametrize(
    "deq",
    [
        lambda: DEQ(
            Plain(),
            solver=Reversible(),
            adjoint=ReversibleAdjoint(),
            termination=FixedSteps(8),
            max_steps=8,
        ),
        lambda: DEQ(
            Plain(), solver=Broyden(), adjoint=Shine(), termination=FixedSteps(40), max_steps=40
        ),
        lambda: DEQ(Plain(), solver=Picard(), adjoint=Unrolled(), termination=FixedSteps(40)),
    ],
    ids=["reversible", "shine", "unrolled"],
)
def test_settings_that_only_go_together(deq: Callable[[], DEQ], x: Tensor) -> None:
    """The solves that the doctor makes of its own do not depend on them."""
    report = doctor(deq(), x)
    assert report.healthy, f"\n{report}"
    assert "sensitivity to the injection" in report.measurements[""]


@pytest.mark.parametrize(
    "termination",
    [
        Residual(1e-9, 0),
        Residual(0, 1e-10),
        AnyOf(Residual(1e-9, 0.0), Stagnation()),
        AnyOf(Stagnation(), AnyOf(Residual(1e-9, 0.0), Residual(1e-10, 0.0))),
    ],
    ids=str,
)
def test_a_tolerance_below_the_dtype_in_any_form(termination: Any, x: Tensor) -> None:
    causes = doctor(DEQ(Plain(), termination=termination), x).causes
    assert "tolerance-below-dtype" in causes


def test_a_rule_that_can_be_met_beside_one_that_cannot(x: Tensor) -> None:
    """The first of them to hold ends the solve."""
    termination = AnyOf(Residual(1e-9, 0.0), Residual(1e-4, 0.0))
    assert doctor(DEQ(Plain(), termination=termination), x).healthy


def test_an_absolute_tolerance_that_decides() -> None:
    small = 1e-4 * torch.rand(5, 3)

    def causes(**tolerances: float) -> tuple[str, ...]:
        settings = SolveSettings(termination=Residual(**tolerances))
        return examine(lambda z: 0.5 * z + small, torch.zeros(5, 3), settings).causes

    assert causes(rtol=1e-4, atol=1e-6) == ("absolute-tolerance-decides",)
    assert causes(rtol=1e-4, atol=0.0) == ()
    assert causes(rtol=1e-1, atol=1e-6) == ()
    assert causes(rtol=1e-4, atol=1e-3) == ()  # these fixed points count as zero, as is meant


def test_half_precision_states(x: Tensor) -> None:
    tight = examine(lambda z: 0.5 * z + x.bfloat16(), torch.zeros(5, 3).bfloat16())
    assert "tolerance-below-dtype" in tight.causes
    assert "bfloat16" in str(tight)
    advised = SolveSettings(termination=Residual(1e-2), adjoint=Implicit(rtol=1e-2))
    assert examine(lambda z: 0.5 * z + x.bfloat16(), torch.zeros(5, 3).bfloat16(), advised).healthy


def test_a_map_that_autocast_rounds(x: Tensor) -> None:
    """Whatever the state is, what f returns is rounded."""

    class Wide(Plain):
        def initial_state(self, injection: Tensor) -> Tensor:
            return torch.zeros_like(injection, dtype=torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        tight = doctor(DEQ(Wide()), x)
        loose = doctor(DEQ(Wide(), termination=Residual(1e-2)), x)
    assert "tolerance-below-dtype" in tight.causes
    assert "bfloat16" in str(tight)
    assert loose.healthy, f"\n{loose}"


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int, x: Tensor) -> None:
    assert doctor(DEQ(Plain()), x[:batch]).healthy


def test_nan_in_what_is_given_is_told_from_nan_in_the_map(x: Tensor) -> None:
    deq = DEQ(Plain(), on_failure="ignore")
    spoilt = x.clone()
    spoilt[2] = torch.nan
    assert "the injection" in doctor(deq, spoilt).findings[0].evidence
    with torch.no_grad():
        deq.cell.recurrent.weight[0, 0] = torch.nan
    assert "parameter recurrent.weight" in doctor(deq, x).findings[0].evidence


def test_models_without_a_layer_are_refused(x: Tensor) -> None:
    with pytest.raises(UserError, match="Linear has no DEQ layer"):
        doctor(nn.Linear(3, 3), x)


def test_a_report_in_words() -> None:
    once = Finding("no-gradient", Severity.WARNING, "", "weight gets none", "look for a detach")
    there = Finding("no-gradient", Severity.WARNING, "layers.2", "bias gets none", "look again")
    report = Report((once, there), {"": {"spectral radius": 0.5}, "layers.2": {"products": 7.0}})
    assert not report.healthy
    assert report.causes == ("no-gradient",)
    assert str(report).splitlines() == [
        "doctor: 2 findings",
        "[warning] no-gradient",
        "    found:  weight gets none",
        "    advice: look for a detach",
        "[warning] no-gradient in layers.2",
        "    found:  bias gets none",
        "    advice: look again",
        "measured: spectral radius 0.5",
        "measured in layers.2: products 7",
    ]
    assert Report(()).healthy
    assert str(Report((once,))).startswith("doctor: 1 finding\n")
