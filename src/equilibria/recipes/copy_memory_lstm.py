"""Copy memory over 400 positions with an LSTM of 14 thousand parameters.

Expected: 0.0501 with 14K parameters (arXiv 1909.01377, table 1), no better than without memory,
0.0495: what an LSTM remembers fades long before the 410th position.

As many sequences and the same batches as the DEQ-Transformer's recipe.
"""

from equilibria.data.copy_memory import CopySequencesConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.tasks.copy_memory import CopyMemoryConfig
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test loss 0.0501, arXiv 1909.01377, table 1"


def recipe() -> Experiment:
    """Return the full configuration."""
    return Experiment(
        data=CopySequencesConfig(),
        model=RecurrentConfig(unit="lstm", d_embedding=10, d_hidden=52),
        task=CopyMemoryConfig(batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, beta2=0.95, warmup_steps=20, final_fraction=0.1, clip_norm=1.0
        ),
        train=TrainConfig(num_steps=4000, log_every=10, eval_every=200, checkpoint_every=100),
    )
