"""Weight and spectral norm: computed once per solve, over any layer, safe to copy and save."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from equilibria import DEQ, Adjoint, Cell, Implicit, Residual, Unrolled, UserError, solve_scope
from equilibria.layers.weight_drop import weight_drop
from equilibria.normalizations.once_per_solve import OncePerSolve, remove_normalization
from equilibria.normalizations.spectral_norm import spectral_norm
from equilibria.normalizations.weight_norm import weight_norm
from equilibria.testing import implicit_gradients

NORMS: list[Callable[[nn.Module], list[str]]] = [weight_norm, spectral_norm]


class ReadsOften(Cell):
    """Uses its weight twice per evaluation."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width).double()
        nn.init.orthogonal_(self.hidden.weight, gain=0.4)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.hidden(torch.tanh(self.hidden(z))) + injection)


def layer(adjoint: Adjoint | None = None) -> DEQ:
    return DEQ(
        ReadsOften(),
        adjoint=adjoint or Implicit(rtol=1e-12),
        termination=Residual(1e-11, 1e-11),
        max_steps=300,
        on_failure="raise",
    )


def count_computations(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, OncePerSolve):
            inner = module.parametrization.forward

            def counted(*originals: Tensor, inner: Callable[..., Tensor] = inner) -> Tensor:
                calls.append(1)
                return inner(*originals)

            monkeypatch.setattr(module.parametrization, "forward", counted)
    return calls


@pytest.mark.parametrize("norm", NORMS)
def test_computed_once_per_solve(
    norm: Callable[[nn.Module], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deq = layer()
    assert norm(deq) == ["cell.hidden.weight"]
    calls = count_computations(deq, monkeypatch)
    x = torch.randn(3, 4, dtype=torch.float64)
    deq(x).z.sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        deq(x)
    assert len(calls) == 2


@pytest.mark.parametrize("adjoint", [None, Unrolled(), Unrolled(checkpoint=True)], ids=repr)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_reach_the_original_tensors(
    norm: Callable[[nn.Module], list[str]], adjoint: Adjoint | None
) -> None:
    deq = layer(adjoint)
    norm(deq)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, dtype=torch.float64)
    sources = (*deq.parameters(), x)
    with solve_scope() as scope:
        z = deq(x).z
    found = torch.autograd.grad(z, sources, g, retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in found)

    def same_function(z: Tensor) -> Tensor:
        with scope.active():
            return deq.cell(z, x)

    wanted = implicit_gradients(same_function, z.detach(), g, sources)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_copies_averages_and_saves(norm: Callable[[nn.Module], list[str]], tmp_path: Path) -> None:
    deq = layer()
    norm(deq)
    x = torch.randn(3, 4, dtype=torch.float64)
    deq(x).z.sum().backward()
    deq.eval()
    expected = deq(x).z
    torch.testing.assert_close(copy.deepcopy(deq)(x).z, expected)
    average = AveragedModel(deq)
    average.update_parameters(deq)
    torch.testing.assert_close(average.eval()(x).z, expected)
    torch.save(deq.state_dict(), tmp_path / "weights.pt")
    other = layer()
    norm(other)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(other.eval()(x).z, expected)
    single = copy.deepcopy(deq).to(torch.float32)
    loose = replace(deq.eval_settings, termination=Residual(1e-5))
    assert single(x.float(), settings=loose).z.dtype == torch.float32


def test_weight_norm_loads_checkpoints_of_pytorchs_own() -> None:
    plain, mine = nn.Linear(3, 4), nn.Linear(3, 4)
    nn.utils.parametrizations.weight_norm(plain)
    weight_norm(mine)
    mine.load_state_dict(plain.state_dict())
    torch.testing.assert_close(mine.weight, plain.weight)


@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_of_layer_is_found(norm: Callable[[nn.Module], list[str]]) -> None:
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "mine": MyLinear(3, 4),
            "attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
            "packed": nn.MultiheadAttention(4, 2),
            "conv": nn.Conv2d(3, 4, 3),
            "words": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "gates": nn.GRUCell(3, 4),
        }
    )
    assert set(norm(model)) == {
        "mine.weight",
        "attention.q_proj_weight",
        "attention.k_proj_weight",
        "attention.v_proj_weight",
        "attention.out_proj.weight",
        "packed.in_proj_weight",
        "packed.out_proj.weight",
        "conv.weight",
        "gates.weight_ih",
        "gates.weight_hh",
    }
    query = torch.randn(5, 1, 4)
    out, _ = model["packed"](query, query, query)
    out.sum().backward()
    assert all(p.grad is not None for p in model["packed"].parameters())


