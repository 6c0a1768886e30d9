"""Fixed-point correction: a loss on the states along the way, not on the last one alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.core.options import Options
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution

Weighting = Literal["exponential", "linear", "constant"]


@dataclass(frozen=True)
class FixedPointCorrection(Options):
    """A weighted sum of the losses of the states z_1, ..., z_n of a solve, z_n = z* the last.

        loss = sum_i w_i * criterion(z_i),

        exponential: w_i ~ gamma^(n - i)        linear: w_i ~ i / n        constant: w_i ~ 1

    Every state carries its own gradient, by the adjoint of the solve and as if it were the fixed
    point. This pulls the whole path towards the answer: solves get shorter, and stopping early
    costs less. Ask the solve for states, `deq(x, states=3)`; with an exact adjoint each of them
    costs a recorded evaluation and a backward solve of its own, so take `OneStep` or `Phantom`
    where many are wanted.

    Args:
        weighting: "exponential" (default), "linear" or "constant".
        gamma: ratio of one weight to the next, for "exponential"; .8 is the published value.
        normalization: "sum" (default) makes the weights sum to 1, so that the loss, and with it
            the learning rate, does not grow with the number of states; "last" gives z* the weight
            1, the published form, which adds correction terms to an unchanged loss.

    Raises:
        UserError: an unknown weighting or normalization, gamma outside 0 to 1.

    References:
        Bai, Geng, Savani and Kolter, Deep Equilibrium Optical Flow Estimation, arXiv 2204.08442.

    Examples:
        >>> [round(weight, 3) for weight in FixedPointCorrection().weights(3)]
        [0.262, 0.328, 0.41]
        >>> [round(w, 3) for w in FixedPointCorrection(normalization="last").weights(3)]
        [0.64, 0.8, 1.0]
    """

    weighting: Weighting = "exponential"
    gamma: float = 0.8
    normalization: Literal["sum", "last"] = "sum"

    def __post_init__(self) -> None:
        for name, known in (("weighting", get_args(Weighting)), ("normalization", ("sum", "last"))):
            given = getattr(self, name)
            if given not in known:
                raise UserError(
                    f"{name}={given!r} is not one of {', '.join(map(repr, known))}"
                    f"{nearest(str(given), known)}"
                )
        if not 0.0 < self.gamma <= 1.0:
            raise UserError(f"gamma={self.gamma!r} must be above 0 and at most 1")

    def weights(self, num_states: int) -> tuple[float, ...]:
        """The weights of so many states, the final one last."""
        check_positive_integer("num_states", num_states)
        places = range(1, num_states + 1)
        weights = {
            "exponential": [self.gamma ** (num_states - i) for i in places],
            "linear": [i / num_states for i in places],
            "constant": [1.0 for _ in places],
        }[self.weighting]
        total = sum(weights) if self.normalization == "sum" else 1.0
        return tuple(weight / total for weight in weights)

    def __call__(
        self, criterion: Callable[..., Tensor], solution: Solution, *arguments: Any
    ) -> Tensor:
        """The weighted sum of `criterion(z, *arguments)` over the states of a solution.

        Args:
            criterion: the loss of one state: everything behind the solve, read-out included. A
                scalar, or any shape that is the same for all states.
            solution: of a solve that was asked for states; how many there are depends on when it
                stopped, with only the final one where it stopped before the first.
            *arguments: handed to the criterion after the state, commonly the target.

        Raises:
            UserError: the solution holds no states.
        """
        if not isinstance(solution, Solution):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(
                f"expected a Solution after the criterion, got a {type(solution).__name__}; call "
                "it as correction(criterion, solution, target)"
            )
        if not solution.states:
            raise UserError(
                "the solution holds no intermediate states; ask for them in the solve, for "
                "example solve(f, z0, states=3) or deq(x, states=3)"
            )
        weights = self.weights(len(solution.states))
        terms = [
            weight * criterion(state, *arguments)
            for weight, state in zip(weights, solution.states, strict=True)
        ]
        return sum(terms[1:], terms[0])
