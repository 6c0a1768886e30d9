"""Adaptive embedding and softmax against PyTorch's own and against plain restatements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from equilibria import UserError
from equilibria.data import segments
from equilibria.layers.adaptive_embedding import AdaptiveEmbedding
from equilibria.layers.adaptive_softmax import IGNORE_INDEX, AdaptiveSoftmax
from equilibria.layers.mixture_of_softmaxes import MixtureOfSoftmaxes
from equilibria.models.output import FullSoftmax

V, D = 30, 12
FORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"d_embed": 7}, id="projected"),
    pytest.param({"cutoffs": (5, 14), "div_val": 2}, id="clusters"),
    pytest.param({"cutoffs": (5, 14), "d_embed": 9, "div_val": 3}, id="narrow"),
    pytest.param({"cutoffs": (1,)}, id="one-frequent"),
]
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(form, *, init_std=0.5, **options):
    embedding = AdaptiveEmbedding(V, D, init_std=init_std, **form).double()
    softmax = AdaptiveSoftmax(embedding, init_std=init_std, **options).double()
    with torch.no_grad():
        softmax.bias.normal_()
    return embedding, softmax


def dense_table(embedding):
    """Every token's vector (V, D), cluster by cluster."""
    rows = []
    for i, weight in enumerate(embedding.weights):
        rows.append(weight @ embedding.projections[i].T if embedding.projections else weight)
    return torch.cat(rows)


@forms
def test_embedding_looks_up_the_projected_table(form):
    embedding, _ = make(form)
    tokens = torch.arange(V).view(3, 10)
    wanted = dense_table(embedding)[tokens] * D**0.5
    torch.testing.assert_close(embedding(tokens), wanted)


@forms
def test_losses_are_those_of_the_log_probabilities(form):
    _, softmax = make(form)
    hidden = torch.randn(4, 6, D, dtype=torch.float64)
    targets = torch.randint(V, (4, 6))
    targets[0, :3] = -100
    logs = softmax.log_probabilities(hidden)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(4, 6))
    wanted = -logs.gather(2, targets.clamp_min(0).unsqueeze(2)).squeeze(2)
    wanted = wanted.masked_fill(targets < 0, 0.0)
    torch.testing.assert_close(softmax.losses(hidden, targets), wanted)


def test_parity_with_pytorch():
    """Its clusters have projections of their own, of the widths that div_val makes."""
    embedding, softmax = make({"cutoffs": (5, 14), "div_val": 2}, tie_first_projection=False)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, [5, 14], div_value=2.0, head_bias=True).double()
    with torch.no_grad():
        theirs.head.weight.copy_(
            torch.cat((embedding.weights[0], softmax.cluster_weight)) @ softmax.projection.T
        )
        theirs.head.bias.copy_(torch.cat((softmax.bias[:5], softmax.cluster_bias)))
        softmax.bias[5:] = 0.0  # they have none
        for i, tail in enumerate(theirs.tail, 1):
            tail[0].weight.copy_(embedding.projections[i].T)
            tail[1].weight.copy_(embedding.weights[i])
    hidden, targets = torch.randn(8, 1, D, dtype=torch.float64), torch.randint(V, (8, 1))
    torch.testing.assert_close(
        softmax.log_probabilities(hidden)[:, 0], theirs.log_prob(hidden[:, 0]).float()
    )
    output = theirs(hidden[:, 0], targets[:, 0]).output
    torch.testing.assert_close(softmax.losses(hidden, targets)[:, 0], -output.float())


@forms
def test_ids_outside_of_the_vocabulary_are_refused(form):
    """As by PyTorch's own embedding and cross entropy, and not taken for something else."""
    embedding, softmax = make(form)
    hidden = torch.randn(1, 2, D, dtype=torch.float64)
    for outside in (-1, V, V + 7):
        ids = torch.tensor([[0, outside]])
        with pytest.raises(IndexError, match="out of"):
            embedding(ids)
        with pytest.raises(IndexError, match="out of bounds"):
            softmax.losses(hidden, ids)


def test_losses_never_have_a_tensor_of_all_positions_and_tokens():
    """Of 40 frequent words in 2,000, and targets that are rare in every tenth position."""
    embedding = AdaptiveEmbedding(2_000, 8, cutoffs=(40, 200), div_val=2)
    softmax = AdaptiveSoftmax(embedding)
    hidden = torch.randn(4, 50, 8, requires_grad=True)
    targets = torch.zeros(4, 50, dtype=torch.int64)
    targets[:, ::10] = 1_999
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        softmax.losses(hidden, targets).sum().backward()
    assert max(sizes) == 20 * 1_800  # the rare positions times the tokens of their cluster
    assert 10 * max(sizes) < 200 * 2_000


