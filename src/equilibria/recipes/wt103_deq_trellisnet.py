"""WikiText-103 DEQ-TrellisNet: hidden 1500, output and embedding 500.

Published: 29.0 test perplexity with 180M parameters, 45M of them not in the embedding (arXiv
1909.01377, table 3); TrellisNet of 70 layers 29.2. These widths give 174M and 40M by our count.
Not run here.
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.solvers.broyden import Broyden
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test perplexity 29.0 (arXiv 1909.01377, table 3); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=WordCorpusConfig("wikitext-103"),
        model=DEQTrellisNetConfig(
            d_embed=500,
            d_hidden=1_500,
            dropout=0.1,
            input_dropout=0.1,
            output_dropout=0.1,
            init_std=0.01,
            subsequence_length=50,
            remember_input=False,
            solve=SolveConfig(
                solver=Broyden(None),
                rtol=1e-3,
                max_steps=45,
                adjoint=Implicit(solver=Broyden(None), rtol=1e-3, max_steps=45),
            ),
        ),
        task=LanguageModelingConfig(
            batch_size=49,
            segment_length=100,
            memory_length=1,
            pretrain_steps=30_000,
            pretrain_layers=40,
            eval_streams=10,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, final_fraction=0.0, clip_norm=0.07
        ),
        train=TrainConfig(
            num_steps=300_000, log_every=200, eval_every=4_000, checkpoint_every=2_000
        ),
    )
