"""WikiText-2 with two layers of their own weights: the explicit opponent of wikitext2-small.

The layers of ptb-small-untied; clusters, batches, optimiser and steps of wikitext2-small; as many
parameters to a per mille.
"""

from dataclasses import replace

from equilibria.recipes import ptb_small_untied, wikitext2_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 188 after two epochs, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        wikitext2_small.recipe(),
        model=replace(ptb_small_untied.MODEL, cutoffs=(4_000, 12_000), div_val=2),
        task=ptb_small_untied.TASK,
    )
