"""Penn Treebank with an explicit TrellisNet: the cell of ptb-trellisnet-small, ten times.

As many parameters as the DEQ, the same batches, optimiser and steps.
"""

from dataclasses import replace

from equilibria.models.trellisnet import TrellisNetConfig
from equilibria.recipes import ptb_trellisnet_small
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 227 after three epochs, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        ptb_trellisnet_small.recipe(),
        model=TrellisNetConfig(
            d_embed=160,
            d_hidden=130,
            dropout=0.1,
            input_dropout=0.2,
            output_dropout=0.2,
            init_std=0.02,
            num_layers=10,
        ),
    )
