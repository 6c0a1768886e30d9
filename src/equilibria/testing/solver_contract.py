"""What every fixed-point solver promises, as tests that a class of two methods inherits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.unrolled import Unrolled
from equilibria.api import solve
from equilibria.core.solution import Solution
from equilibria.core.solver import Solver
from equilibria.core.status import Status
from equilibria.linear.fixed_point import FixedPoint
from equilibria.terminations.residual import Residual
from equilibria.testing.dense import implicit_gradients, relative_error
from equilibria.testing.expect import expect, expect_close, expect_equal, rms
from equilibria.testing.need_pytest import pytest
from equilibria.testing.probes import Recorder, Spoiled
from equilibria.testing.problems import PROBLEMS, FixedPointProblem
from equilibria.testing.problems import problem as build
from equilibria.testing.states import STATES, StateProblem

_DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
_PRECISIONS = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@dataclass(frozen=True)
class Run:
    """A solve of one problem at the contract's tolerance, and every call of the map during it."""

    solution: Solution
    f: Recorder


class SolverContract:
    """Derive a test class, write `make_solver`, and say in `supports` what it is meant to solve.

        class TestMySolver(SolverContract):
            def make_solver(self):
                return MySolver()

    Every problem is run, also those that are not supported: there the solver may fail, but has
    to say so. Tests call `solve` without knowing how the solver works.
    """

    rtol: ClassVar[float] = 1e-9
    """Tolerance in float64; a solver that cannot reach it may set a looser one."""
    max_steps: ClassVar[int] = 300
    differentiable: ClassVar[bool] = True
    """Whether gradients can be unrolled through the steps."""

    def make_solver(self) -> Solver:
        """Return the solver to test; called many times, for equal ones."""
        raise NotImplementedError("a class derived from SolverContract writes make_solver")

    def supports(self, problem: FixedPointProblem) -> bool:
        """Whether the solver has to solve this problem; contractions unless told otherwise."""
        return "contraction" in problem.tags

    # --- what tests are given ------------------------------------------------------------------

    @pytest.fixture
    def solver(self) -> Solver:
        """The solver under test."""
        return self.make_solver()

    @pytest.fixture(params=list(PROBLEMS))
    def problem(self, request: pytest.FixtureRequest) -> FixedPointProblem:
        """Every problem in turn."""
        return _built_once(type(self), request.param)

    @pytest.fixture
    def solved(self, problem: FixedPointProblem) -> Run:
        """The problem, solved once for all tests that only look at the result."""
        return _solved_once(type(self), problem.name)

    @pytest.fixture
    def easy(self) -> FixedPointProblem:
        """One nonlinear contraction whose samples finish at different steps."""
        return _built_once(type(self), "tanh")

    def run(self, f: Callable[[Any], Any], z0: Any, solver: Solver, **overrides: Any) -> Solution:
        """`solve` at the contract's tolerance, without gradients and without warnings."""
        settings: dict[str, Any] = {
            "termination": Residual(rtol=self.rtol, atol=self.rtol),
            "max_steps": self.max_steps,
            "on_failure": "ignore",
        }
        with torch.no_grad():
            return solve(f, z0, solver=solver, **(settings | overrides))

    # --- right and honest ----------------------------------------------------------------------

    def test_finds_the_fixed_point(self, problem: FixedPointProblem, solved: Run) -> None:
        """What it calls a success is one, and what it supports it solves."""
        solution = solved.solution
        if self.supports(problem):
            expect(
                solution.converged,
                f"{problem.name} is supported, so every sample has to converge; status "
                f"{solution.status.tolist()}, residuals {solution.residual.tolist()}",
            )
        if problem.z_star is None:
            expect(~solution.converged, f"{problem.name} has no fixed point, yet one was claimed")
        elif "multiple" not in problem.tags:
            allowed = 10 * self.rtol * problem.conditioning * (1.0 + rms(problem.z_star))
            error = rms(solution.z - problem.z_star)
            expect(
                (error <= allowed)[solution.converged],
                f"a converged sample of {problem.name} is {error.tolist()} away from the fixed "
                f"point, where the tolerance allows {allowed.tolist()}",
            )

    def test_reports_the_residual_of_what_it_returns(
        self, problem: FixedPointProblem, solved: Run
    ) -> None:
        """Undamped, and of exactly the returned state."""
        solution = solved.solution
        image = problem.f(solution.z)
        promise = f"the residual reported on {problem.name} is that of the returned state"
        expect_close(solution.residual, rms(image - solution.z), promise, rtol=1e-6, atol=1e-14)
        relative = solution.residual / rms(image).clamp_min(1e-300)
        expect_close(solution.relative_residual, relative, promise, rtol=1e-6)

    def test_counts_every_call(self, solver: Solver, solved: Run) -> None:
        """num_evals is what the map saw, and steps stay within the limit."""
        solution = solved.solution
        expect_equal(solution.num_evals, solved.f.num_calls, "num_evals is the calls of f")
        expect(solution.num_steps <= self.max_steps, "num_steps stays within max_steps")
        if solver.single_evaluation:
            steps = int(solution.num_steps.max())
            expect_equal(solution.num_evals, 1 + steps, "one call for z0 and one for each step")

    def test_a_finished_sample_does_not_move(self, problem: FixedPointProblem, solved: Run) -> None:
        """The last call of f sees it where it finished."""
        solution = solved.solution
        early = solution.num_steps < solution.num_steps.max()
        expect_equal(
            solved.f.points[-1][early],
            solution.z[early],
            f"samples of {problem.name} that finished stay where they finished",
        )

    def test_success_means_within_tolerance(
        self, solver: Solver, problem: FixedPointProblem
    ) -> None:
        """Also at a loose tolerance, and also where the map is not supported."""
        solution = self.run(problem.f, problem.z0, solver, termination=Residual(1e-3, 1e-3))
        image = problem.f(solution.z)
        within = rms(image - solution.z) <= 1.001e-3 * (1.0 + rms(image))
        expect(within[solution.converged], f"a success on {problem.name} meets the tolerance")

    def test_the_best_iterate_is_no_worse_than_the_last(
        self, solver: Solver, problem: FixedPointProblem
    ) -> None:
        """Between keep="best" and keep="last", and no worse than z0."""
        best = self.run(problem.f, problem.z0, solver, keep="best", max_steps=7)
        last = self.run(problem.f, problem.z0, solver, keep="last", max_steps=7)
        start = rms(problem.f(problem.z0) - problem.z0)
        # A state that ran away has a residual that says nothing, however small.
        judged = (best.status != Status.DIVERGED) & (last.status != Status.DIVERGED)
        slack = 1.0 + 1e-9
        expect((best.residual <= last.residual * slack)[judged], "the best beats the last")
        expect((best.residual <= start * slack)[judged], "the best iterate beats z0")

    # --- samples are independent ---------------------------------------------------------------

    def test_a_sample_does_not_depend_on_its_batch(
        self, solver: Solver, problem: FixedPointProblem
    ) -> None:
        """Alone or beside others, a sample has the same answer after the same steps."""
        # Where a solver does not converge, rounding grows without bound.
        limit = self.max_steps if self.supports(problem) else 3
        together = self.run(problem.f, problem.z0, solver, max_steps=limit)
        for row in range(len(problem.z0)):
            part = problem.rows(slice(row, row + 1))
            alone = self.run(part.f, part.z0, solver, max_steps=limit)
            promise = f"sample {row} of {problem.name} is the same alone and in its batch"
            statuses = {int(alone.status), int(together.status[row])}
            if not self.supports(problem) and Status.SUCCESS not in statuses and len(statuses) > 1:
                continue  # rounding decides in which way it fails
            expect_equal(alone.status, together.status[row : row + 1], f"{promise} (status)")
            steps = (alone.num_steps - together.num_steps[row : row + 1]).abs()
            expect(steps <= 1, f"{promise} (steps)")
            scale = 1.0 + float(rms(together.z)[row])
            error = float(rms(alone.z - together.z[row : row + 1]))
            # One step more or less moves a converged sample within its tolerance.
            slack = 1e-9 if int(steps) == 0 else 1e3 * self.rtol
            expect(error <= slack * scale, f"{promise} (z differs by {error:.1e})")

    def test_the_order_of_samples_does_not_matter(
        self, solver: Solver, easy: FixedPointProblem
    ) -> None:
        """A permuted batch has the permuted solution."""
        order = torch.tensor([2, 0, 3, 1])
        plain = self.run(easy.f, easy.z0, solver)
        x, weight = easy.sources
        shuffled = replace(easy, z0=easy.z0[order], inputs=(x[order],), weights=(weight,))
        permuted = self.run(shuffled.f, shuffled.z0, solver)
        expect_equal(permuted.status, plain.status[order], "status follows the sample")
        expect_close(permuted.z, plain.z[order], "z follows the sample", atol=1e-9)

    @pytest.mark.parametrize("from_call", [0, 1, 3])
    def test_a_nan_stays_in_its_sample(
        self, solver: Solver, easy: FixedPointProblem, from_call: int
    ) -> None:
        """The others do not notice, and the spoiled one keeps its best finite state."""
        clean = self.run(easy.f, easy.z0, solver)
        seen = Recorder(Spoiled(easy.f, row=1, from_call=from_call))
        solution = self.run(seen, easy.z0, solver)
        others = [0, 2, 3]
        expect_equal(solution.z[others], clean.z[others], "other samples keep their solution")
        expect_equal(solution.status[others], clean.status[others], "others keep their status")
        expect_equal(solution.num_steps[others], clean.num_steps[others], "others keep their steps")
        expect_equal(int(solution.status[1]), int(Status.NONFINITE), "the NaN sample says so")
        expect(torch.isfinite(solution.z), "the returned state is finite")
        before = rms(easy.f(solution.z) - solution.z)[1]
        expect(before <= rms(easy.f(easy.z0) - easy.z0)[1], "it is no worse than z0")
        last = seen.points[-1]
        expect(torch.isfinite(last), "f is not shown NaN by the time the solve ends")

    def test_a_nan_at_the_start_returns_z0(self, solver: Solver, easy: FixedPointProblem) -> None:
        """With no step made."""
        solution = self.run(Spoiled(easy.f, row=2), easy.z0 + 0.25, solver)
        expect_equal(solution.z[2], easy.z0[2] + 0.25, "a sample that is NaN at z0 returns z0")
        expect_equal(int(solution.num_steps[2]), 0, "it makes no step")

    def test_a_solved_sample_makes_no_step(self, solver: Solver) -> None:
        """z0 at the fixed point of some samples costs them nothing, and the others nothing."""
        easy = build("half_precision")
        z0 = easy.z0.clone()
        z0[1::2] = torch.as_tensor(easy.z_star)[1::2]
        f = Recorder(easy.f)
        solution = self.run(f, z0, solver)
        expect_equal(solution.num_steps[1::2].tolist(), [0, 0], "a solved sample makes no step")
        expect_equal(solution.z[1::2], z0[1::2], "a solved sample stays where it is")
        expect(solution.converged, "the unsolved samples still converge")
        expect(
            torch.stack([bool((p[1::2] == z0[1::2]).all()) * torch.ones(()) for p in f.points]),
            "f sees a solved sample at one point only",
        )

    # --- side effects --------------------------------------------------------------------------

    def test_the_same_call_gives_the_same_bits(
        self, solver: Solver, problem: FixedPointProblem, solved: Run
    ) -> None:
        """Nothing is remembered between solves."""
        again = self.run(problem.f, problem.z0, solver)
        for name in ("z", "status", "residual", "num_steps"):
            expect_equal(
                getattr(again, name), getattr(solved.solution, name), f"{name} is reproducible"
            )

    def test_z0_and_images_are_not_written_to(
        self, solver: Solver, easy: FixedPointProblem
    ) -> None:
        """Neither the initial state nor what f returned, which may be a parameter."""
        z0, f = easy.z0.clone(), Recorder(easy.f)
        self.run(f, z0, solver)
        expect_equal(z0, easy.z0, "z0 is untouched")
        expect(f.images_untouched, "what f returned is untouched")
        fixed = build("constant")
        given = fixed.sources[0].clone()
        self.run(fixed.f, fixed.z0, solver)
        expect_equal(fixed.sources[0], given, "a tensor that f returns as it is stays untouched")

    def test_the_random_state_is_left_alone(self, solver: Solver, easy: FixedPointProblem) -> None:
        """A solve draws nothing from the global generator."""
        before = torch.get_rng_state()
        self.run(easy.f, easy.z0, solver)
        expect_equal(torch.get_rng_state(), before, "the global random state is untouched")

    def test_one_object_serves_nested_solves(self, solver: Solver, easy: FixedPointProblem) -> None:
        """A solve inside the map of another, by the same solver object."""
        inner = build("symmetric", seed=1)

        def f(z: Tensor) -> Tensor:
            self.run(inner.f, inner.z0, solver, max_steps=3)
            return easy.f(z)

        alone, nested = self.run(easy.f, easy.z0, solver), self.run(f, easy.z0, solver)
        expect_equal(nested.z, alone.z, "a nested solve does not disturb the outer one")

    def test_the_solver_is_a_frozen_value(self, solver: Solver, easy: FixedPointProblem) -> None:
        """Hyper-parameters only: comparable, copied and pickled; solving changes nothing."""
        expect(is_dataclass(solver), "a solver is a dataclass")
        before = pickle.dumps(solver)
        wanted = self.run(easy.f, easy.z0, solver)
        expect_equal(pickle.dumps(solver), before, "solving leaves the solver as it was")
        for twin in (copy.deepcopy(solver), pickle.loads(before), self.make_solver()):
            expect_equal(twin, solver, "copies compare equal")
            expect_equal(self.run(easy.f, easy.z0, twin).z, wanted.z, "copies solve alike")
        expect_equal(hash(self.make_solver()), hash(solver), "equal solvers have equal hashes")

    # --- any state -----------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", _PRECISIONS, ids=str)
    def test_keeps_the_dtype(self, solver: Solver, dtype: torch.dtype) -> None:
        """f sees the dtype of z0; residuals are at least float32."""
        rtol, easy = _PRECISIONS[dtype], build("half_precision", dtype=dtype)
        seen = Recorder(easy.f)
        solution = self.run(seen, easy.z0, solver, termination=Residual(max(rtol, self.rtol), 0.0))
        expect_equal({p.dtype for p in seen.points}, {dtype}, "f sees the dtype of z0")
        expect_equal(solution.z.dtype, dtype, "the solution has the dtype of z0")
        expect(solution.converged, f"a well-scaled contraction converges in {dtype}")
        wanted = torch.promote_types(dtype, torch.float32)
        expect_equal(solution.residual.dtype, wanted, "residuals are at least float32")
        error = (solution.z.double() - torch.as_tensor(easy.z_star)).abs()
        expect(error <= 10 * max(rtol, self.rtol), f"the error in {dtype} is {error.max():.1e}")

    @pytest.mark.parametrize("device", _DEVICES)
    def test_keeps_the_device(self, solver: Solver, device: str) -> None:
        """Everything in the solution is where z0 is."""
        easy = build("tanh").to(device)
        solution = self.run(easy.f, easy.z0, solver)
        for name in ("z", "status", "residual", "num_steps"):
            expect_equal(getattr(solution, name).device.type, device, f"{name} stays on the device")
        expect(solution.converged, f"it converges on {device}")

    @pytest.mark.parametrize("kind", STATES)
    def test_every_kind_of_state(self, solver: Solver, kind: str) -> None:
        """Trees, mixed dtypes, one problem, ragged batches, strides, batches of 0 and 1."""
        given = StateProblem(kind)
        tolerance = max(self.rtol, 2 * given.precision)
        solution = self.run(
            given, given.z0, solver, termination=Residual(tolerance, tolerance), **given.settings
        )
        expect_equal(
            given.form_of(solution.z), given.form_of(given.z0), "tree, shapes, dtypes, layout stay"
        )
        for name in ("status", "residual", "num_steps"):
            shape = tuple(getattr(solution, name).shape)
            expect_equal(shape, (given.num_problems,), f"{name} is per problem")
        expect(solution.converged, f"every problem converges; {solution.residual.tolist()}")
        found = given.join(solution.z)
        expect_close(found, given.z_star, "to the fixed point", atol=20 * tolerance)

    @pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3)])
    def test_any_shape_of_a_sample(self, solver: Solver, shape: tuple[int, ...]) -> None:
        """One number, a vector of one, an image."""
        start = torch.linspace(0.2, 1.0, 3, dtype=torch.float64).view(3, *(1,) * len(shape))
        solution = self.run(torch.cos, start.expand(3, *shape), solver)
        expect_equal(tuple(solution.z.shape), (3, *shape), "the shape is kept")
        expect((solution.z - 0.7390851332151607).abs() < 1e2 * self.rtol, "cos(z) = z at 0.739")

    def test_the_scale_of_the_state_changes_nothing(
        self, solver: Solver, easy: FixedPointProblem
    ) -> None:
        """z in other units: a power of two only shifts exponents, so the bits agree.

        An absolute constant anywhere (a ridge, a threshold, an epsilon) shows here.
        """
        scale, tolerance = 2.0**-30, Residual(rtol=1e-6, atol=0.0)
        plain = self.run(easy.f, easy.z0, solver, termination=tolerance)

        def in_other_units(z: Tensor) -> Tensor:
            return easy.f(z / scale) * scale

        scaled = self.run(in_other_units, easy.z0, solver, termination=tolerance)
        expect_equal(scaled.status, plain.status, "status does not depend on units")
        expect_equal(scaled.num_steps, plain.num_steps, "steps do not depend on units")
        expect_equal(scaled.z / scale, plain.z, "z scales with its units")

    @pytest.mark.parametrize("layout", ["expanded", "channels_last"])
    def test_f_sees_the_memory_format_of_z0(self, solver: Solver, layout: str) -> None:
        """At every step after the first; a contiguous state unless z0 is channels_last."""
        wanted = torch.linspace(-1.0, 1.0, 48, dtype=torch.float64).view(2, 2, 3, 4)
        zeros = torch.zeros_like(wanted)
        z0 = {
            "expanded": zeros[0, 0, 0, 0].expand(2, 2, 3, 4),
            "channels_last": zeros.contiguous(memory_format=torch.channels_last),
        }[layout]
        seen: list[tuple[int, ...]] = []

        def f(z: Tensor) -> Tensor:
            seen.append(z.stride())
            return wanted + 0.5 * (z - wanted).flip(1)

        solution = self.run(f, z0, solver)
        strides = z0.stride() if layout == "channels_last" else wanted.stride()
        expect_equal(set(seen[1:]), {strides}, "f sees the memory format of z0")
        expect_equal(solution.z.stride(), strides, "the solution has it too")

    # --- limits and reports --------------------------------------------------------------------

    @pytest.mark.parametrize("max_steps", [1, 2])
    def test_few_steps(self, solver: Solver, easy: FixedPointProblem, max_steps: int) -> None:
        """The limit is kept, and missing the tolerance is reported."""
        f = Recorder(easy.f)
        solution = self.run(f, easy.z0, solver, max_steps=max_steps, termination=Residual(1e-14))
        expect_equal(solution.num_evals, f.num_calls, "num_evals is the number of calls of f")
        expect(solution.num_steps <= max_steps, "the step limit is kept")
        expect(~solution.converged, "a limit that is hit is no success")
        expect_close(
            solution.residual,
            rms(easy.f(solution.z) - solution.z),
            "the residual is that of the returned state",
            rtol=1e-6,
        )

    def test_the_trace_ends_with_what_is_returned(
        self, solver: Solver, easy: FixedPointProblem
    ) -> None:
        """One row per step after that of z0, NaN once a sample is finished."""
        solution = self.run(easy.f, easy.z0, solver, trace=True)
        trace = torch.as_tensor(solution.trace)
        steps = int(solution.num_steps.max())
        expect_equal(tuple(trace.shape), (steps + 1, 4), "the trace has num_steps + 1 rows")
        at_the_end = trace.gather(0, solution.num_steps.unsqueeze(0)).squeeze(0)
        expect_close(at_the_end, solution.relative_residual, "it ends at the returned residual")

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_nothing_is_recorded(
        self, solver: Solver, easy: FixedPointProblem, mode: Callable[[], Any]
    ) -> None:
        """Also when parameters require a gradient."""
        live = easy.differentiable()
        with mode():
            solution = solve(live.f, live.z0, solver=solver, on_failure="ignore")
        expect(not solution.z.requires_grad, "no graph without grad mode")
        expect(solution.converged, "and it still solves")

    # --- gradients -----------------------------------------------------------------------------

    def test_implicit_gradients_are_exact(self, solver: Solver, problem: FixedPointProblem) -> None:
        """Of every parameter, against the dense solution of (I - J^T) u = g."""
        self._skip_without_a_gradient(problem)
        live = problem.differentiable()
        solution = solve(
            live.f,
            live.z0,
            solver=solver,
            termination=Residual(self.rtol, self.rtol),
            max_steps=self.max_steps,
            adjoint=Implicit(rtol=1e-12, max_steps=100),
            on_failure="ignore",
        )
        self._expect_dense_gradients(live, solution)

    def test_solves_the_backward_system(self, solver: Solver, problem: FixedPointProblem) -> None:
        """As the solver of u = J^T u + g on the same problems."""
        self._skip_without_a_gradient(problem)
        live = problem.differentiable()
        solution = solve(
            live.f,
            torch.as_tensor(live.z_star),
            adjoint=Implicit(FixedPoint(solver), rtol=self.rtol, max_steps=self.max_steps),
            on_failure="ignore",
        )
        self._expect_dense_gradients(live, solution)
        result = solution.backward.result
        expect(result is not None, "the backward solve reports")
        if result is not None:
            expect_equal(
                result.status.tolist(), [int(Status.SUCCESS)] * 4, "the backward solve succeeds"
            )

    def test_gradients_through_the_steps(self, solver: Solver, easy: FixedPointProblem) -> None:
        """Unrolled at a tight tolerance, the steps lead to the implicit gradient."""
        if not self.differentiable:
            pytest.skip("the solver says that its steps cannot be differentiated")
        live = easy.differentiable()
        solution = solve(
            live.f,
            live.z0,
            solver=solver,
            adjoint=Unrolled(),
            termination=Residual(max(1e-8, self.rtol), 0.0),
            max_steps=self.max_steps,
            on_failure="ignore",
        )
        self._expect_dense_gradients(live, solution, accuracy=1e-3)

    def _skip_without_a_gradient(self, problem: FixedPointProblem) -> None:
        if not self.supports(problem):
            pytest.skip(f"{problem.name} is not supported")
        if not bool(torch.isfinite(problem.conditioning).all()):
            pytest.skip(f"{problem.name} has no implicit gradient")

    def _expect_dense_gradients(
        self, live: FixedPointProblem, solution: Solution, accuracy: float | None = None
    ) -> None:
        draw = torch.Generator().manual_seed(5)
        cotangent = torch.randn(solution.z.shape, dtype=torch.float64, generator=draw)
        found = torch.autograd.grad(
            solution.z, live.sources, cotangent, retain_graph=True, materialize_grads=True
        )
        # Where there are several fixed points, at the one that was found.
        known = solution.z if "multiple" in live.tags else torch.as_tensor(live.z_star)
        wanted = implicit_gradients(live.f, known.detach(), cotangent, live.sources)
        worst = float(live.conditioning.max())
        allowed = accuracy or 1e2 * self.rtol * worst * (1.0 + worst)
        error = relative_error(found, wanted)
        expect(
            error <= allowed,
            f"the gradient of {live.name} is off by {error:.1e}, allowed are {allowed:.1e}",
        )


# By class, so that a solver that writes where it must not spoils its own tests only.
@cache
def _built_once(contract: type[SolverContract], name: str) -> FixedPointProblem:
    return build(name)


@cache
def _solved_once(contract: type[SolverContract], name: str) -> Run:
    tests, problem = contract(), _built_once(contract, name)
    f = Recorder(problem.f)
    return Run(tests.run(f, problem.z0, tests.make_solver()), f)
