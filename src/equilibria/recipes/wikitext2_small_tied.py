"""WikiText-2 with twelve weight-tied layers: the block of wikitext2-small, unrolled.

As many parameters as the DEQ, the same clusters, batches, optimiser and steps.
"""

from dataclasses import replace

from equilibria.recipes import ptb_small_tied, ptb_small_untied, wikitext2_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 212 after two epochs, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        wikitext2_small.recipe(),
        model=replace(ptb_small_tied.MODEL, cutoffs=(4_000, 12_000), div_val=2),
        task=ptb_small_untied.TASK,
    )
