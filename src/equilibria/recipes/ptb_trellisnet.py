"""Penn Treebank DEQ-TrellisNet of 24M parameters, towards the published one.

Published: 57.1 test perplexity with 24M parameters (arXiv 1909.01377, table 2). Widths, dropouts,
batches and optimiser are those of the public TrellisNet (arXiv 1810.06682, 57.0 with 60 layers),
without its auxiliary loss and its penalties on outputs; how it is solved is ours. Not run here.
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.linear.neumann import Neumann
from equilibria.models.config import SolveConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.solvers.picard import Picard
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test perplexity 57.1 (arXiv 1909.01377, table 2); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=WordCorpusConfig("ptb"),
        model=DEQTrellisNetConfig(
            d_embed=400,
            d_hidden=1_000,
            dropout=0.28,
            input_dropout=0.45,
            output_dropout=0.45,
            embedding_dropout=0.1,
            weight_dropout=0.5,
            init_std=0.01,
            subsequence_length=10,
            solve=SolveConfig(
                solver=Picard(),
                rtol=1e-2,
                max_steps=30,
                adjoint=Implicit(solver=Neumann(), rtol=3e-2, max_steps=30),
                eval_rtol=1e-3,
                eval_max_steps=60,
            ),
        ),
        task=LanguageModelingConfig(
            batch_size=16, segment_length=110, memory_length=1, eval_streams=8
        ),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=20.0,
            momentum=0.0,
            weight_decay=1.2e-6,
            schedule="plateau",
            plateau_patience=10,
            warmup_steps=0,
            clip_norm=0.225,
        ),
        train=TrainConfig(num_steps=100_000, log_every=100, eval_every=528, checkpoint_every=528),
    )
