"""Copy memory over 400 positions with a GRU of 14 thousand parameters.

Expected: 0.0491 with 14K parameters (arXiv 1909.01377, table 1), hardly better than without memory,
0.0495: what a GRU remembers fades long before the 410th position.

As many sequences and the same batches as the DEQ-Transformer's recipe.
"""

from equilibria.data.copy_memory import CopySequencesConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.tasks.copy_memory import CopyMemoryConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test loss 0.0491 (arXiv 1909.01377, table 1); 0.0440, our own run"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=CopySequencesConfig(),
        model=RecurrentConfig(unit="gru", d_embedding=10, d_hidden=61),
        task=CopyMemoryConfig(batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, beta2=0.95, warmup_steps=20, final_fraction=0.1, clip_norm=1.0
        ),
        train=TrainConfig(num_steps=4000, log_every=10, eval_every=200, checkpoint_every=100),
    )
