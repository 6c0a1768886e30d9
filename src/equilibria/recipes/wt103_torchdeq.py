"""WikiText-103 language model of torchdeq: three pre-norm blocks, twelve unrolled steps.

Published: 22.34 test perplexity at a memory of 150 and 21.85 at 480, with 98M parameters, in
torchdeq's collection. It is trained as a network of 36 layers in twelve groups of equal weights,
and solved for no equilibrium: see models/stacked_transformer.py. Not run here.
"""

from dataclasses import replace

from equilibria.models.stacked_transformer import StackedTransformerConfig
from equilibria.recipes import wt103_deq_transformer as published
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

EXPECTED = "test perplexity 22.34, and 21.85 at memory 480 (torchdeq's collection); not run here"
MODEL = StackedTransformerConfig(
    d_model=700,
    num_heads=10,
    d_inner=14_800,
    num_blocks=3,
    dropout=0.05,
    embedding_dropout=0.05,
    position_dropout=0.05,
    d_embed=700,
    cutoffs=(20_000, 40_000, 200_000),
    div_val=4,
    tie_first_projection=False,
    attention_window=1_000,
    init_std=0.01,
)


def recipe() -> Experiment:
    """Return the full configuration."""
    return replace(
        published.recipe(),
        model=MODEL,
        task=replace(published.TASK, pretrain_steps=0),
        optimizer=OptimizerConfig(
            learning_rate=2.5e-4, warmup_steps=8_000, final_fraction=0.0, clip_norm=0.25
        ),
        train=TrainConfig(
            num_steps=150_000, log_every=200, eval_every=5_000, checkpoint_every=2_000
        ),
    )
