"""Adaptive embedding and softmax against PyTorch's own and against plain restatements."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from equilibria import UserError
from equilibria.layers.adaptive_embedding import AdaptiveEmbedding
from equilibria.layers.adaptive_softmax import AdaptiveSoftmax
from equilibria.layers.mixture_of_softmaxes import MixtureOfSoftmaxes

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
