"""Jacobian regularisation: keep ||df/dz|| small at the fixed point, so that solves stay short."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from equilibria.core.autocast import without_autocast
from equilibria.core.errors import UserError, nearest
from equilibria.core.iterate import Iterate
from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.options import Options
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.problem import Problem
from equilibria.core.pure import TransformError, is_transformed
from equilibria.core.solution import Solution, image_again, solved_problem
from equilibria.core.state import Layout, State

Probes = Literal["rademacher", "normal"]


@dataclass(frozen=True)
class JacobianRegularizer(Options):
    """A loss term that holds the Jacobian of f small at the returned fixed point.

        weight * mean over samples of ||J||_F^2 / D,    J = df/dz at z*,  D = size of a sample,

    estimated by `jacobian_penalty`. Use it when solves need more and more steps as training goes
    on, or stop converging: without it nothing in the loss rewards a map that is easy to solve. A
    weight that is too large costs accuracy.

    Cost of a step where it applies: one evaluation of f (none where it is shared) and `num_probes`
    vector-Jacobian products, recorded, and their own backward pass. At other steps: nothing.

    Whether it applies at a step is decided by a hash of (seed, step) and by nothing else: all ranks
    of a distributed training decide alike, without which collectives inside f (FSDP) would wait for
    each other for ever; a resumed training decides as the interrupted one would have; there is no
    state to save. Probes come from torch's generator and differ between ranks, as they should. With
    DDP or FSDP, call it inside the forward of the wrapped model.

    Args:
        weight: a number, or a function of the training step such as `StepwiseWeight`. It is not
            divided by `probability`: the published weights are meant together with theirs.
        probability: of applying at a training step; .05 to .5 are published, 1 is the default.
        num_probes: vectors per estimate; 1 is enough for training, where steps average.
        distribution: of the probes; see `jacobian_penalty`.
        through_state: see `jacobian_penalty`.
        share_evaluation: see `jacobian_penalty`.
        seed: of the decisions. The same on all ranks.

    Raises:
        UserError: an argument out of range.

    References:
        Bai, Koltun and Kolter, Stabilizing Equilibrium Models by Jacobian Regularization,
        arXiv 2106.14342.
    """

    weight: float | Callable[[int], float] = 1.0
    probability: float = 1.0
    num_probes: int = 1
    distribution: Probes = "rademacher"
    through_state: bool = False
    share_evaluation: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.weight):
            check_not_negative("weight", self.weight)
        check_not_negative("probability", self.probability)
        if self.probability > 1.0:
            raise UserError(f"probability={self.probability} must lie between 0 and 1")
        _check_probes(self.num_probes, self.distribution)
        _check_sharing(self.share_evaluation, self.through_state)

    def __call__(
        self,
        solution: Solution,
        *,
        step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The weighted penalty, a scalar to add to the loss; 0 where it does not apply.

        Args:
            solution: what `solve` or a `DEQ` returned.
            step: the training step, counted from 0; needed where weight or probability ask for it.
            generator: for the probes, on the device of the state; None is torch's own.

        Raises:
            UserError: no step where one is needed, or as in `jacobian_penalty`.
        """
        weight = self.weight_at(step)
        if weight == 0.0 or not self.applies_at(step):
            return solution.residual.new_zeros(())
        penalty = jacobian_penalty(
            solution,
            num_probes=self.num_probes,
            distribution=self.distribution,
            through_state=self.through_state,
            share_evaluation=self.share_evaluation,
            generator=generator,
        )
        return weight * penalty.sum() / _num_problems(solution, penalty)

    def weight_at(self, step: int | None = None) -> float:
        """The weight at a training step."""
        if not callable(self.weight):
            return self.weight
        return self.weight(_known(step, "the weight follows a schedule"))

    def applies_at(self, step: int | None = None) -> bool:
        """Whether the penalty is part of the loss of a training step."""
        if self.probability in (0.0, 1.0):
            return self.probability == 1.0
        known = _known(step, f"probability={self.probability} decides for every step anew")
        # A string is hashed, so that neighbouring steps and seeds have nothing in common.
        return random.Random(f"{self.seed}:{known}").random() < self.probability


def jacobian_penalty(
    solution: Solution,
    *,
    num_probes: int = 1,
    distribution: Probes = "rademacher",
    through_state: bool = False,
    share_evaluation: bool = False,
    generator: torch.Generator | None = None,
    probes: Sequence[State] | None = None,
) -> Tensor:
    """Estimate ||J||_F^2 / D of every sample at the fixed point, differentiably: (B,).

    Hutchinson's estimator: for a vector v of independent entries of mean 0 and variance 1,

        E ||v^T J||^2 = ||J||_F^2,    J = df/dz at z*,

    so that one product with a random vector is unbiased. f is evaluated once more, with the
    injection, the masks and the normalised weights of the solve. Gradients reach the parameters of
    f and whatever made the injection. Nothing is recorded under `torch.no_grad()`, or where the
    solution was made under it: the value is then a measurement.

    The value is at least float32 whatever f computes in. ||J||_F / sqrt(D) is the root mean square
    of the singular values of J; a value below 1 does not prove a contraction.

    Args:
        solution: what `solve` or a `DEQ` returned.
        num_probes: random vectors averaged.
        distribution: "rademacher" (default; entries -1 or 1) never has a larger variance than
            "normal", which the paper uses.
        through_state: False (default) takes z* for a constant, as the paper does: cheap, and the
            gradient lowers the Jacobian where the state is now. True adds the way that z* itself
            moves: the total derivative, as exact as the adjoint of the solve, for one more
            backward solve.
        share_evaluation: differentiate the evaluation that the gradient of z* passes through anyway
            (`Implicit`), instead of one more; with other adjoints there is none to share. Loss and
            penalty then belong to one graph, as two losses of one network do: add them and call
            backward once, or give retain_graph=True to the first of two.
        generator: for the probes, on the device of the state; None is torch's own.
        probes: vectors to use instead of random ones, each of the form of z; exact with the D
            columns of sqrt(D) times an orthogonal matrix.

    Shape:
        (B,); one per problem for segments, (1,) for batch_dims=0.

    Raises:
        UserError: an argument out of range, a solution without its problem, inference mode.
        ReplayError: f has become another function since the solve.
        TransformError: under torch.func transforms.

    References:
        Bai, Koltun and Kolter, arXiv 2106.14342, section 4.
        Hutchinson, A stochastic estimator of the trace of the influence matrix (1990).
    """
    _check_probes(num_probes, distribution)
    _check_sharing(share_evaluation, through_state)
    problem = solved_problem(solution)
    _check_mode(solution.residual)
    layout = problem.layout
    z = layout.pack(solution.z)
    trains = torch.is_grad_enabled() and z.requires_grad
    vectors = (
        _drawn(z, num_probes, distribution, generator) if probes is None else _given(layout, probes)
    )
    taped = solution.solved.tape if share_evaluation and solution.solved is not None else None
    if taped is None:
        at = z if through_state and trains else z.detach().requires_grad_()
        with torch.enable_grad():
            taped = Iterate(at, image_again(solution, at))
    return _estimate(layout, taped, vectors, trains=trains)


