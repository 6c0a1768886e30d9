"""Finished samples leave the batch, and nothing but the cost tells the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Anderson,
    AnyOf,
    Broyden,
    Cell,
    Divergence,
    Fallback,
    FixedSteps,
    Implicit,
    NeumannSeries,
    OneStep,
    Picard,
    Residual,
    Shine,
    Solution,
    Stagnation,
    Unrolled,
    UserError,
    solve,
)
from equilibria.core.scope import once
from equilibria.layers.monotone import MonotoneCell
from equilibria.layers.variational_dropout import VariationalDropout
from equilibria.models.deq_transformer import DEQTransformerCell, DEQTransformerConfig

pytestmark = pytest.mark.usefixtures("steps")

BATCH, WIDTH = 24, 6


class Rows:
    """Counts what f is given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def watched(self, f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counted(z: Tensor) -> Tensor:
            self.batches.append(z.shape[0])
            return f(z)

        return counted

    @property
    def total(self) -> int:
        return sum(self.batches)


def uneven(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A weight (D, D), and contraction factors (B, 1) from very easy to hard, in mixed order."""
    weight = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=dtype))[0]
    rates = torch.linspace(0.02, 0.97, BATCH, dtype=dtype)[torch.randperm(BATCH)]
    return weight, rates.unsqueeze(1)


@torch.no_grad()  # no recorded evaluation, which is of the whole batch
def solved(rows: Rows, compact: bool, **options: Any) -> Solution:
    torch.manual_seed(0)
    weight, rates = uneven()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    settings = {"termination": Residual(1e-8), "max_steps": 200} | options
    return solve(
        rows.watched(lambda z: torch.tanh(rates * (z @ weight) + x)),
        torch.zeros_like(x),
        select=lambda i: rows.watched(lambda z: torch.tanh(rates[i] * (z @ weight) + x[i])),
        compact=compact,
        **settings,
    )


TERMINATIONS = [
    Residual(1e-8),
    AnyOf(Residual(1e-8), Stagnation(30), Divergence()),
    Residual(1e-8, max_growth=None),
]


@pytest.mark.parametrize("termination", TERMINATIONS, ids=repr)
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(4), Anderson(4, kind="II"), Broyden(5), Broyden(None)], ids=repr
)
def test_every_figure_is_the_same(solver, keep, termination):
    options = {"solver": solver, "keep": keep, "termination": termination}
    together, apart = Rows(), Rows()
    wanted, found = solved(together, False, **options), solved(apart, True, **options)
    assert torch.equal(found.status, wanted.status)
    assert bool(found.converged.all())
    assert bool(((found.num_steps - wanted.num_steps).abs() <= 1).all())
    torch.testing.assert_close(found.z, wanted.z, rtol=1e-6, atol=1e-7)
    assert found.num_evals == len(apart.batches)
    useful = int((wanted.num_steps + 1).sum())
    assert together.total == BATCH * (int(wanted.num_steps.max()) + 1)
    # an eighth may wait for others to finish
    assert useful <= apart.total <= 1.2 * useful + BATCH
    residual = solved_residual(found)
    torch.testing.assert_close(found.residual, residual)


def solved_residual(solution: Solution) -> Tensor:
    return (solution.function(solution.z) - solution.z).square().mean(1).sqrt()


def test_samples_that_fail_are_reported_where_they_were():
    torch.manual_seed(0)
    x = torch.randn(9, 4)
    x[2] = torch.nan
    scale = torch.full((9, 1), 0.3)
    scale[5] = 0.999

    def restricted(i: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.sin(scale[i] * z) + x[i]

    every = torch.arange(9)
    options: dict[str, Any] = {"max_steps": 4, "on_failure": "ignore", "solver": Picard()}
    wanted = solve(restricted(every), torch.zeros(9, 4), **options)
    found = solve(restricted(every), torch.zeros(9, 4), select=restricted, **options)
    assert torch.equal(found.status, wanted.status)
    assert set(wanted.status.tolist()) >= {1, 4}
    torch.testing.assert_close(found.z, wanted.z)


class Uneven(Cell):
    """Contraction by sample; dropout inside the map."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0])
        self.dropout = VariationalDropout(p)
        self.rows = Rows()

    def inject(self, x: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight, rates

    def initial_state(self, injection: tuple[Tensor, Tensor]) -> Tensor:
        return torch.zeros_like(injection[0])

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        self.rows.batches.append(z.shape[0])
        x, rates = injection
        return torch.tanh(rates * self.dropout(z @ self.weight) + x)

    def select(self, injection: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return injection[0][rows], injection[1][rows]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("adjoint", [Implicit(rtol=1e-10), OneStep(), NeumannSeries(3)], ids=repr)
def test_gradients_of_a_layer(adjoint, p):
    found = []
    for compact in (True, False):
        torch.manual_seed(0)
        _, rates = uneven()
        layer = DEQ(
            Uneven(p).double(), compact=compact, adjoint=adjoint, termination=Residual(1e-10),
            max_steps=200,
        )  # fmt: skip
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        solution = layer(x, rates)
        solution.z.square().sum().backward()
        assert (min(layer.cell.rows.batches) < BATCH) == compact
        found.append((solution.z.detach(), x.grad, layer.cell.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"adjoint": Unrolled(), "solver": Picard()},
        {"adjoint": Shine(), "solver": Broyden()},
        {"solver": Fallback(Picard(), Broyden())},
        {"solver": Anderson(safeguard=10.0)},
        {"termination": FixedSteps(20)},
        {"compact": False},
    ],
    ids=repr,
)
def test_who_needs_the_whole_batch_keeps_it(options):
    _, rates = uneven(torch.float32)
    layer = DEQ(Uneven(), **({"max_steps": 60, "on_failure": "ignore"} | options))
    layer(torch.randn(BATCH, WIDTH), rates)
    assert set(layer.cell.rows.batches) == {BATCH}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_cell_is_not_given_batches_of_every_size(in_place):
    _, rates = uneven(torch.float32)
    cell: Any = Uneven()
    if in_place:
        cell.compile(backend="eager")
    else:
        cell = torch.compile(cell, backend="eager")
    layer = DEQ(cell, max_steps=100)
    assert layer._selector((torch.randn(BATCH, WIDTH), rates)) is None


@pytest.mark.parametrize("asked", [{"trace": True}, {"states": 3}], ids=repr)
def test_what_follows_every_sample_keeps_the_batch(asked):
    _, rates = uneven(torch.float32)
    layer = DEQ(Uneven(), max_steps=100)
    solution = layer(torch.randn(BATCH, WIDTH), rates, **asked)
    assert set(layer.cell.rows.batches) == {BATCH}
    assert solution.trace is not None or len(solution.states) == 3


def test_a_transformer_and_a_monotone_layer_let_samples_go():
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        d_model=8, num_heads=2, d_inner=12, dropout=0.2, weight_norm=True, init_std=0.3
    )
    sizes = torch.logspace(-1, 2, 16).view(-1, 1, 1)
    transformer = DEQTransformerCell(config).double()
    monotone = MonotoneCell(5, 7).double()
    for cell, x in (
        (transformer, sizes * torch.randn(16, 5, 8)),
        (monotone, sizes[:, 0] * torch.randn(16, 5)),
    ):
        found = []
        for compact in (True, False):
            torch.manual_seed(1)
            layer = DEQ(cell, compact=compact, termination=Residual(1e-7), max_steps=300)
            found.append(layer(x.double()).z)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_shared_value_whose_rows_are_no_samples_is_refused():
    rates = torch.linspace(0.1, 0.95, 16).unsqueeze(1)
    x = torch.randn(16, 4)

    def folded(rates: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        def f(z: Tensor) -> Tensor:
            halves = z.reshape(-1, 2)
            mask = once("mask", lambda: torch.ones_like(halves), rows=halves.shape[0])
            return torch.tanh(rates * (halves * mask).view_as(z) + x)

        return f

    with pytest.raises(UserError, match=r"rows cannot be told apart.*compact=False"):
        solve(folded(rates, x), torch.zeros(16, 4), select=lambda i: folded(rates[i], x[i]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": 3}, r"select is a int, expected a function of indices"),
        ({"select": lambda i: torch.cos, "batch_dims": 0}, "batch_dims=0"),
        ({"select": lambda i: torch.cos, "segments": torch.tensor([0, 0, 1])}, "segments"),
        ({"compact": 1}, r"compact=1 must be True or False"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        solve(torch.cos, torch.zeros(3, 2), **options)


def test_a_mask_that_does_not_go_by_samples_is_never_drawn_anew():
    """Its one row is as many as are left, and still no sample's."""
    drop, weight = VariationalDropout(0.5), 0.5 * torch.eye(64)
    scale, x = torch.tensor([[1.0], [0.01]]), torch.randn(2, 64)

    def restricted(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.tanh(scale[rows] * (z @ weight) + x[rows] + drop(torch.ones(1, 64)))

    with pytest.raises(UserError, match="rows cannot be told apart"):
        solve(restricted(torch.arange(2)), torch.zeros(2, 64), select=restricted)


def test_the_indices_are_the_callers_to_write_to():
    def flipped(rows: Tensor) -> Callable[[Tensor], Tensor]:
        mine = rows.clone()
        rows.fill_(0)
        return lambda z: torch.sin(rates[mine] * z) + x[mine]

    rates, x = torch.linspace(0.1, 0.95, 16).unsqueeze(1), torch.randn(16, 4)
    rates, x, z0 = rates.double(), x.double(), torch.zeros(16, 4, dtype=torch.float64)
    rule = Residual(1e-9)
    found = solve(flipped(torch.arange(16)), z0, select=flipped, termination=rule)
    wanted = solve(lambda z: torch.sin(rates * z) + x, z0, termination=rule)
    torch.testing.assert_close(found.z, wanted.z, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fault", ["other samples", "in place"])
def test_an_f_of_other_samples_and_one_that_writes_are_found_out(fault):
    rates, x = torch.linspace(0.1, 0.95, 16).unsqueeze(1), torch.randn(16, 4)

    def restricted(rows: Tensor) -> Callable[[Tensor], Tensor]:
        if fault == "other samples":
            rows = torch.arange(len(rows))
            return lambda z: torch.sin(rates[rows] * z) + x[rows]
        return lambda z: torch.add(torch.sin(rates[rows] * z), x[rows], out=z)

    message = "images than the whole f" if fault == "other samples" else "wrote to the state"
    with pytest.raises(UserError, match=message):
        solve(lambda z: torch.sin(rates * z) + x, torch.zeros(16, 4), select=restricted)