class _Plain(nn.Module):
    """A full softmax with the parameters of an embedding's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(V, D)), nn.Parameter(torch.randn(V))

    def softmax(self) -> FullSoftmax:
        return FullSoftmax(self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "adaptive", "mixture"])
def test_all_softmaxes_are_asked_alike(kind, dtype):
    """Losses (B, L) in float32 of the log-probabilities (B, L, V), 0 where nothing is asked."""
    if kind == "full":
        softmax = _Plain().to(dtype).softmax()
    elif kind == "adaptive":
        embedding = AdaptiveEmbedding(V, D, cutoffs=(5, 14), div_val=2, init_std=0.5).to(dtype)
        softmax = AdaptiveSoftmax(embedding, init_std=0.5).to(dtype)
    else:
        softmax = MixtureOfSoftmaxes(nn.Embedding(V, 5).to(dtype), D, 3).to(dtype)
    hidden, targets = torch.randn(2, 6, D, dtype=dtype), torch.randint(V, (2, 6))
    targets[1, 2:] = IGNORE_INDEX
    losses, logs = softmax.losses(hidden, targets), softmax.log_probabilities(hidden)
    assert losses.dtype == torch.float32
    assert losses.shape == targets.shape
    assert logs.shape == (2, 6, V)
    assert (losses[1, 2:] == 0).all()
    wanted = nn.functional.cross_entropy(
        logs.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses, wanted.view(2, 6), rtol=1e-5, atol=1e-5)


def test_data_ignore_what_softmaxes_ignore():
    assert IGNORE_INDEX == segments.IGNORE_INDEX


UNTIED = [
    pytest.param({"tie_first_projection": False}, ["projection"], id="first"),
    pytest.param({"tie_tail_projections": False}, ["tail_projections.0", "tail_projections.1"],
                 id="tail"),
    pytest.param({"tie_first_projection": False, "tie_tail_projections": False},
                 ["projection", "tail_projections.0", "tail_projections.1"], id="all"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "own"), UNTIED)
def test_projections_can_be_the_softmax_s_own(options, own):
    """With the embedding's numbers they are the tied softmax, whose gradient is their sum."""
    form = {"cutoffs": (5, 14), "div_val": 2}
    embedding, untied = make(form, **options)
    tied = AdaptiveSoftmax(embedding).double()
    shared = dict(zip(["projection", "tail_projections.0", "tail_projections.1"],
                      embedding.projections, strict=True))  # fmt: skip
    mine = dict(untied.named_parameters())
    assert sorted(mine) == sorted(["bias", "cluster_weight", "cluster_bias", *own])
    hidden = torch.randn(2, 9, D, dtype=torch.float64)
    targets = torch.randint(V, (2, 9))
    tied.load_state_dict({n: p for n, p in untied.state_dict().items() if n not in own})
    assert not torch.allclose(untied.losses(hidden, targets), tied.losses(hidden, targets))
    with torch.no_grad():
        for name in own:
            mine[name].copy_(shared[name])
    torch.testing.assert_close(untied.losses(hidden, targets), tied.losses(hidden, targets))
    wanted = torch.autograd.grad(tied.losses(hidden, targets).sum(), [shared[n] for n in own])
    found = torch.autograd.grad(untied.losses(hidden, targets).sum(), [mine[n] for n in own])
    torch.testing.assert_close(found, wanted)


def test_tail_projections_of_ones_own_need_a_tail():
    with pytest.raises(UserError, match="tie_tail_projections=False, but without cutoffs"):
        AdaptiveSoftmax(AdaptiveEmbedding(V, D, d_embed=7), tie_tail_projections=False)


