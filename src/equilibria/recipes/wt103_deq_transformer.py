"""WikiText-103 DEQ-Transformer of 98M parameters with adaptive embedding, post-norm, as published.

Published: 24.0 test perplexity with 30 evaluations (arXiv 2106.14342, the unregularised
DEQ-Transformer); the medium model of arXiv 1909.01377 is wt103-deq-transformer-medium-adaptive.

Settings of the first public code, four GPUs; 300 thousand steps, of which the first 32 thousand
unroll two layers. Not run here: the training text needs a download ('equilibria data get
wikitext-103'), the model a GPU.
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test perplexity 24.0 (arXiv 2106.14342); not run here"


MODEL = DEQTransformerConfig(
    d_model=700,
    num_heads=10,
    d_inner=48_000,
    dropout=0.05,
    embedding_dropout=0.05,
    position_dropout=0.05,
    d_embed=700,
    cutoffs=(20_000, 40_000, 200_000),
    div_val=4,
    tie_first_projection=False,
    attention_bias=True,
    init_std=0.01,
    solve=SolveConfig(
        solver=Anderson(6),
        rtol=1e-3,
        max_steps=29,  # thirty evaluations, as published: ours counts the first one apart
        adjoint=Implicit(solver=Broyden(), rtol=1e-3, max_steps=35),
    ),
)
TASK = LanguageModelingConfig(
    batch_size=56,
    segment_length=150,
    memory_length=150,
    pretrain_steps=32_000,
    pretrain_layers=2,
    eval_streams=16,
    eval_memory_length=480,
)


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=WordCorpusConfig("wikitext-103"),
        model=MODEL,
        task=TASK,
        optimizer=OptimizerConfig(
            learning_rate=2.5e-4, warmup_steps=16_000, final_fraction=0.0, clip_norm=0.25
        ),
        train=TrainConfig(
            num_steps=300_000,
            log_every=200,
            eval_every=4_000,
            checkpoint_every=2_000,
            precision="bfloat16",
        ),
    )
