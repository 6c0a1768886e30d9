"""WikiText-103 DEQ-Transformer of width 600, the smaller example of the first public code.

Published are the width and the 20 thousand steps of shallow pre-training, and no perplexity;
everything else is that of wt103-deq-transformer, with ten heads of 60: 83M parameters. Not run
here.
"""

from dataclasses import replace

from equilibria.recipes import wt103_deq_transformer as medium
from equilibria.train.experiment import Experiment

EXPECTED = "no number published; that of width 700 has test perplexity 24.0 (arXiv 2106.14342)"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        medium.recipe(),
        model=replace(medium.MODEL, d_model=600, d_embed=600),
        task=replace(medium.TASK, pretrain_steps=20_000),
    )