@forms
def test_gradients_reach_every_parameter_and_are_right(form):
    embedding, softmax = make(form)
    tokens, targets = torch.randint(V, (2, 9)), torch.randint(V, (2, 9))
    parameters = [*embedding.parameters(), *softmax.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    found = gradients(softmax.losses(embedding(tokens), targets).sum())
    logs = softmax.log_probabilities(dense_table(embedding)[tokens] * D**0.5)
    wanted = gradients(-logs.gather(2, targets.unsqueeze(2)).sum())
    for mine, dense in zip(found, wanted, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-5)


def test_a_batch_without_rare_tokens_has_gradients_for_all():
    embedding, softmax = make({"cutoffs": (5, 14), "div_val": 2})
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    softmax.losses(embedding(tokens), tokens).sum().backward()
    assert all(p.grad is not None for p in (*embedding.parameters(), *softmax.parameters()))


def test_weights_are_shared_and_counted_once():
    embedding, softmax = make({"cutoffs": (5, 14), "div_val": 2})
    names = [name for name, _ in softmax.named_parameters()]
    assert names == ["bias", "cluster_weight", "cluster_bias"]
    model = nn.ModuleDict({"embedding": embedding, "softmax": softmax})
    again = copy.deepcopy(model)
    assert again["softmax"].embedding is again["embedding"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"cutoffs": (5, 5)}, "ascending numbers between 1 and 29"),
        ({"cutoffs": (30,)}, "do not cut a vocabulary of 30"),
        ({"cutoffs": (5, 14), "div_val": 4, "d_embed": 8}, "leaves nothing of d_embed=8"),
        ({"cutoffs": (5,), "div_val": 0}, "div_val=0"),
        ({"cutoffs": (5.5, 14)}, "a cutoff=5.5 must be an integer"),
        ({"d_embed": 0}, "d_embed=0 must be"),
    ],
)
def test_impossible_clusters(form, message):
    with pytest.raises(UserError, match=message):
        AdaptiveEmbedding(V, D, **form)


def test_a_projection_of_ones_own_needs_one_to_begin_with():
    with pytest.raises(UserError, match="tie_first_projection=False"):
        AdaptiveSoftmax(AdaptiveEmbedding(V, D), tie_first_projection=False)


def test_a_mixture_of_one_softmax_is_one():
    embedding = nn.Embedding(V, 5).double()
    weight = embedding.weight
    mixture = MixtureOfSoftmaxes(embedding, D, 1).double()
    hidden = torch.randn(2, 3, D, dtype=torch.float64)
    latent = torch.tanh(mixture.latent(hidden))
    wanted = (latent @ weight.T + mixture.bias).log_softmax(-1).float()
    torch.testing.assert_close(mixture.log_probabilities(hidden), wanted)


def test_a_mixture_is_the_mean_of_its_softmaxes():
    embedding = nn.Embedding(V, 5).double()
    weight = embedding.weight
    mixture = MixtureOfSoftmaxes(embedding, D, 3, dropout=0.5).double().eval()
    hidden, targets = torch.randn(2, 4, D, dtype=torch.float64), torch.randint(V, (2, 4))
    prior = mixture.prior(hidden).softmax(-1)
    total = 0.0
    for k in range(3):
        latent = torch.tanh(mixture.latent(hidden)[..., 5 * k : 5 * k + 5])
        total = total + prior[..., k : k + 1] * (latent @ weight.T + mixture.bias).softmax(-1)
    torch.testing.assert_close(mixture.log_probabilities(hidden), total.log().float())
    losses = mixture.losses(hidden, targets)
    torch.testing.assert_close(losses, -total.log().gather(2, targets.unsqueeze(2))[..., 0].float())
    targets[0] = -100
    assert (mixture.losses(hidden, targets)[0] == 0).all()
    with pytest.raises(UserError, match="num_softmaxes=0"):
        MixtureOfSoftmaxes(embedding, D, 0)


def test_dropout_of_a_mixture_is_shared_over_time():
    torch.manual_seed(0)
    mixture = MixtureOfSoftmaxes(nn.Embedding(V, 5), D, 2, dropout=0.5)
    found = mixture.log_probabilities(torch.randn(2, 1, D).expand(2, 9, D))
    assert torch.equal(found[:, :1].expand_as(found), found)
    assert not torch.equal(mixture.log_probabilities(torch.ones(2, 1, D)), found[:, :1])
    with pytest.raises(UserError, match="dropout=1.5"):
        MixtureOfSoftmaxes(nn.Embedding(V, 5), D, 2, dropout=1.5)


def test_a_mixture_has_more_than_the_rank_of_its_embedding():
    """Of the matrix of log-probabilities, less what the normalisation adds."""
    embedding = nn.Embedding(V, 2).double()
    hidden = torch.randn(1, 25, D, dtype=torch.float64)
    ranks = [
        torch.linalg.matrix_rank(
            MixtureOfSoftmaxes(embedding, D, k).double().log_probabilities(hidden)[0].double(),
            rtol=1e-5,
        ).item()
        for k in (1, 3)
    ]
    assert ranks[0] <= 4 < ranks[1]
