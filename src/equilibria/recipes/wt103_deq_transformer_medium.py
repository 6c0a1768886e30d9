"""WikiText-103 DEQ-Transformer medium without adaptive embedding: 172M parameters, the block 43M.

Published: 24.2 test perplexity (arXiv 1909.01377, table 3); Transformer-XL of sixteen layers, 165M,
24.3. The widths are not published: 480 gives the published embedding, and a feed-forward layer of
42,900 the published block. Everything else is that of wt103-deq-transformer. Not run here.
"""

from dataclasses import replace

from equilibria.recipes import wt103_deq_transformer as adaptive
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 24.2 (arXiv 1909.01377, table 3); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    model = replace(
        adaptive.MODEL,
        d_model=480,
        num_heads=8,
        d_inner=42_900,
        d_embed=None,
        cutoffs=(),
        div_val=1,
        tie_first_projection=True,
        embedding_std=0.01,
    )
    return replace(adaptive.recipe(), model=model)