def jacobian_penalty_at(
    f: Callable[[State], State],
    z: State,
    *,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    num_probes: int = 1,
    distribution: Probes = "rademacher",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`jacobian_penalty` of any map at any state, for fixed points found by other means: (B,).

    z is taken for a constant; arguments and errors are those of `jacobian_penalty`, `batch_dims`
    and `segments` those of `solve`. Trains where grad mode is on.
    """
    _check_probes(num_probes, distribution)
    problem = Problem(f, z, batch_dims, segments)
    _check_mode(problem.z0)
    vectors = _drawn(problem.z0, num_probes, distribution, generator)
    at = problem.z0.detach().requires_grad_()
    with torch.enable_grad():
        taped = Iterate(at, problem.image(at))
    return _estimate(problem.layout, taped, vectors, trains=torch.is_grad_enabled())


def _estimate(layout: Layout, taped: Iterate, vectors: Iterable[Tensor], *, trains: bool) -> Tensor:
    """Mean of ||v^T J||^2 / D over the vectors, all packed (B, D); z requires a gradient."""
    at = taped.z
    mean = at.detach().new_zeros(at.shape[0])
    if not taped.fz.requires_grad:  # f ignores z and everything else
        return mean
    product = transposed_jacobian(taped, create_graph=trains)
    with without_autocast(at.device):
        squares = [product(vector).square().sum(1) for vector in vectors]
    return torch.stack(squares).mean(0) / _sizes(layout, at)


def _drawn(
    like: Tensor, num_probes: int, distribution: Probes, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Random vectors of the form of `like`, one at a time."""
    for _ in range(num_probes):
        vector = torch.empty_like(like, requires_grad=False)
        if distribution == "normal":
            yield vector.normal_(generator=generator)
        else:
            yield vector.bernoulli_(0.5, generator=generator).mul_(2.0).sub_(1.0)


def _given(layout: Layout, probes: Sequence[State]) -> list[Tensor]:
    if len(probes) == 0:
        raise UserError("probes is empty; give at least one vector, or leave it out")
    return [layout.pack(probe) for probe in probes]


def _sizes(layout: Layout, packed: Tensor) -> Tensor | int:
    """Numbers per problem, (B,) where problems differ in size."""
    width = max(packed.shape[1], 1)
    scale = layout.norm_scale
    return width if scale is None else width / scale.square()


def _num_problems(solution: Solution, penalty: Tensor) -> Tensor | int:
    """Those that have something in them, at least 1: the mean of an empty batch is NaN."""
    segments = solved_problem(solution).layout.segments
    if segments is None:
        return max(penalty.numel(), 1)
    return segments.num_rows.count_nonzero().clamp_min(1)


def _known(step: int | None, why: str) -> int:
    if step is None:
        raise UserError(
            f"the regulariser needs the training step, because {why}; call it as "
            "regularizer(solution, step=step)"
        )
    if step < 0:
        raise UserError(f"training step {step} is negative; count steps from 0")
    return step


def _check_probes(num_probes: int, distribution: str) -> None:
    check_positive_integer("num_probes", num_probes)
    if distribution not in get_args(Probes):
        raise UserError(
            f"distribution={distribution!r} is not one of {', '.join(map(repr, get_args(Probes)))}"
            f"{nearest(str(distribution), get_args(Probes))}"
        )


def _check_sharing(share_evaluation: bool, through_state: bool) -> None:
    if share_evaluation and through_state:
        raise UserError(
            "the evaluation that share_evaluation=True would use was made at a constant z*, and "
            "through_state=True needs one that depends on it; give one of the two"
        )


def _check_mode(tensor: Tensor) -> None:
    """Refuse where autograd cannot be used; `tensor` is one that the solve made."""
    if is_transformed():
        raise TransformError(
            "the Jacobian penalty differentiates f by autograd, which works neither under "
            "torch.func transforms nor in forward mode; use loss.backward() or torch.autograd.grad"
        )
    if torch.is_inference_mode_enabled() or tensor.is_inference():
        raise UserError(
            "the Jacobian penalty needs autograd, which inference mode switches off for good; "
            "use torch.no_grad() instead, around the solve as well"
        )
