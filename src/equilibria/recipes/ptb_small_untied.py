"""Penn Treebank with two Transformer-XL layers of as many parameters as the DEQ of ptb-small.

The same batches, optimiser and steps.
"""

from dataclasses import replace

from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.recipes import ptb_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 154 after three epochs, our own run"


MODEL = TransformerXLConfig(
    d_model=200,
    num_heads=4,
    d_inner=300,
    dropout=0.1,
    embedding_dropout=0.2,
    num_layers=2,
)
TASK = replace(ptb_small.TASK, pretrain_steps=0)


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(ptb_small.recipe(), model=MODEL, task=TASK)
