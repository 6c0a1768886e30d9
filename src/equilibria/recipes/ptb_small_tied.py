"""Penn Treebank with twelve weight-tied layers: the block of ptb-small, unrolled.

As many parameters as the DEQ of ptb-small, the same batches, optimiser and steps; its opponent in
memory and perplexity.
"""

from dataclasses import replace

from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.recipes import ptb_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 142 after three epochs, our own run"


MODEL = TransformerXLConfig(
    d_model=200,
    num_heads=4,
    d_inner=800,
    dropout=0.1,
    embedding_dropout=0.2,
    num_layers=12,
    tied=True,
)


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(ptb_small.recipe(), model=MODEL, task=replace(ptb_small.TASK, pretrain_steps=0))
