"""Penn Treebank, word level, with a DEQ-TrellisNet of laptop size.

As many parameters as ptb-small, the same batches and steps. The explicit one of ten layers is
ptb-trellisnet-small-unrolled.

Plain iteration over eight positions at a time: the cell is causal, so that an equilibrium spreads
from left to right and nothing is gained by mixing iterates (docs/language-models.md). That takes no
more evaluations than the explicit one has layers, from the first step on: no pre-training.

Expected: our own run, see benchmarks/results/language_models. With 24 million parameters 57.1 is
published (arXiv 1909.01377, table 2).
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

EXPECTED = "test perplexity 209 after three epochs, our own run"


MODEL = DEQTrellisNetConfig(
    d_embed=160,
    d_hidden=130,
    dropout=0.1,
    input_dropout=0.2,
    output_dropout=0.2,
    init_std=0.02,
    subsequence_length=8,
    solve=SolveConfig(
        solver=Picard(),
        rtol=1e-2,
        max_steps=24,
        adjoint=Implicit(solver=Neumann(), rtol=3e-2, max_steps=24),
        eval_rtol=1e-3,
        eval_max_steps=50,
    ),
)
TASK = LanguageModelingConfig(
    batch_size=16,
    segment_length=64,
    memory_length=1,
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
