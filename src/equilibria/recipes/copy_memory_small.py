"""Copy memory over 20 positions with a small DEQ-Transformer, in about a minute.

The published problem with a shorter wait and fewer symbols, for a laptop and for the tests; our
own number, nothing published exists for this length. Without memory the loss is 0.347.
"""

from equilibria.adjoints.implicit import Implicit
from equilibria.data.copy_memory import CopySequencesConfig
from equilibria.linear.gmres import GMRES
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.solvers.anderson import Anderson
from equilibria.tasks.copy_memory import CopyMemoryConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test loss below 0.002 and all 5 symbols recalled, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=CopySequencesConfig(num_blanks=20, num_symbols=5, num_valid=64, num_test=256),
        model=DEQTransformerConfig(
            d_model=32,
            num_heads=2,
            d_inner=64,
            dropout=0.0,
            embedding_dropout=0.0,
            init_std=0.2,
            solve=SolveConfig(
                solver=Anderson(),
                rtol=1e-2,
                max_steps=12,
                adjoint=Implicit(solver=GMRES(), rtol=1e-2, max_steps=12),
                eval_rtol=1e-4,
                eval_max_steps=40,
            ),
        ),
        task=CopyMemoryConfig(
            batch_size=32, pretrain_steps=300, pretrain_layers=2, eval_batch_size=64
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, beta2=0.98, warmup_steps=20, clip_norm=1.0),
        train=TrainConfig(num_steps=500, log_every=25, eval_every=250, checkpoint_every=250),
    )
