"""WikiText-2 with the DEQ-TrellisNet of ptb-trellisnet-small.

Its softmax is full, so that the 33,278 words take 5.3 million parameters; its explicit opponent is
wikitext2-trellisnet-small-unrolled.
"""

from dataclasses import replace

from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.recipes import ptb_trellisnet_small, wikitext2_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 227 after two epochs, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        ptb_trellisnet_small.recipe(),
        data=WordCorpusConfig("wikitext-2"),
        train=wikitext2_small.recipe().train,
    )
