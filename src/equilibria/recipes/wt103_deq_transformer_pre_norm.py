"""WikiText-103 DEQ-Transformer of 98M parameters with Jacobian regularisation, pre-norm.

Published: 24.5 test perplexity with 14 evaluations (arXiv 2106.14342); without the penalty
training diverges. Not run here.
"""

from dataclasses import replace

from equilibria.adjoints.implicit import Implicit
from equilibria.recipes import wt103_deq_transformer_regularised as post
from equilibria.solvers.broyden import Broyden
from equilibria.tasks.stabilisers import StabiliserConfig
from equilibria.train.experiment import Experiment

EXPECTED = "test perplexity 24.5 (arXiv 2106.14342); not run here"


def recipe() -> Experiment:
    """Return the full configuration."""
    adjoint = Implicit(solver=Broyden(), rtol=1e-3, max_steps=14)
    solve = replace(post.MODEL.solve, max_steps=13, adjoint=adjoint)
    stabilisers = StabiliserConfig(
        jacobian_weight=2.0,
        jacobian_probability=0.4,
        jacobian_increase=0.1,
        jacobian_increase_every=30_000,
        step_jitter=2,
    )
    return replace(
        post.recipe(),
        model=replace(post.MODEL, norm="pre", solve=solve),
        task=replace(post.TASK, stabilisers=stabilisers),
    )
