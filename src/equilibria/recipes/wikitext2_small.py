"""WikiText-2, word level, with a DEQ-Transformer of laptop size and an adaptive softmax.

The block of ptb-small; the 33,278 words take 3.6 million parameters in three clusters.

Expected: our own run, see benchmarks/results/language_models; nothing published exists of this
size.
"""

from dataclasses import replace

from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.recipes import ptb_small
from equilibria.train.experiment import Experiment, TrainConfig

EXPECTED = "test perplexity 185 after two epochs, our own run (unigram 914)"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        ptb_small.recipe(),
        data=WordCorpusConfig("wikitext-2"),
        model=replace(ptb_small.MODEL, cutoffs=(4_000, 12_000), div_val=2),
        train=TrainConfig(num_steps=4_000, log_every=20, eval_every=1_000, checkpoint_every=200),
    )
