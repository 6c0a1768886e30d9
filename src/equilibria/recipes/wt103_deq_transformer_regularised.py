"""WikiText-103 DEQ-Transformer of 98M parameters with Jacobian regularisation, post-norm.

Published: 24.9 test perplexity with 12 to 13 evaluations (arXiv 2106.14342, table 2); without the
penalty, stopped at 12 evaluations, 29.2. Not run here.
"""

from dataclasses import replace

from equilibria.adjoints.implicit import Implicit
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.recipes import wt103_deq_transformer
from equilibria.solvers.broyden import Broyden
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.tasks.stabilisers import StabiliserConfig
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 24.9 (arXiv 2106.14342, table 2); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    plain = wt103_deq_transformer.recipe()
    model = plain.model
    if not isinstance(model, DEQTransformerConfig):
        raise TypeError("wt103-deq-transformer is not the DEQ-Transformer that this recipe varies")
    adjoint = Implicit(solver=Broyden(), rtol=1e-3, max_steps=13)
    solve = replace(model.solve, max_steps=12, adjoint=adjoint)
    return replace(
        plain,
        model=replace(
            model,
            dropout=0.06,
            embedding_dropout=0.06,
            position_dropout=0.06,
            attention_dropout=0.01,
            solve=solve,
        ),
        task=LanguageModelingConfig(
            batch_size=56,
            segment_length=150,
            memory_length=300,
            pretrain_steps=32_000,
            pretrain_layers=2,
            stabilisers=StabiliserConfig(
                jacobian_weight=1.9,
                jacobian_probability=0.35,
                jacobian_increase=0.1,
                jacobian_increase_every=35_000,
                step_jitter=2,
            ),
            eval_streams=16,
            eval_memory_length=480,
        ),
    )