def test_patterns_choose() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    assert weight_norm(model, include=["0.*", "2.weight"], exclude=["2.*"]) == ["0.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"'0\.wieght' fits no weight; did you mean '0\.weight'"):
        weight_norm(nn.Sequential(nn.Linear(2, 2)), **{option: ["0.wieght"]})


@pytest.mark.parametrize("norm", NORMS)
def test_removal_keeps_the_function(norm: Callable[[nn.Module], list[str]]) -> None:
    deq = layer()
    norm(deq)
    x = torch.randn(3, 4, dtype=torch.float64)
    deq.eval()
    before = deq(x).z
    assert remove_normalization(deq) == ["cell.hidden.weight"]
    torch.testing.assert_close(deq(x).z, before)
    assert isinstance(deq.cell.hidden.weight, nn.Parameter)


def test_spectral_norm_bounds_the_largest_singular_value() -> None:
    linear = nn.Linear(20, 20).double()
    nn.init.normal_(linear.weight)
    spectral_norm(linear, coefficient=0.9, num_iterations=30)
    for _ in range(5):
        with solve_scope():
            weight = linear.weight
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(0.9, rel=1e-3)


def test_spectral_norm_advances_once_per_solve_and_never_in_eval_mode() -> None:
    linear = nn.Linear(6, 6)
    spectral_norm(linear)
    vectors = {name: b for name, b in linear.named_buffers() if name.endswith("_u")}
    assert len(vectors) == 1
    (vector,) = vectors.values()

    def moved(read: Callable[[], object]) -> bool:
        before = vector.clone()
        read()
        return not torch.equal(before, vector)

    assert moved(lambda: linear.weight)
    with solve_scope():
        _ = linear.weight
        assert not moved(lambda: linear.weight)
    linear.eval()
    assert not moved(lambda: linear.weight)


@pytest.mark.parametrize("coefficient", [0.0, -1.0, float("nan")])
def test_spectral_norm_refuses_senseless_coefficients(coefficient: float) -> None:
    with pytest.raises(UserError, match="coefficient"):
        spectral_norm(nn.Linear(2, 2), coefficient=coefficient)


def test_a_spectrally_normalised_map_converges_by_plain_iteration() -> None:
    from equilibria import Picard

    deq = DEQ(
        ReadsOften(16),
        solver=Picard(),
        max_steps=200,
        termination=Residual(1e-8),
        on_failure="raise",
    )
    nn.init.normal_(deq.cell.hidden.weight, std=3.0)
    spectral_norm(deq, coefficient=0.9, num_iterations=20)
    for _ in range(3):
        solution = deq(torch.randn(4, 16, dtype=torch.float64))
    assert solution.converged.all()


# --- derivatives of weight norm ----------------------------------------------------------------


def normalised(width: int = 3, **options: int | None) -> DEQ:
    deq = DEQ(
        ReadsOften(width),
        adjoint=Implicit(rtol=1e-13, max_steps=99),
        termination=Residual(1e-13),
        max_steps=300,
        on_failure="raise",
    )
    weight_norm(deq, **options)
    return deq


@pytest.mark.parametrize("dim", [0, 1, None])
def test_second_derivatives_by_normalised_weights(dim: int | None) -> None:
    """PyTorch's own weight norm gets them wrong."""
    deq = normalised(dim=dim)
    x = torch.randn(2, 3, dtype=torch.float64)
    names, weights = zip(*deq.named_parameters(), strict=True)
    assert any(name.endswith("original1") for name in names)

    def layer(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(deq, dict(zip(names, weights, strict=True)), (x,)).z

    assert torch.autograd.gradcheck(layer, weights)
    assert torch.autograd.gradgradcheck(layer, weights)


def test_normalised_weights_under_function_transforms() -> None:
    deq = normalised()
    x = torch.randn(2, 3, dtype=torch.float64)
    g, v = (f"cell.hidden.parametrizations.weight.original{i}" for i in range(2))
    values = {name: p.detach() for name, p in deq.named_parameters()}

    def loss(g_value: Tensor, v_value: Tensor) -> Tensor:
        return (
            torch.func.functional_call(deq, values | {g: g_value, v: v_value}, (x,)).z.pow(3).sum()
        )

    at = (values[g], values[v])
    direction = tuple(torch.randn_like(value) for value in at)

    def slope(t: float) -> Tensor:
        moved = tuple(a + t * d for a, d in zip(at, direction, strict=True))
        gradients = torch.func.grad(loss, argnums=(0, 1))(*moved)
        return sum((a * d).sum() for a, d in zip(gradients, direction, strict=True))

    _, push = torch.func.jvp(loss, at, direction)
    torch.testing.assert_close(push, slope(0.0))
    blocks = torch.func.hessian(loss, argnums=(0, 1))(*at)
    curvature = sum(
        torch.tensordot(a, torch.tensordot(block, b, b.dim()), a.dim())
        for row, a in zip(blocks, direction, strict=True)
        for block, b in zip(row, direction, strict=True)
    )
    finite = (slope(1e-5) - slope(-1e-5)) / 2e-5
    torch.testing.assert_close(curvature, finite, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dim", [-1, 2])
def test_weight_norm_refuses_dimensions_that_a_weight_does_not_have(dim: int) -> None:
    with pytest.raises(UserError, match=f"dim={dim}.*None for one length"):
        weight_norm(nn.Linear(2, 2), dim=dim)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_the_originals_are_those_of_pytorch(dim: int | None) -> None:
    plain = nn.Conv1d(3, 4, 2)
    mine = copy.deepcopy(plain)
    nn.utils.parametrizations.weight_norm(plain, dim=dim)
    weight_norm(mine, dim=dim)
    theirs = plain.state_dict()
    assert list(mine.state_dict()) == list(theirs)
    for name, value in mine.state_dict().items():
        torch.testing.assert_close(value, theirs[name])
    torch.testing.assert_close(mine.weight, plain.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_loads_the_names_before_parametrisations() -> None:
    old, mine = nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(3, 4)
    weight_norm(mine)
    mine.load_state_dict(old.state_dict())
    torch.testing.assert_close(mine.weight, old.weight)


# --- pickling ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stabilise",
    [weight_norm, spectral_norm, partial(spectral_norm, coefficient=0.5), weight_drop, None],
)
def test_normalised_layers_pickle(
    stabilise: Callable[[nn.Module], object] | None, tmp_path: Path
) -> None:
    """PyTorch pickles no module with a parametrised weight."""
    deq = layer()
    for kind in [stabilise] if stabilise else [weight_norm, weight_drop]:
        kind(deq.cell.hidden)
    x = torch.randn(3, 4, dtype=torch.float64)
    deq(x).z.sum().backward()
    torch.save(deq, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    again = pickle.loads(pickle.dumps(loaded))
    assert [name for name, _ in again.named_parameters()] == [n for n, _ in deq.named_parameters()]
    for twin in (loaded, again, copy.copy(deq)):
        torch.testing.assert_close(twin.eval()(x).z, deq.eval()(x).z, rtol=0, atol=0)
    again(x).z.sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert not torch.equal(assigned(again).weight, deq.cell.hidden.weight)
    if stabilise in (weight_norm, spectral_norm):
        remove_normalization(again)
        assert type(again.cell.hidden) is nn.Linear


def assigned(deq: DEQ) -> nn.Linear:
    """A parametrised weight still takes what is assigned to it."""
    deq.cell.hidden.weight = torch.randn(4, 4, dtype=torch.float64)
    return deq.cell.hidden


def test_recurrent_layers_with_dropped_weights_pickle() -> None:
    lstm = nn.LSTM(3, 4)
    weight_drop(lstm, names=("weight_hh_l0",))
    x = torch.randn(5, 2, 3)
    again = pickle.loads(pickle.dumps(lstm.eval()))
    torch.testing.assert_close(again(x)[0], lstm(x)[0])
