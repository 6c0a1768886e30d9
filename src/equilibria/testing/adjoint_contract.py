"""What every gradient method promises, as tests that a class of one method inherits."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from equilibria.api import solve
from equilibria.core.adjoint import Adjoint, SecondDerivativeError
from equilibria.core.solution import Solution
from equilibria.core.solver import Solver
from equilibria.solvers.anderson import Anderson
from equilibria.terminations.residual import Residual
from equilibria.testing.dense import implicit_gradients, relative_error
from equilibria.testing.expect import expect, expect_close, expect_equal
from equilibria.testing.need_pytest import pytest
from equilibria.testing.probes import Recorder, Spoiled
from equilibria.testing.problems import PROBLEMS, FixedPointProblem
from equilibria.testing.problems import problem as build
from equilibria.testing.states import STATES, StateProblem


class AdjointContract:
    """Derive a test class, write `make_adjoint`; `make_solver` if it needs a forward of its own.

    A method that calls itself `exact` is compared with the dense gradient, any other has to
    give a direction of descent: its cosine to the exact gradient is at least `min_cosine`.
    """

    rtol: ClassVar[float] = 1e-10
    """Forward tolerance in float64."""
    max_steps: ClassVar[int] = 400
    accuracy: ClassVar[float] = 1e-6
    """Relative error allowed to an exact method."""
    min_cosine: ClassVar[float] = 0.5
    min_cosine_in_lower_precision: ClassVar[float] = 0.98
    """Of the gradient in float32 and bfloat16 to that in float64."""

    def make_adjoint(self) -> Adjoint:
        """Return the gradient method to test, tight enough for `accuracy` if it is exact."""
        raise NotImplementedError("a class derived from AdjointContract writes make_adjoint")

    def make_solver(self) -> Solver:
        """Return the forward solver it is used with."""
        return Anderson()

    def supports(self, problem: FixedPointProblem) -> bool:
        """Whether it has to work on this problem; contractions unless told otherwise."""
        return "contraction" in problem.tags and not problem.tags & {"multiple", "non_normal"}

    @pytest.fixture
    def adjoint(self) -> Adjoint:
        """The method under test."""
        return self.make_adjoint()

    @pytest.fixture(params=list(PROBLEMS))
    def problem(self, request: pytest.FixtureRequest) -> FixedPointProblem:
        """Every problem in turn, with sources that require gradients."""
        return _built_once(type(self), request.param).differentiable()

    @pytest.fixture
    def easy(self) -> FixedPointProblem:
        """One nonlinear contraction with an input per sample and a shared weight."""
        return _built_once(type(self), "tanh").differentiable()

    def run(self, f: Callable[[Any], Any], z0: Any, adjoint: Adjoint, **overrides: Any) -> Solution:
        """`solve` at the contract's tolerance."""
        settings: dict[str, Any] = {
            "solver": self.make_solver(),
            "termination": Residual(self.rtol, self.rtol),
            "max_steps": self.max_steps,
            "on_failure": "ignore",
        }
        return solve(f, z0, adjoint=adjoint, **(settings | overrides))

    def gradients(
        self, problem: FixedPointProblem, adjoint: Adjoint, **overrides: Any
    ) -> tuple[Tensor, ...]:
        """Of a fixed random loss for all sources."""
        solution = self.run(problem.f, problem.z0, adjoint, **overrides)
        return torch.autograd.grad(
            solution.z, problem.sources, _cotangent(solution.z), materialize_grads=True
        )

    # --- right ---------------------------------------------------------------------------------

    def test_gradients_against_the_dense_truth(
        self, adjoint: Adjoint, problem: FixedPointProblem
    ) -> None:
        """Equal for an exact method, in a direction of descent for any other."""
        if not self.supports(problem):
            pytest.skip(f"{problem.name} is not supported")
        star = torch.as_tensor(problem.z_star)
        found = self.gradients(problem, adjoint)
        wanted = implicit_gradients(problem.f, star, _cotangent(star), problem.sources)
        if adjoint.exact:
            error = relative_error(found, wanted)
            expect(error <= self.accuracy, f"the gradient of {problem.name} is off by {error:.1e}")
        cosine = _cosine(found, wanted)
        expect(
            cosine >= self.min_cosine,
            f"the gradient of {problem.name} has cosine {cosine:.3f} to the exact one",
        )

    def test_it_is_linear_in_the_cotangent(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """Two losses at once have the sum of their gradients."""
        solution = self.run(easy.f, easy.z0, adjoint)
        one, two = _cotangent(solution.z, 1), _cotangent(solution.z, 2)

        def gradient(cotangent: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(solution.z, easy.sources, cotangent, retain_graph=True)

        together = gradient(one + 3.0 * two)
        apart = [a + 3.0 * b for a, b in zip(gradient(one), gradient(two), strict=True)]
        error = relative_error(together, apart)
        expect(error < 1e-5, f"g -> gradient is linear; the difference is {error:.1e}")

    @pytest.mark.parametrize("exponent", [-20, -700, 700])
    def test_the_scale_of_the_loss_changes_nothing(
        self, adjoint: Adjoint, easy: FixedPointProblem, exponent: int
    ) -> None:
        """Loss scaling and mean reduction leave the direction alone, to the last bit."""
        solution = self.run(easy.f, easy.z0, adjoint)
        g, scale = _cotangent(solution.z), 2.0**exponent
        plain = torch.autograd.grad(solution.z, easy.sources, g, retain_graph=True)
        scaled = torch.autograd.grad(solution.z, easy.sources, scale * g, retain_graph=True)
        for a, b in zip(plain, scaled, strict=True):
            expect_equal(b, scale * a, "gradients scale with the loss")

    def test_the_value_is_the_solvers(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """With and without gradients the same z, status and residual, to the last bit.

        Steps that are recorded are never the compiled ones, so up to rounding for these.
        """
        with torch.no_grad():
            wanted = self.run(easy.f, easy.z0, adjoint)
        found = self.run(easy.f, easy.z0, adjoint)
        for name in ("status", "num_steps"):
            expect_equal(getattr(found, name), getattr(wanted, name), f"{name} is not changed")
        if adjoint.through_steps:
            expect_close(found.z, wanted.z, "z is not changed", rtol=1e-9, atol=1e-12)
            return
        for name in ("z", "residual"):
            expect_equal(getattr(found, name), getattr(wanted, name), f"{name} is not changed")

    def test_counts_every_call_of_the_forward_pass(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """The recorded evaluations included."""
        f = Recorder(easy.f)
        solution = self.run(f, easy.z0, adjoint)
        expect_equal(solution.num_evals, f.num_calls, "num_evals is the number of calls of f")

    def test_second_derivatives_are_right_or_refused(self, adjoint: Adjoint) -> None:
        """Against a difference quotient of the method's own gradient; never silently wrong."""
        easy = build("tanh", batch=2)
        x, weight = easy.sources

        def gradient(x: Tensor, create_graph: bool) -> Tensor:
            solution = self.run(lambda z: easy.map(z, x, weight), easy.z0, adjoint)
            loss = solution.z.square().sum() + solution.z.sum()
            return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

        direction = _cotangent(x)
        live = x.clone().requires_grad_()
        try:
            first = gradient(live, create_graph=True)
            found = torch.autograd.grad(first, live, direction)[0]
        except SecondDerivativeError:
            return
        step = 1e-4
        ahead, behind = (
            gradient((x + sign * step * direction).requires_grad_(), create_graph=False)
            for sign in (1.0, -1.0)
        )
        wanted = (ahead - behind) / (2.0 * step)
        if not adjoint.exact:
            raise AssertionError(
                "contract broken: a method that is not exact refuses second derivatives"
            )
        # The Hessian is symmetric, so its product with a vector is a difference of gradients.
        expect_close(found, wanted, "second derivatives are right", rtol=1e-3, atol=1e-4)

    # --- reach ---------------------------------------------------------------------------------

    def test_finds_every_tensor_that_f_depends_on(self, adjoint: Adjoint) -> None:
        """A module's parameters, a closure, a tensor computed from a leaf; no list is given."""
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 6, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.weight, 2))
        leaf = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        computed = gain.exp()
        solution = self.run(
            lambda z: torch.tanh(layer(z) + computed * leaf), torch.zeros_like(leaf), adjoint
        )
        solution.z.sum().backward()
        for name, tensor in [*layer.named_parameters(), ("closure", leaf), ("ancestor", gain)]:
            expect(tensor.grad is not None and bool(tensor.grad.any()), f"{name} gets a gradient")

    @pytest.mark.parametrize("kind", STATES)
    def test_every_kind_of_state(self, adjoint: Adjoint, kind: str) -> None:
        """The form of the state does not change the gradient, and an exact one is exact."""
        given = StateProblem(kind)
        tolerance = max(self.rtol, 2 * given.precision)
        loose = {"termination": Residual(tolerance, tolerance), **given.settings}
        z = given.join(self.run(given, given.z0, adjoint, **loose).z)
        if kind == "empty" and not z.requires_grad:
            pytest.skip("no step was made, so a method that records steps has no graph")
        g, rows = _cotangent(z), torch.zeros_like(z)
        found = torch.autograd.grad(z, given.sources, g, materialize_grads=True)
        plain = self.run(given.packed, rows, adjoint, **loose).z
        wanted = torch.autograd.grad(plain, given.sources, g, materialize_grads=True)
        error = relative_error(found, wanted)
        expect(error <= 1e-6 + 40 * given.precision, f"{kind} changes the gradient by {error:.1e}")
        if adjoint.exact:
            tight = self.run(given.packed, rows, adjoint, **given.settings).z
            found = torch.autograd.grad(tight, given.sources, g, materialize_grads=True)
            error = relative_error(found, given.gradients(g))
            expect(error <= self.accuracy, f"the gradient of {kind} is off by {error:.1e}")

    def test_a_part_of_a_tree_may_be_left_out_of_the_loss(self, adjoint: Adjoint) -> None:
        """It counts as a cotangent of zero."""
        given = StateProblem("nested")
        z = self.run(given, given.z0, adjoint).z
        g = _cotangent(z["b"][0])
        found = torch.autograd.grad(z["b"][0], given.sources, g)
        whole = torch.cat([g.unsqueeze(1), g.new_zeros(len(g), 11)], dim=1)
        plain = self.run(given.packed, torch.zeros_like(whole), adjoint).z
        for a, b in zip(found, torch.autograd.grad(plain, given.sources, whole), strict=True):
            expect_close(a, b, "the rest counts as zero", rtol=1e-6, atol=1e-9)

    def test_samples_keep_to_themselves(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """The loss of one sample has no gradient for the input of another, and a batch is a sum."""
        x, weight = easy.sources
        solution = self.run(easy.f, easy.z0, adjoint)
        gradient = torch.autograd.grad(solution.z[1].sum(), x)[0]
        expect(not bool(gradient[[0, 2, 3]].any()), "other samples get exactly zero")
        lone = x[1:2].detach().requires_grad_()
        alone = self.run(lambda z: easy.map(z, lone, weight), easy.z0[1:2], adjoint)
        wanted = torch.autograd.grad(alone.z.sum(), lone)[0]
        expect_close(gradient[1:2], wanted, "a sample alone has the same", rtol=1e-5, atol=1e-9)

    def test_a_nan_sample_leaves_the_others_alone(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """Their inputs get the gradient that they would get without it."""
        x, _ = easy.sources
        wanted = torch.autograd.grad(self.run(easy.f, easy.z0, adjoint).z.sum(), x)[0]
        solution = self.run(Spoiled(easy.f, row=2), easy.z0, adjoint)
        found = torch.autograd.grad(solution.z.sum(), x)[0]
        others = [0, 1, 3]
        expect_close(found[others], wanted[others], "other samples keep it", rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, adjoint: Adjoint, dtype: torch.dtype) -> None:
        """Gradients have the dtype of their tensors and point the same way."""
        exact = build("tanh").differentiable()
        rounded = build("tanh", dtype=dtype).differentiable()
        rtol = 1e-5 if dtype == torch.float32 else 2e-2
        found = self.gradients(rounded, adjoint, termination=Residual(rtol, 1e-6))
        expect_equal([g.dtype for g in found], [dtype] * len(found), "the dtype is kept")
        wanted = self.gradients(exact, adjoint)
        cosine = _cosine(found, wanted)
        expect(
            cosine > self.min_cosine_in_lower_precision,
            f"{dtype} points the way float64 does; the cosine is {cosine:.3f}",
        )

    # --- as a part of a graph ------------------------------------------------------------------

    def test_used_twice_in_one_graph(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """A fixed point as the input of another solve: the chain rule holds."""
        x, weight = easy.sources

        def layer(x: Tensor) -> Tensor:
            return self.run(lambda z: easy.map(z, x, weight), easy.z0, adjoint).z

        middle = layer(x)
        found = torch.autograd.grad(layer(middle).sum(), x)[0]
        cut = middle.detach().requires_grad_()
        outer = torch.autograd.grad(layer(cut).sum(), cut)[0]
        wanted = torch.autograd.grad(layer(x), x, outer)[0]
        expect_close(found, wanted, "gradients chain", rtol=1e-9, atol=1e-12)

    def test_backward_twice_over_a_retained_graph(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """The same gradient again."""
        loss = self.run(easy.f, easy.z0, adjoint).z.square().sum()
        once = torch.autograd.grad(loss, easy.sources, retain_graph=True)
        again = torch.autograd.grad(loss, easy.sources)
        for a, b in zip(once, again, strict=True):
            expect_equal(b, a, "a second backward pass gives the same")

    def test_the_same_call_gives_the_same_bits(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """Nothing is remembered between calls, nothing drawn from the global generator."""
        before = torch.get_rng_state()
        first, second = (self.gradients(easy, adjoint) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            expect_equal(b, a, "gradients are reproducible")
        expect_equal(torch.get_rng_state(), before, "the random state is untouched")

    def test_no_graph_without_grad_mode(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """Without grad mode there is none."""
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                solution = self.run(easy.f, easy.z0, adjoint)
            expect(not solution.z.requires_grad, f"no graph under {mode.__name__}")

    def test_a_discarded_graph_is_freed_at_once(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """Without the garbage collector: no reference cycles through hooks or modules."""
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            f = Recorder(easy.f)
            alive = weakref.ref(f)
            solution = self.run(f, easy.z0, adjoint)
            solution.z.sum().backward()
            del f, solution
            expect(alive() is None, "the map is freed with the last reference to the solution")
        finally:
            if was_enabled:
                gc.enable()

    def test_the_output_may_be_written_to(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """In place, after the solve, without changing the gradient."""
        wanted = torch.autograd.grad(self.run(easy.f, easy.z0, adjoint).z.sum(), easy.sources)
        z = self.run(easy.f, easy.z0, adjoint).z
        z.mul_(2.0)
        found = torch.autograd.grad(z.sum(), easy.sources)
        for a, b in zip(found, wanted, strict=True):
            expect_close(a, 2.0 * b, "the gradient is that of twice z", rtol=1e-9, atol=1e-12)

    def test_the_output_is_never_z0_itself(self, adjoint: Adjoint) -> None:
        """Also when z0 is the solution and no step is made."""
        exact = build("half_precision").differentiable()
        z0 = torch.as_tensor(exact.z_star).clone()
        z = self.run(exact.f, z0, adjoint).z
        z.detach().add_(1.0)
        expect_equal(z0, torch.as_tensor(exact.z_star), "writing to z leaves z0 alone")

    def test_nothing_is_written_to_grad_uninvited(
        self, adjoint: Adjoint, easy: FixedPointProblem
    ) -> None:
        """autograd.grad leaves .grad alone."""
        self.gradients(easy, adjoint)
        expect(all(source.grad is None for source in easy.sources), ".grad stays None")

    def test_the_method_is_a_frozen_value(self, adjoint: Adjoint, easy: FixedPointProblem) -> None:
        """Compared, copied and pickled; using it changes nothing."""
        before = pickle.dumps(adjoint)
        wanted = self.gradients(easy, adjoint)
        expect_equal(pickle.dumps(adjoint), before, "using the method leaves it as it was")
        for twin in (copy.deepcopy(adjoint), pickle.loads(before), self.make_adjoint()):
            expect_equal(twin, adjoint, "copies compare equal")
            for a, b in zip(self.gradients(easy, twin), wanted, strict=True):
                expect_equal(a, b, "copies give the same gradient")


@cache
def _built_once(contract: type[AdjointContract], name: str) -> FixedPointProblem:
    return build(name)


def _cotangent(like: Tensor, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, dtype=torch.float64, generator=draw).to(like.dtype)


def _cosine(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (found, wanted))
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 1.0
