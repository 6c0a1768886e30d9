"""WikiText-103 DEQ-Transformer medium with adaptive embedding: 110M parameters, the block 70M.

Published: 23.2 test perplexity (arXiv 1909.01377, table 3); Transformer-XL of eighteen layers and
110M 23.6. The widths are not published: 1,024 gives the published embedding, and a feed-forward
layer of 30,100 the published block. Everything else is that of wt103-deq-transformer. Not run here.
"""

from dataclasses import replace

from equilibria.recipes import wt103_deq_transformer as published
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 23.2 (arXiv 1909.01377, table 3); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    model = replace(published.MODEL, d_model=1_024, d_embed=1_024, num_heads=16, d_inner=30_100)
    return replace(published.recipe(), model=model)
