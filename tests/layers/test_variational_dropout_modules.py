"""Dropout modules: one mask per solve, of the right shape, scale, dtype and place."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from equilibria import DEQ, Cell, Implicit, Residual, UserError, solve, solve_scope
from equilibria.layers.embedding_dropout import EmbeddingDropout
from equilibria.layers.variational_dropout import (
    VariationalDropout,
    VariationalDropout1d,
    VariationalDropout2d,
    VariationalDropout3d,
    VariationalTokenDropout1d,
    VariationalTokenDropout2d,
    VariationalTokenDropout3d,
)
from equilibria.layers.weight_drop import weight_drop
from equilibria.testing import implicit_gradients

SHAPES = {1: (4, 6, 5), 2: (4, 6, 5, 3), 3: (4, 6, 5, 3, 2)}
CHANNELS = {1: VariationalDropout1d, 2: VariationalDropout2d, 3: VariationalDropout3d}
TOKENS = {
    1: VariationalTokenDropout1d,
    2: VariationalTokenDropout2d,
    3: VariationalTokenDropout3d,
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_channels_are_dropped_whole(dims: int, channels_last: bool) -> None:
    mask = CHANNELS[dims](0.5, channels_last=channels_last)(torch.ones(SHAPES[dims]))
    mask = mask if channels_last else mask.movedim(1, -1)
    assert (mask == mask[(slice(None), *(slice(0, 1),) * dims)]).all()
    assert mask.flatten(1, -2)[:, 0].unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_positions_are_dropped_whole(dims: int, channels_last: bool) -> None:
    mask = TOKENS[dims](0.5, channels_last=channels_last)(torch.ones(SHAPES[dims]))
    mask = mask.movedim(-1, 1) if channels_last else mask
    assert (mask == mask[:, :1]).all()
    assert mask[:, 0].unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_mean_are_kept(dtype: torch.dtype) -> None:
    x = torch.ones(200, 100, dtype=dtype)
    dropped = VariationalDropout(0.25)(x)
    assert dropped.dtype == dtype
    assert float(dropped.float().mean()) == pytest.approx(1.0, abs=0.02)


def test_mask_lives_where_the_tensor_does() -> None:
    assert VariationalDropout(0.5)(torch.ones(2, 3, device="meta")).device.type == "meta"


def test_nothing_happens_in_eval_mode_or_at_zero() -> None:
    x = torch.randn(3, 4)
    assert VariationalDropout(0.5).eval()(x) is x
    assert VariationalDropout(0.0)(x) is x


def test_everything_can_be_dropped() -> None:
    assert (VariationalDropout(1.0)(torch.randn(3, 4)) == 0).all()


def test_one_mask_in_a_solve_and_others_outside() -> None:
    dropout, x = VariationalDropout(0.5), torch.ones(8, 32)
    with solve_scope():
        first = dropout(x)
        assert torch.equal(dropout(x), first)
        assert not torch.equal(VariationalDropout(0.5)(x), first)
        assert dropout(torch.ones(8, 16)).shape == (8, 16)
    assert not torch.equal(dropout(x), first)


def test_a_seed_gives_the_same_masks() -> None:
    dropout, x = VariationalDropout(0.5), torch.ones(8, 32)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)


def test_modules_copy_and_pickle() -> None:
    dropout = VariationalDropout1d(0.3, channels_last=True)
    with solve_scope():
        dropout(torch.ones(2, 3, 4))
        assert copy.deepcopy(dropout).shared == (1,)
        assert pickle.loads(pickle.dumps(dropout)).p == 0.3
    assert "p=0.3" in repr(dropout)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(p: float) -> None:
    for make in (
        lambda: VariationalDropout(p),
        lambda: weight_drop(nn.Linear(2, 2), p),
        lambda: EmbeddingDropout(nn.Embedding(3, 2), p),
    ):
        with pytest.raises(UserError, match="no probability"):
            make()


def test_samples_cannot_share_a_mask() -> None:
    with pytest.raises(UserError, match="couple the samples"):
        VariationalDropout(0.5, shared=(0,))


def test_a_wrong_number_of_dimensions_is_named() -> None:
    with pytest.raises(UserError, match=r"VariationalDropout2d got .*\(2, 3, 4\) and takes 4"):
        VariationalDropout2d(0.5)(torch.ones(2, 3, 4))


class DroppedCell(Cell):
    """Dropout on the state and on the weight."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width).double()
        self.dropout = VariationalDropout(0.4)
        nn.init.orthogonal_(self.hidden.weight, gain=0.4)
        weight_drop(self.hidden, 0.3)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.dropout(z)) + injection)


def test_both_passes_see_one_function() -> None:
    cell = DroppedCell()
    layer = DEQ(
        cell,
        termination=Residual(1e-11, 1e-11),
        adjoint=Implicit(rtol=1e-12),
        max_steps=300,
        on_failure="raise",
    )
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 5, dtype=torch.float64)
    with solve_scope() as scope:
        z = layer(x).z
    wanted_for = (*cell.parameters(), x)
    found = torch.autograd.grad(z, wanted_for, g, retain_graph=True)

    def same_function(z: Tensor) -> Tensor:
        with scope.active():
            return cell(z, x)

    wanted = implicit_gradients(same_function, z.detach(), g, wanted_for)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_weight_drop_keeps_one_weight_per_solve() -> None:
    layer = nn.Linear(20, 20)
    stored = layer.weight.detach().clone()
    weight_drop(layer, 0.5)
    with solve_scope():
        first = layer.weight
        assert layer.weight is first
    assert {0.0, 2.0} == set((first / stored).detach().round(decimals=4).unique().tolist())
    assert not torch.equal(layer.weight, first)
    torch.testing.assert_close(layer.eval().weight, stored)


def test_weight_drop_names_the_nearest_parameter() -> None:
    with pytest.raises(UserError, match="no parameter 'wieght'; did you mean 'weight'"):
        weight_drop(nn.Linear(2, 2), names=("wieght",))


def test_weight_drop_of_a_recurrent_layer() -> None:
    cell = nn.GRUCell(4, 4)
    weight_drop(cell, 0.5, names=("weight_hh",))
    x = torch.randn(2, 4)
    with torch.no_grad():
        solution = solve(lambda h: cell(x, 0.1 * h), torch.zeros(2, 4), max_steps=100)
    assert solution.converged.all()


def test_words_are_dropped_everywhere_or_nowhere() -> None:
    embedding = nn.Embedding(50, 8)
    dropout = EmbeddingDropout(embedding, 0.5)
    tokens = torch.randint(50, (4, 60))
    with solve_scope():
        ratio = (dropout(tokens) / embedding(tokens)).detach()
        again = (dropout(tokens) / embedding(tokens)).detach()
    assert torch.equal(ratio, again)
    for word in tokens.unique():
        assert ratio[tokens == word].round(decimals=4).unique().numel() == 1
    assert set(ratio.round(decimals=4).unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(dropout.eval()(tokens), embedding(tokens))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_masks_under_vmap(randomness: str) -> None:
    dropout = VariationalDropout(0.5)
    dropped = torch.vmap(dropout, randomness=randomness)(torch.ones(8, 4, 16))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert bool((dropped == dropped[0]).all()) == (randomness == "same")
