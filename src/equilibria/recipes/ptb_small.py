"""Penn Treebank, word level, with a DEQ-Transformer of laptop size.

Two and a half million parameters, of which two million embed the words. Explicit models of equal
parameters on equal batches: ptb-small-tied (the same block twelve times) and ptb-small-untied (two
layers of their own weights).

Expected: our own runs, see benchmarks/results/language_models; nothing published exists of this
size. Models ten times as large reach 55 to 60 (arXiv 1909.01377, table 2: 57.1 with 24M).
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.linear.gmres import GMRES
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.solvers.anderson import Anderson
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test perplexity 139 after three epochs, our own run (unigram 640)"


MODEL = DEQTransformerConfig(
    d_model=200,
    num_heads=4,
    d_inner=800,
    dropout=0.1,
    embedding_dropout=0.2,
    solve=SolveConfig(
        solver=Anderson(6),
        rtol=1e-2,
        max_steps=16,
        adjoint=Implicit(solver=GMRES(), rtol=3e-2, max_steps=16),
        eval_rtol=1e-3,
        eval_max_steps=30,
    ),
)
TASK = LanguageModelingConfig(
    batch_size=16,
    segment_length=64,
    memory_length=64,
    pretrain_steps=600,
    pretrain_layers=2,
    eval_streams=8,
)


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=WordCorpusConfig("ptb"),
        model=MODEL,
        task=TASK,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, clip_norm=0.25),
        train=TrainConfig(num_steps=2700, log_every=20, eval_every=450, checkpoint_every=150),
    )
