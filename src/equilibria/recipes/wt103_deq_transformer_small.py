"""WikiText-103 DEQ-Transformer small: 138M parameters, of which the block has 4.5M.

Published: 32.4 test perplexity (arXiv 1909.01377, table 3); Transformer-XL of four layers 35.8, and
of sixteen tied ones 34.9. Width 500 and the sizes of the first public code's script are known, the
feed-forward width is not: 2,500 gives the published 4.5M. Not run here.
"""

from dataclasses import replace

from equilibria.recipes import wt103_deq_transformer as medium
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 32.4 (arXiv 1909.01377, table 3); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    model = replace(
        medium.MODEL,
        d_model=500,
        d_inner=2_500,
        d_embed=None,
        cutoffs=(),
        div_val=1,
        tie_first_projection=True,
        embedding_std=0.01,
    )
    return replace(medium.recipe(), model=model)
