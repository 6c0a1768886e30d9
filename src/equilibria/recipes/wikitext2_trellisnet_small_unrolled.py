"""WikiText-2 with an explicit TrellisNet of ten layers: the cell of wikitext2-trellisnet-small.

As many parameters as the DEQ, the same batches, optimiser and steps.
"""

from dataclasses import replace

from equilibria.recipes import ptb_trellisnet_small_unrolled, wikitext2_trellisnet_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 266 after two epochs, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    model = ptb_trellisnet_small_unrolled.recipe().model
    return replace(wikitext2_trellisnet_small.recipe(), model=model)
