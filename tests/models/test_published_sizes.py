"""Parameters of the published models, counted on recipes at full size (meta tensors)."""

from __future__ import annotations

import pytest
import torch

from equilibria import recipes

WT103 = 267_735


@pytest.mark.parametrize(
    ("name", "vocabulary", "total", "block", "published"),
    [
        # Of arXiv 2106.14342: 98M.
        ("wt103-deq-transformer", WT103, 97.6e6, 71.2e6, (98e6, None)),
        ("wt103-deq-transformer-regularised", WT103, 97.6e6, 71.2e6, (98e6, None)),
        ("wt103-deq-transformer-pre-norm", WT103, 97.6e6, 71.2e6, (98e6, None)),
        # Of arXiv 1909.01377, table 3: 138M (4.5M).
        ("wt103-deq-transformer-small", WT103, 138.6e6, 4.5e6, (138e6, 4.5e6)),
        # 180M (45M) there: 3 % more than by our count, and 11 % in the cell. What the published
        # number counts besides convolution, injection and embedding is not known.
        ("wt103-deq-trellisnet", WT103, 174.1e6, 40.0e6, (180e6, 45e6)),
        # Table 1: 14K; ours has 58 more than that.
        ("copy-memory-deq-transformer", 10, 14_058, 13_728, (14e3, None)),
    ],
)
def test_parameters(name, vocabulary, total, block, published):
    with torch.device("meta"):
        model = recipes.load(name).experiment.model.build(vocabulary)
    assert model.num_parameters() == pytest.approx(total, rel=0.002)
    assert model.num_parameters(embedding=False) == pytest.approx(block, rel=0.01)
    assert model.num_parameters() == pytest.approx(published[0], rel=0.035)
    if published[1] is not None:
        assert model.num_parameters(embedding=False) == pytest.approx(published[1], rel=0.12)
