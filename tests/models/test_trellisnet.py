"""TrellisNet, unrolled and at equilibrium."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import GMRES, Anderson, Implicit, Picard, UserError
from equilibria.models.config import SolveConfig, unrolled_settings
from equilibria.models.deq_trellisnet import DEQTrellisNet, DEQTrellisNetConfig
from equilibria.models.trellis_cell import TrellisCell, TrellisConfig
from equilibria.models.trellisnet import TrellisNet, TrellisNetConfig
from equilibria.testing.cell_contract import CellContract

TIGHT = SolveConfig(
    solver=Anderson(),
    rtol=1e-12,
    max_steps=100,
    adjoint=Implicit(GMRES(), rtol=1e-12, max_steps=100),
)
SMALL: dict[str, Any] = {
    "d_embed": 4,
    "d_hidden": 6,
    "dropout": 0.0,
    "input_dropout": 0.0,
    "output_dropout": 0.0,
    "init_std": 0.4,
}


def make(config: type[TrellisConfig] = DEQTrellisNetConfig, **options: Any) -> Any:
    torch.manual_seed(3)
    solve = {"solve": TIGHT} if config is DEQTrellisNetConfig else {}
    return config(**{**SMALL, **solve, **options}).build(11).double()


class TestTrellisCell(CellContract):
    """The promises of every cell."""

    def make_cell(self) -> TrellisCell:
        return TrellisCell(DEQTrellisNetConfig(**{**SMALL, "dropout": 0.2, "weight_dropout": 0.2}))

    def make_inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 5, 4),)


def recurrent_truth(model: DEQTrellisNet, tokens: Tensor) -> Tensor:
    """Outputs, position by position, each solved for by itself: h_t = o tanh(c_t) of h_t."""
    cell, x = model.cell, model.embed(tokens)
    width = cell.config.d_state
    w_past, w_now = cell.convolution.weight.split(width, 1)
    u_past, u_now = cell.injection.weight.split(4, 1)
    h = c = x.new_zeros(x.shape[0], width)
    before = torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(x.shape[1]):
        fixed = h @ w_past.T + before @ u_past.T + x[:, t] @ u_now.T + cell.injection.bias
        h_new = torch.zeros_like(h)
        for _ in range(200):  # a contraction in h_t alone
            i, o, g, f = (fixed + h_new @ w_now.T).chunk(4, 1)
            c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_new = o.sigmoid() * c_new.tanh()
        h, c, before = h_new, c_new, x[:, t]
        outputs.append(h[:, -4:])
    return torch.stack(outputs, 1)


def test_the_equilibrium_is_that_of_every_position_after_the_other(tokens):
    model = make()
    output = model(tokens)
    assert output.solution.converged.all()
    wanted = recurrent_truth(model, tokens) @ model.embedding.weight.T + model.output_bias
    torch.testing.assert_close(output.logits, wanted)


def test_many_layers_come_to_the_equilibrium(tokens):
    deq, deep = make(), make(TrellisNetConfig, num_layers=150)
    deep.load_state_dict({k.replace("deq.cell", "cell"): v for k, v in deq.state_dict().items()})
    torch.testing.assert_close(deep(tokens).logits, deq(tokens).logits)


def test_few_layers_are_the_unrolled_deq(tokens):
    deq, shallow = make(), make(TrellisNetConfig, num_layers=3)
    shallow.load_state_dict({k.replace("deq.cell", "cell"): v for k, v in deq.state_dict().items()})
    unrolled = deq(tokens, settings=unrolled_settings(3)).logits
    torch.testing.assert_close(shallow(tokens).logits, unrolled)


@pytest.mark.parametrize("remember", [True, False], ids=["remembering", "forgetful"])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_parts_have_the_solution_of_the_whole(length, remember, tokens):
    whole, parts = (make(remember_input=remember, subsequence_length=n) for n in (None, length))
    memory = whole(tokens.flip(1), memory_length=1).memory
    one, other = whole(tokens, memory), parts(tokens, memory)
    torch.testing.assert_close(other.logits, one.logits)
    gradients = [
        torch.autograd.grad(output.logits.square().sum(), list(model.parameters()))
        for model, output in ((whole, one), (parts, other))
    ]
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_parts_are_reported_as_one(tokens):
    model = make(subsequence_length=3)
    solution = model(tokens).solution
    assert solution.backward.result is None
    steps = solution.num_steps
    alone = []
    memory = None
    for part in tokens.split(3, 1):
        output = model(part, memory, memory_length=1)
        memory = output.memory
        alone.append(output.solution)
    assert torch.equal(steps + 1, sum(one.num_steps + 1 for one in alone))
    assert solution.num_evals == sum(one.num_evals for one in alone)
    again = model(tokens)
    again.logits.sum().backward()
    assert again.solution.backward.result is not None
    assert again.solution.backward.seconds > 0
    assert again.solution.backward.result.num_steps.shape == (2,)


@pytest.mark.parametrize(
    "model",
    [make(), make(TrellisNetConfig, num_layers=150)],
    ids=["equilibrium", "many-layers"],
)
def test_segments_with_memory(model, tokens):
    """At equilibrium they are the whole text; few layers know only the padding of the last."""
    model.eval()
    whole = model(tokens).logits
    first = model(tokens[:, :4], memory_length=1)
    second = model(tokens[:, 4:], first.memory, memory_length=1)
    parts = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(parts, whole)
    assert [m.shape[1] for m in second.memory] == [1, 1, 1]
    again = model.memory_from([m.clone() for m in first.memory])
    assert torch.equal(model(tokens[:, 4:], again).logits, second.logits)
    with pytest.raises(UserError, match="belongs to another model"):
        model.memory_from(first.memory[:2])
    assert model(tokens).memory == ()


@pytest.mark.parametrize("config", [DEQTrellisNetConfig, TrellisNetConfig])
def test_no_token_sees_its_future(config, tokens):
    model = make(config).eval()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    change = (model(tokens).logits - model(other).logits).abs().amax((0, 2))
    assert change[:5].max() < 1e-9
    assert change[5:].min() > 1e-9


def test_gradients_are_those_of_many_layers(tokens):
    deq, deep = make(), make(TrellisNetConfig, num_layers=150)
    deep.load_state_dict({k.replace("deq.cell", "cell"): v for k, v in deq.state_dict().items()})
    gradients = []
    for model in (deq, deep):
        losses = model(tokens, targets=tokens.roll(-1, 1)).losses
        gradients.append(torch.autograd.grad(losses.mean(), list(model.parameters())))
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-9)


def test_plain_iteration_is_exact_after_as_many_steps_as_positions_are_long():
    """Without a weight on the same position every step settles one position for good."""
    model = make(solve=SolveConfig(solver=Picard(), rtol=1e-14, max_steps=12), weight_norm=False)
    width = model.cell.config.d_state
    with torch.no_grad():
        model.cell.convolution.weight[:, width:] = 0.0
    solution = model(torch.arange(9).unsqueeze(0)).solution
    assert solution.converged.all()
    assert solution.num_steps.max() <= 10


@pytest.mark.parametrize(
    "name", ["dropout", "input_dropout", "output_dropout", "embedding_dropout", "weight_dropout"]
)
def test_dropouts_act_in_training_alone(name, tokens):
    model, plain = make(**{name: 0.4}), make()
    first, second = model(tokens), model(tokens)
    assert first.solution.converged.all()
    assert not torch.allclose(first.logits, second.logits)
    torch.testing.assert_close(model.eval()(tokens).logits, plain.eval()(tokens).logits)
    with pytest.raises(UserError, match=name):
        DEQTrellisNetConfig(**{name: 1.0})


def test_a_mixture_of_softmaxes(tokens):
    model = make(num_softmaxes=3)
    output = model(tokens, targets=tokens.roll(-1, 1))
    output.losses.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(model(tokens).logits.exp().sum(-1), torch.ones(2, 9))
    names = [name for name, _ in model.named_parameters()]
    assert "mixture.weight" not in names  # one name for what is shared


@pytest.mark.parametrize("weight_norm", [True, False])
def test_number_of_parameters(weight_norm):
    width, embed = 10, 4
    cell = 4 * width * (2 * width + 2 * embed) + 4 * width + (4 * width if weight_norm else 0)
    for config in (DEQTrellisNetConfig, TrellisNetConfig):
        model = make(config, weight_norm=weight_norm)
        assert model.num_parameters(embedding=False) == cell
        assert model.num_parameters() == cell + 11 * (embed + 1)


def test_what_the_explicit_one_does_not_do(tokens):
    model: TrellisNet = make(TrellisNetConfig)
    with pytest.raises(UserError, match="TrellisNet is an explicit model"):
        model(tokens, settings=unrolled_settings(2))
    with pytest.raises(UserError, match="num_layers=0"):
        TrellisNetConfig(num_layers=0)
    with pytest.raises(UserError, match="subsequence_length=0"):
        DEQTrellisNetConfig(subsequence_length=0)


def test_initial_embeddings_are_as_wide_as_asked():
    embedding = make(embedding_std=0.01, d_embed=400).embedding.weight
    assert embedding.std().item() == pytest.approx(0.01, rel=0.1)


def test_dropout_of_the_mixture_is_only_for_mixtures(tokens):
    model = make(num_softmaxes=2, mixture_dropout=0.5)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    with pytest.raises(UserError, match="num_softmaxes=1 is no mixture"):
        make(mixture_dropout=0.5)
    with pytest.raises(UserError, match="embedding_std=0 must be above 0"):
        make(embedding_std=0)
