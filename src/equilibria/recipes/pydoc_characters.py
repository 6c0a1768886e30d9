"""Small DEQ-Transformer on the text of Python's own language reference, character by character.

Needs no download: the text ships inside CPython. A few minutes on two CPU cores.

Trained shallow first (an unrolled weight-tied network), then at equilibrium with truncated
solves, as in the published runs (arXiv 1909.01377, section 4); our own numbers, nothing published
exists for this text.
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.linear.gmres import GMRES
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.solvers.anderson import Anderson
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "2.0 to 2.1 bits per test character (bigram 3.26, 5-gram 1.75), our own runs"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=CharacterCorpusConfig(),
        model=DEQTransformerConfig(
            d_model=128,
            num_heads=4,
            d_inner=512,
            dropout=0.0,
            embedding_dropout=0.05,
            init_std=0.05,
            solve=SolveConfig(
                solver=Anderson(),
                rtol=1e-2,
                max_steps=14,
                adjoint=Implicit(solver=GMRES(), rtol=1e-2, max_steps=14),
                eval_rtol=1e-3,
                eval_max_steps=30,
            ),
        ),
        task=LanguageModelingConfig(
            batch_size=16,
            segment_length=64,
            memory_length=64,
            pretrain_steps=400,
            pretrain_layers=4,
            eval_streams=8,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, clip_norm=0.5),
        train=TrainConfig(num_steps=800, log_every=10, eval_every=200, checkpoint_every=400),
    )
