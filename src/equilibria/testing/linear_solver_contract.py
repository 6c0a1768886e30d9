"""What every solver of the backward system u = a(u) + b promises, as inherited tests."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from equilibria.adjoints.implicit import Implicit
from equilibria.api import solve
from equilibria.core.linear import LinearResult, LinearSolver
from equilibria.core.status import Status
from equilibria.terminations.residual import Residual
from equilibria.testing.dense import implicit_gradients, relative_error, spectral_radius
from equilibria.testing.expect import expect, expect_close, expect_equal, rms
from equilibria.testing.need_pytest import pytest
from equilibria.testing.probes import Recorder, Spoiled
from equilibria.testing.problems import PROBLEMS
from equilibria.testing.problems import problem as build


@dataclass(frozen=True)
class LinearSystem:
    """u = A u + b for every sample: `matrix` (B, D, D), `b` (B, D)."""

    name: str
    matrix: Tensor
    b: Tensor

    def a(self, u: Tensor) -> Tensor:
        """A u. A sum, so that the order of additions does not depend on the batch."""
        return (self.matrix * u.unsqueeze(1)).sum(2)

    @property
    def spectral_radius(self) -> float:
        """Largest over the batch."""
        return float(spectral_radius(self.matrix).max())

    @property
    def solution(self) -> Tensor:
        """By elimination."""
        return torch.linalg.solve(torch.eye(self.b.shape[1]).to(self.b) - self.matrix, self.b)

    @property
    def conditioning(self) -> Tensor:
        """Norm of (I - A)^-1, (B,)."""
        values = torch.linalg.svdvals(torch.eye(self.b.shape[1]).to(self.b) - self.matrix)
        return 1.0 / values[:, -1]

    def rows(self, rows: slice) -> LinearSystem:
        """The same for some of the samples."""
        return replace(self, matrix=self.matrix[rows], b=self.b[rows])

    def to(self, dtype: torch.dtype) -> LinearSystem:
        """The same in another dtype."""
        return replace(self, matrix=self.matrix.to(dtype), b=self.b.to(dtype))


_FROM_PROBLEMS = [
    name for name in PROBLEMS if name not in ("singular", "no_fixed_point", "nan_outside_ball")
]
SYSTEMS = [*_FROM_PROBLEMS, "nilpotent", "skew"]
"""Backward systems of the fixed-point problems, and two that are special as matrices."""


def system(name: str, batch: int = 4) -> LinearSystem:
    """Build a system of `SYSTEMS` in float64, with a random right-hand side."""
    draw = torch.Generator().manual_seed(1)
    if name in _FROM_PROBLEMS:
        problem = build(name, batch)
        matrix = problem.jacobian(torch.as_tensor(problem.z_star)).mT.contiguous()
    else:
        matrix = torch.randn(batch, 6, 6, dtype=torch.float64, generator=draw)
        # A power of it is zero; and one with eigenvalues on the imaginary axis, up to about 3.
        matrix = torch.triu(matrix, 1) if name == "nilpotent" else 0.6 * (matrix - matrix.mT)
    shape = (batch, matrix.shape[1])
    return LinearSystem(name, matrix, torch.randn(shape, dtype=torch.float64, generator=draw))


GUESSES: dict[str, Callable[[LinearSystem], Tensor]] = {
    "zeros": lambda system: torch.zeros_like(system.b),
    "another solution": lambda system: system.solution.flip(0),
    "its opposite": lambda system: -system.solution.roll(1, 0),
    "huge numbers": lambda system: 1e200 * system.b.flip(1),
    "tiny numbers": lambda system: 1e-200 * system.b.flip(1),
    "NaN": lambda system: torch.full_like(system.b, torch.nan),
    "infinity": lambda system: torch.full_like(system.b, torch.inf),
}
"""Where a linear solver may be told to start."""


class LinearSolverContract:
    """Derive a test class, write `make_solver`, say in `supports` what has to be solved.

    Every system is run; on those that are not supported the solver may fail but has to say so.
    """

    rtol: ClassVar[float] = 1e-9
    """Tolerance in float64."""
    max_steps: ClassVar[int] = 300
    products_per_step: ClassVar[int] = 1
    """By how much `num_steps` grows from one row of the trace to the next."""

    def make_solver(self) -> LinearSolver:
        """Return the solver to test; called many times, for equal ones."""
        raise NotImplementedError("a class derived from LinearSolverContract writes make_solver")

    def supports(self, system: LinearSystem) -> bool:
        """Whether the solver has to solve this; spectral radius below 1 unless told otherwise."""
        return system.spectral_radius < 0.99

    @pytest.fixture
    def solver(self) -> LinearSolver:
        """The solver under test."""
        return self.make_solver()

    @pytest.fixture(params=SYSTEMS)
    def system(self, request: pytest.FixtureRequest) -> LinearSystem:
        """Every system in turn."""
        return _built_once(type(self), request.param)

    @pytest.fixture
    def easy(self) -> LinearSystem:
        """One contraction."""
        return _built_once(type(self), "nonsymmetric")

    def run(
        self, solver: LinearSolver, a: Callable[[Tensor], Tensor], b: Tensor, **overrides: Any
    ) -> LinearResult:
        """Solve at the contract's tolerance."""
        settings: dict[str, Any] = {"rtol": self.rtol, "atol": 0.0, "max_steps": self.max_steps}
        with torch.no_grad():
            return solver.solve(a, b, **(settings | overrides))

    # --- right and honest ----------------------------------------------------------------------

    def test_finds_the_solution(self, solver: LinearSolver, system: LinearSystem) -> None:
        """Against elimination."""
        result = self.run(solver, system.a, system.b)
        solved = result.status == Status.SUCCESS
        if self.supports(system):
            expect(
                solved,
                f"{system.name} is supported, so it has to be solved; relative residuals "
                f"{result.relative_residual.tolist()}",
            )
        error = rms(result.u - system.solution)
        allowed = 10 * self.rtol * system.conditioning * rms(system.b)
        expect((error <= allowed)[solved], f"a success on {system.name} is one: {error.tolist()}")

    def test_reports_the_residual_of_what_it_returns(
        self, solver: LinearSolver, system: LinearSystem
    ) -> None:
        """rms(a(u) + b - u), and that over rms(b)."""
        result = self.run(solver, system.a, system.b)
        known = torch.isfinite(result.residual)
        true = rms(system.a(result.u) + system.b - result.u)
        promise = f"the residual reported on {system.name} is that of the returned u"
        # What a Krylov recurrence carries along drifts from the truth by rounding.
        drift = 1e-12 * float((1.0 + rms(result.u)).max())
        expect_close(result.residual[known], true[known], promise, rtol=1e-4, atol=drift)
        relative = result.residual / rms(system.b)
        expect_close(result.relative_residual, relative, promise, rtol=1e-6)

    def test_success_means_within_tolerance(
        self, solver: LinearSolver, system: LinearSystem
    ) -> None:
        """At a loose tolerance, on every system."""
        result = self.run(solver, system.a, system.b, rtol=1e-3)
        true = rms(system.a(result.u) + system.b - result.u)
        solved = result.status == Status.SUCCESS
        expect((true <= 1.001e-3 * rms(system.b))[solved], "a success meets the tolerance")

    def test_counts_every_product(self, solver: LinearSolver, system: LinearSystem) -> None:
        """num_evals is what the map saw."""
        a = Recorder(system.a)
        result = self.run(solver, a, system.b)
        expect_equal(result.num_evals, a.num_calls, "num_evals is the number of products")
        expect(result.num_steps <= self.max_steps, "num_steps stays within max_steps")

    def test_a_singular_system_is_no_success(self, solver: LinearSolver) -> None:
        """I - A with a zero eigenvalue that b meets: there is no solution."""
        diagonal = torch.tensor([1.0, 0.5, 0.2, 0.0, 0.1, 0.3], dtype=torch.float64)
        singular = LinearSystem(
            "singular",
            torch.diag(diagonal).expand(2, 6, 6),
            torch.ones(2, 6, dtype=torch.float64),
        )
        result = self.run(solver, singular.a, singular.b, rtol=1e-4)
        expect(result.status != Status.SUCCESS, "a system without a solution is not solved")
        expect(torch.isfinite(result.u), "the returned u is finite")

    def test_an_exhausted_space_is_no_success(self, solver: LinearSolver) -> None:
        """I - A maps the first direction to the second and that to zero: b = e_1 is no image."""
        a = torch.eye(4, dtype=torch.float64)
        a[1, 0] = -1.0
        singular = LinearSystem("nilpotent", a.expand(2, 4, 4), torch.eye(4, dtype=a.dtype)[:2])
        result = self.run(solver, singular.a, singular.b, rtol=1e-4)
        expect(result.status != Status.SUCCESS, "a system without a solution is not solved")

    # --- samples are independent ---------------------------------------------------------------

    def test_a_sample_does_not_depend_on_its_batch(
        self, solver: LinearSolver, system: LinearSystem
    ) -> None:
        """Alone or beside others, the same answer."""
        limit = self.max_steps if self.supports(system) else 3
        together = self.run(solver, system.a, system.b, max_steps=limit)
        for row in range(len(system.b)):
            part = system.rows(slice(row, row + 1))
            alone = self.run(solver, part.a, part.b, max_steps=limit)
            promise = f"sample {row} of {system.name} is the same alone and in its batch"
            expect_equal(alone.status, together.status[row : row + 1], f"{promise} (status)")
            error = float(rms(alone.u - together.u[row : row + 1]))
            slack = 1e2 * self.rtol * float(system.conditioning[row])
            expect(error <= slack * (1.0 + float(rms(alone.u))), f"{promise} ({error:.1e})")

    @pytest.mark.parametrize("from_call", [0, 1, 3])
    def test_a_nan_stays_in_its_sample(
        self, solver: LinearSolver, easy: LinearSystem, from_call: int
    ) -> None:
        """The others do not notice; the spoiled one says so and is finite and not zero."""
        clean = self.run(solver, easy.a, easy.b)
        spoilt = self.run(solver, Spoiled(easy.a, row=1, from_call=from_call), easy.b)
        others = [0, 2, 3]
        expect_equal(spoilt.u[others], clean.u[others], "other samples keep their solution")
        expect_equal(spoilt.status[others], clean.status[others], "others keep their status")
        expect_equal(int(spoilt.status[1]), int(Status.NONFINITE), "the NaN sample says so")
        expect(torch.isfinite(spoilt.u), "the returned u is finite")
        expect(bool(spoilt.u[1].any()), "a failed sample is no silent gradient of zero")

    def test_a_zero_right_hand_side(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """A sample outside the loss: solution zero, no step, and the others as without it."""
        b = easy.b.clone()
        b[1] = 0.0
        result = self.run(solver, easy.a, b)
        expect(result.status == Status.SUCCESS, "nothing to solve is a success")
        expect(not bool(result.u[1].any()), "u = 0 for b = 0")
        expect_equal(int(result.num_steps[1]), 0, "and it takes no step")
        plain = self.run(solver, easy.a, easy.b)
        expect_close(result.u[[0, 2, 3]], plain.u[[0, 2, 3]], "others keep u", atol=1e-12)

    @pytest.mark.parametrize(
        "limits", [{"atol": 1e3}, {"max_steps": 1}, {"max_steps": 20}], ids=str
    )
    def test_nothing_gained_is_no_gradient_of_zero(
        self, solver: LinearSolver, limits: dict[str, Any]
    ) -> None:
        """I - A turns by a right angle, so that no multiple of b is better than zero."""
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        b = torch.tensor([[1.0, 2.0], [0.3, -0.1], [0.0, 0.0]], dtype=torch.float64)
        result = self.run(solver, lambda u: u - u @ turn, b, **limits)
        expect_equal((result.u != 0).any(1), (b != 0).any(1), "u is zero where b is")
        true = rms(b - result.u @ turn)
        expect_close(result.residual, true, "with the residual of what it is", atol=1e-9)
        solved = result.status == Status.SUCCESS
        allowed = limits.get("atol", 0.0) + self.rtol * rms(b)
        expect((true <= 1.01 * allowed)[solved], "a success meets the tolerance")

    # --- side effects --------------------------------------------------------------------------

    def test_the_same_call_gives_the_same_bits(
        self, solver: LinearSolver, system: LinearSystem
    ) -> None:
        """And the right-hand side is not written to."""
        b = system.b.clone()
        first, second = (self.run(solver, system.a, b) for _ in range(2))
        for name in ("u", "status", "num_steps"):
            expect_equal(getattr(first, name), getattr(second, name), f"{name} is reproducible")
        expect_equal(b, system.b, "b is untouched")

    def test_products_are_not_written_to(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """a may return a tensor that it keeps."""
        a = Recorder(easy.a)
        self.run(solver, a, easy.b)
        expect(a.images_untouched, "what a returned is untouched")

    def test_the_random_state_is_left_alone(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """Nothing is drawn."""
        before = torch.get_rng_state()
        self.run(solver, easy.a, easy.b)
        expect_equal(torch.get_rng_state(), before, "the global random state is untouched")

    def test_the_solver_is_a_frozen_value(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """Compared, copied and pickled; solving changes nothing."""
        before = pickle.dumps(solver)
        wanted = self.run(solver, easy.a, easy.b)
        expect_equal(pickle.dumps(solver), before, "solving leaves the solver as it was")
        for twin in (copy.deepcopy(solver), pickle.loads(before), self.make_solver()):
            expect_equal(twin, solver, "copies compare equal")
            expect_equal(self.run(twin, easy.a, easy.b).u, wanted.u, "copies solve alike")

    # --- guesses -------------------------------------------------------------------------------

    @pytest.mark.parametrize("guess", GUESSES)
    def test_no_guess_spoils_the_result(
        self, solver: LinearSolver, easy: LinearSystem, guess: str
    ) -> None:
        """Right or wrong, large or small, not even a number: the same solution."""
        result = self.run(solver, easy.a, easy.b, guess=GUESSES[guess](easy))
        expect(result.status == Status.SUCCESS, f"it converges in spite of a guess of {guess}")
        error = rms(result.u - easy.solution)
        expect(
            error <= 1e2 * self.rtol * easy.conditioning * rms(easy.b),
            f"a guess of {guess} leads elsewhere, errors {error.tolist()}",
        )

    def test_a_sample_without_a_guess_starts_as_ever(
        self, solver: LinearSolver, easy: LinearSystem
    ) -> None:
        """NaN says that nothing is known; beside samples of which all is."""
        guess = easy.solution.clone()
        guess[1] = torch.nan
        plain = self.run(solver, easy.a, easy.b)
        result = self.run(solver, easy.a, easy.b, guess=guess)
        expect_close(result.u[1], plain.u[1], "an unknown sample is solved as without", atol=1e-12)
        few = 2 * self.products_per_step
        expect(result.num_steps[[0, 2, 3]] <= few, "known samples are as good as solved")

    def test_a_good_guess_is_used_at_any_scale(
        self, solver: LinearSolver, easy: LinearSystem
    ) -> None:
        """Gradients shrink during training, and loss scaling changes; directions stay."""
        for scale in (1.0, -1e-3, 2.0**20):
            result = self.run(solver, easy.a, easy.b, guess=scale * easy.solution)
            expect(result.status == Status.SUCCESS, "it converges")
            expect(result.num_evals <= 4, f"the solution times {scale:g} saves nearly everything")

    def test_a_guess_is_not_written_to(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """It belongs to the caller."""
        guess = easy.b.flip(0)
        self.run(solver, easy.a, easy.b, guess=guess)
        expect_equal(guess, easy.b.flip(0), "the guess is untouched")

    # --- tolerances, limits, dtypes ------------------------------------------------------------

    def test_the_scale_of_b_changes_nothing(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """Loss scaling must not change a gradient's accuracy: powers of two give the same bits."""
        plain = self.run(solver, easy.a, easy.b, rtol=1e-5)
        scaled = self.run(solver, easy.a, 2.0**-40 * easy.b, rtol=1e-5)
        expect_equal(scaled.u, 2.0**-40 * plain.u, "u scales with b, to the last bit")
        expect_equal(scaled.num_steps, plain.num_steps, "steps do not depend on the scale of b")

    def test_the_absolute_tolerance_counts(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """rtol 0 with a generous atol."""
        result = self.run(solver, easy.a, easy.b, rtol=0.0, atol=0.1)
        expect(result.status == Status.SUCCESS, "atol alone is enough")
        expect(rms(easy.a(result.u) + easy.b - result.u) <= 0.1001, "and it is met")

    @pytest.mark.parametrize("max_steps", [1, 2])
    def test_few_steps(self, solver: LinearSolver, easy: LinearSystem, max_steps: int) -> None:
        """The limit is kept and reported, with the residual of what is returned."""
        result = self.run(solver, easy.a, easy.b, max_steps=max_steps, rtol=1e-14, trace=True)
        expect(result.num_steps <= max_steps, "the step limit is kept")
        expect(result.status != Status.SUCCESS, "a limit that is hit is no success")
        expect_close(
            result.residual,
            rms(easy.a(result.u) + easy.b - result.u),
            "the residual is that of the returned u",
            rtol=1e-6,
        )
        expect(result.residual <= rms(easy.b) * (1 + 1e-9), "and no worse than that of u = 0")

    def test_the_trace_has_a_row_per_step(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """After that of the start; NaN once a sample is finished."""
        result = self.run(solver, easy.a, easy.b, trace=True)
        rows = result.num_steps // self.products_per_step
        trace = torch.as_tensor(result.trace)
        expected = (int(rows.max()) + 1, 4)
        expect_equal(tuple(trace.shape), expected, "one row for the start and one per step")
        finished = torch.arange(expected[0]).unsqueeze(1) > rows
        expect_equal(trace.isnan(), finished, "a row is NaN for the samples that are finished")
        expect_equal(self.run(solver, easy.a, easy.b).trace, None, "no trace unless asked for")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_keeps_the_dtype(
        self, solver: LinearSolver, easy: LinearSystem, dtype: torch.dtype
    ) -> None:
        """u and its residual in the dtype of b."""
        given = easy.to(dtype)
        result = self.run(solver, given.a, given.b, rtol=1e-5)
        expect_equal(result.u.dtype, dtype, "u has the dtype of b")
        expect(result.status == Status.SUCCESS, "it converges")
        expect_close(result.u, easy.solution, "to the right u", atol=1e-3)

    def test_a_tolerance_below_the_dtype_is_not_claimed(
        self, solver: LinearSolver, easy: LinearSystem
    ) -> None:
        """float32 and rtol 1e-12: whatever happens, the report is true."""
        given = easy.to(torch.float32)
        result = self.run(solver, given.a, given.b, rtol=1e-12, max_steps=60)
        u = result.u.double()
        true = rms(given.matrix.double() @ u.unsqueeze(2) - (u - given.b.double()).unsqueeze(2))
        expect(
            (result.residual.double() - true).abs() <= 1e-6 * rms(given.b),
            "the residual is honest to the precision of the dtype",
        )

    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches(self, solver: LinearSolver, easy: LinearSystem, batch: int) -> None:
        """Shapes are kept."""
        part = easy.rows(slice(0, batch))
        result = self.run(solver, part.a, part.b)
        expect_equal(tuple(result.u.shape), (batch, 6), "u has the shape of b")
        expect_equal(tuple(result.status.shape), (batch,), "one status per sample")

    def test_a_guess_is_used(self, solver: LinearSolver, easy: LinearSystem) -> None:
        """Started at the solution there is nothing to do, started elsewhere it is found again."""
        done = self.run(solver, easy.a, easy.b, guess=easy.solution, rtol=1e-6)
        expect_equal(done.num_steps.tolist(), [0] * 4, "a solved system takes no step")
        expect_close(done.u, easy.solution, "and the guess is returned", rtol=1e-12, atol=1e-12)
        guess = easy.b.flip(1)
        given = guess.clone()
        found = self.run(solver, easy.a, easy.b, guess=guess)
        expect(found.status == Status.SUCCESS, "a wrong guess does not prevent success")
        expect_close(found.u, easy.solution, "nor the right answer", rtol=1e-5, atol=1e-6)
        expect_equal(guess, given, "the guess is untouched")

    # --- as the backward solver of a layer -----------------------------------------------------

    @pytest.mark.parametrize("name", ["tanh", "convolution", "attention", "rotation"])
    def test_gives_the_implicit_gradient(self, solver: LinearSolver, name: str) -> None:
        """Inside `Implicit`, against the dense reference."""
        live = build(name).differentiable()
        star = torch.as_tensor(live.z_star)
        solution = solve(
            live.f,
            star,
            termination=Residual(1e-8, 1e-8),
            adjoint=Implicit(solver, rtol=self.rtol, max_steps=self.max_steps),
            on_failure="raise",
        )
        cotangent = torch.randn(
            star.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        found = torch.autograd.grad(solution.z, live.sources, cotangent)
        wanted = implicit_gradients(live.f, star, cotangent, live.sources)
        error = relative_error(found, wanted)
        expect(error <= 1e2 * self.rtol, f"the gradient of {name} is off by {error:.1e}")


@cache
def _built_once(contract: type[LinearSolverContract], name: str) -> LinearSystem:
    return system(name)
