"""Copy memory over 400 positions with a DEQ-Transformer of 14 thousand parameters.

Ten symbols have to be repeated 410 positions after they were read. Attention can reach them in
one step, so that what has to be learnt is where to look: one head of two comes to look exactly
410 positions back. Shallow first, then at equilibrium.

Expected: 3.9e-9 (our own run, 47 minutes on one CPU thread); published 3.5e-6 with 14K parameters
(arXiv 1909.01377, table 1); without memory 0.0495.
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

EXPECTED = "test loss 3.9e-9, our own run; 3.5e-6 in arXiv 1909.01377, table 1"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=CopySequencesConfig(),
        model=DEQTransformerConfig(
            d_model=32,
            num_heads=2,
            d_inner=80,
            dropout=0.0,
            embedding_dropout=0.0,
            # Larger than usual: a sharp look at one distance begins with scores that differ.
            init_std=0.2,
            solve=SolveConfig(
                solver=Anderson(),
                rtol=1e-3,
                max_steps=20,
                adjoint=Implicit(solver=GMRES(), rtol=1e-2, max_steps=20),
                eval_rtol=1e-4,
                eval_max_steps=40,
            ),
        ),
        task=CopyMemoryConfig(batch_size=16, pretrain_steps=800, pretrain_layers=2),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, beta2=0.95, warmup_steps=20, final_fraction=0.01, clip_norm=1.0
        ),
        train=TrainConfig(num_steps=4000, log_every=10, eval_every=200, checkpoint_every=100),
    )
