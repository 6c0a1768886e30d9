"""What every cell (the f of z* = f(z*, x)) promises, as tests that a class of two methods inherits.

Most of what goes wrong with equilibrium models goes wrong in the cell: randomness or statistics
inside the map, a parameter that no gradient reaches, samples that see each other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.adjoints.implicit import Implicit
from equilibria.core.adjoint import Adjoint
from equilibria.core.problem import Problem
from equilibria.core.state import Layout, State
from equilibria.deq import DEQ, Cell
from equilibria.terminations.residual import Residual
from equilibria.testing.dense import (
    full_jacobian,
    implicit_gradients,
    relative_error,
    spectral_radius,
)
from equilibria.testing.expect import expect, expect_close, expect_equal
from equilibria.testing.need_pytest import pytest

_LARGEST_DENSE = 600


class CellContract:
    """Derive a test class, write `make_cell` and `make_inputs`; keep the cell small.

        class TestMyCell(CellContract):
            def make_cell(self):
                return MyCell(width=8)

            def make_inputs(self, batch):
                return (torch.randn(batch, 3),)

    Random numbers are seeded before each of the two is called. Tests run in float32 as well as in
    float64; where B * D of two samples is above 600, the dense comparison is left out.
    """

    rtol: ClassVar[float] = 1e-3
    """Forward tolerance that a fresh cell has to reach in `max_steps` steps, in float32."""
    max_steps: ClassVar[int] = 100
    max_spectral_radius: ClassVar[float] = math.inf
    """Largest allowed at the fixed point of a fresh cell; 1 demands a contraction."""
    unused_parameters: ClassVar[frozenset[str]] = frozenset()
    """Names of parameters that may stay without a gradient."""
    samples_are_independent: ClassVar[bool] = True

    def make_cell(self) -> Cell:
        """Return a freshly initialised cell."""
        raise NotImplementedError("a class derived from CellContract writes make_cell")

    def make_inputs(self, batch: int) -> tuple[Any, ...]:
        """Return what `cell.inject` takes, float32, for `batch` samples."""
        raise NotImplementedError("a class derived from CellContract writes make_inputs")

    def select(self, tree: Any, rows: slice) -> Any:
        """Inputs or state of some of the samples; every tensor is taken to lead with the batch."""
        return pytree.tree_map_only(Tensor, lambda leaf: leaf[rows], tree)

    @pytest.fixture
    def cell(self) -> Cell:
        """A fresh cell in training mode."""
        return self._cell()

    @pytest.fixture
    def inputs(self) -> tuple[Any, ...]:
        """Inputs for three samples."""
        return self._inputs(3)

    # --- form ----------------------------------------------------------------------------------

    def test_forward_keeps_the_form_of_the_state(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Tree, shapes, dtypes and device; raises a StateError that says what differs."""
        injection = cell.inject(*inputs)
        z = cell.initial_state(injection)
        Layout.of(z).pack(cell(z, injection))

    def test_the_initial_state_is_a_state(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Floating-point tensors that lead with the batch, finite, without a graph of z."""
        z = cell.initial_state(cell.inject(*inputs))
        layout = Layout.of(z)
        expect_equal(layout.batch_size, 3, "the state leads with the batch of the inputs")
        expect(torch.isfinite(layout.pack(z)), "the initial state is finite")

    @pytest.mark.parametrize("batch", [0, 1])
    def test_small_batches(self, cell: Cell, batch: int) -> None:
        """An empty batch and a single sample."""
        injection = cell.inject(*self._inputs(batch))
        z = cell.initial_state(injection)
        expect_equal(Layout.of(z).batch_size, batch, "the batch size is kept")
        Layout.of(z).pack(cell(z, injection))

    def test_double_precision(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """After .double() everything is float64, to its last digits."""
        cell.double()
        injection = cell.inject(*_double(inputs))
        z = cell.initial_state(injection)
        for leaf in (*pytree.tree_leaves(z), *pytree.tree_leaves(cell(z, injection))):
            expect_equal(leaf.dtype, torch.float64, "a float64 cell works in float64")

    def test_autocast(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Under bfloat16 autocast it gives about the same."""
        cell.eval()
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        wanted = _packed(z, cell(z, injection))
        with torch.autocast("cpu", torch.bfloat16):
            found = _packed(z, cell(z, cell.inject(*inputs)))
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-9))
        expect(error < 0.1, f"bfloat16 changes the image by {error:.2f} of its size")

    # --- one function during a solve -----------------------------------------------------------

    @pytest.mark.parametrize("training", [True, False])
    def test_the_map_is_a_function_of_z(
        self, cell: Cell, inputs: tuple[Any, ...], training: bool
    ) -> None:
        """f(z) twice is the same to the last bit: nothing random is drawn inside the map."""
        cell.train(training)
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        first, second = _packed(z, cell(z, injection)), _packed(z, cell(z, injection))
        expect_equal(second, first, "f(z) does not change within a solve; draw masks in inject")

    def test_the_map_draws_no_random_numbers(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Masks belong to `inject`."""
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        before = torch.get_rng_state()
        cell(z, injection)
        expect_equal(torch.get_rng_state(), before, "forward leaves the random state alone")

    def test_the_map_updates_no_buffers(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """No running statistics: their number of updates would be the number of evaluations."""
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        before = copy.deepcopy(cell.state_dict())
        cell(z, injection)
        for name, tensor in cell.state_dict().items():
            expect_equal(tensor, before[name], f"forward leaves the buffer {name} alone")

    def test_the_map_writes_to_nothing_it_is_given(
        self, cell: Cell, inputs: tuple[Any, ...]
    ) -> None:
        """Neither z nor the injection, which is shared by all evaluations."""
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        given = [leaf.clone() for leaf in _tensors((z, injection, inputs))]
        with torch.no_grad():
            cell(z, injection)
        for before, after in zip(given, _tensors((z, injection, inputs)), strict=True):
            expect_equal(after, before, "z, injection and inputs are not written to")

    def test_the_injection_does_not_depend_on_z(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """An evaluation elsewhere in between changes nothing."""
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        first = _packed(z, cell(z, injection))
        cell(_map(lambda leaf: 3.0 * leaf - 1.0, z), injection)
        expect_equal(_packed(z, cell(z, injection)), first, "evaluations do not affect each other")

    def test_evaluation_mode_is_deterministic(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """From the inputs on, including `inject`."""
        cell.eval()
        z = _probe(cell.initial_state(cell.inject(*inputs)))
        first, second = (_packed(z, cell(z, cell.inject(*inputs))) for _ in range(2))
        expect_equal(second, first, "in eval mode the same inputs give the same map")

    # --- samples -------------------------------------------------------------------------------

    def test_a_sample_does_not_depend_on_its_batch(
        self, cell: Cell, inputs: tuple[Any, ...]
    ) -> None:
        """Alone it has the image that it has beside others."""
        if not self.samples_are_independent:
            pytest.skip("the cell says that its samples see each other")
        cell.double()
        cell.eval()
        inputs = _double(inputs)
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        together = _packed(z, cell(z, injection))
        for row in range(3):
            rows = slice(row, row + 1)
            part = self.select(z, rows)
            alone = _packed(part, cell(part, cell.inject(*self.select(inputs, rows))))
            expect_close(
                alone,
                together[rows],
                f"sample {row} alone has the same image",
                rtol=1e-9,
                atol=1e-9,
            )

    def test_a_change_of_one_sample_stays_there(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """In training mode too, where batch statistics would couple them; NaN included."""
        if not self.samples_are_independent:
            pytest.skip("the cell says that its samples see each other")
        injection = cell.inject(*inputs)
        z = _probe(cell.initial_state(injection))
        wanted = _packed(z, cell(z, injection))[[0, 2]]

        def changed(value: float) -> Tensor:
            def change(leaf: Tensor) -> Tensor:
                rows = (torch.arange(len(leaf)) == 1).view(-1, *(1,) * (leaf.dim() - 1))
                return torch.where(rows, value, leaf)

            other = _map(change, z)
            return _packed(other, cell(other, injection))[[0, 2]]

        expect_close(changed(2.0), wanted, "other samples are not touched", rtol=1e-5, atol=1e-6)
        expect_close(changed(torch.nan), wanted, "nor by a NaN", rtol=1e-5, atol=1e-6)

    # --- the fixed point -----------------------------------------------------------------------

    def test_the_map_stays_bounded(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Far out it is finite, so that a solver that overshoots comes back."""
        injection = cell.inject(*inputs)
        z = _map(lambda leaf: 1e3 * leaf, _probe(cell.initial_state(injection)))
        expect(torch.isfinite(_packed(z, cell(z, injection))), "f is finite at a large z")

    @pytest.mark.parametrize("training", [True, False])
    def test_a_fresh_cell_converges(
        self, cell: Cell, inputs: tuple[Any, ...], training: bool
    ) -> None:
        """To `rtol` within `max_steps` steps of the default solver."""
        solution = self._deq(cell).train(training)(*inputs)
        expect(
            solution.converged,
            f"the solve converges; relative residuals {solution.relative_residual.tolist()}",
        )

    def test_reports_its_contraction(self, inputs: tuple[Any, ...]) -> None:
        """The spectral radius at the fixed point, printed (pytest -s) and held to the limit."""
        cell, double = self._cell().double().eval(), _double(inputs)
        f, z = self._solved(cell, double)
        layout = Layout.of(z)
        if layout.pack(z).numel() > _LARGEST_DENSE:
            return
        problem = Problem(f, z)
        radius = float(spectral_radius(full_jacobian(problem.image, problem.z0).unsqueeze(0)))
        verdict = "a contraction nearby" if radius < 1 else "plain iteration would not converge"
        print(f"{type(cell).__name__}: spectral radius {radius:.3f}, {verdict}")  # noqa: T201
        expect(radius <= self.max_spectral_radius, f"the spectral radius is {radius:.3f}")

    # --- gradients -----------------------------------------------------------------------------

    def test_gradients_reach_every_parameter(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Through the solve, and they are finite."""
        loss = _loss(self._deq(cell)(*inputs).z)
        expect(loss.requires_grad, "the fixed point depends on the parameters at all")
        loss.backward()
        for name, parameter in cell.named_parameters():
            if name in self.unused_parameters or not parameter.requires_grad:
                continue
            gradient = parameter.grad
            expect(gradient is not None and bool(gradient.any()), f"{name} gets a gradient")
            expect(gradient is None or torch.isfinite(gradient), f"that of {name} is finite")

    def test_gradients_reach_the_inputs(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """Those that are floating-point."""
        live = _map(lambda leaf: leaf.detach().clone().requires_grad_(), inputs)
        _loss(self._deq(cell)(*live).z).backward()
        for leaf in _tensors(live):
            if leaf.requires_grad and leaf.numel():
                expect(leaf.grad is not None and bool(leaf.grad.any()), "inputs get a gradient")

    def test_implicit_gradients_against_the_dense_truth(self) -> None:
        """In float64, on two samples."""
        cell, inputs = self._cell().double().eval(), _double(self._inputs(2))
        parameters = [p for p in cell.parameters() if p.requires_grad]
        f, z = self._solved(cell, inputs)
        if Layout.of(z).pack(z).numel() > _LARGEST_DENSE or not parameters:
            return
        adjoint = Implicit(rtol=1e-12, max_steps=300)
        solution = self._deq(cell, rtol=1e-10, max_steps=500, adjoint=adjoint)(*inputs)
        cotangent = _probe(z)  # one of ones has gradient zero behind a layer norm
        found = torch.autograd.grad(
            list(_tensors(solution.z)),
            parameters,
            list(_tensors(cotangent)),
            materialize_grads=True,
        )
        wanted = implicit_gradients(f, z, cotangent, parameters)
        # All together: a parameter without effect has a gradient of rounding errors only.
        a, b = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, wanted))
        error = relative_error([a], [b])
        expect(error < 1e-5, f"the implicit gradient is off by {error:.1e}")

    # --- as a module ---------------------------------------------------------------------------

    def test_copies_and_state_dict(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """A deep copy and a reloaded cell compute the same."""
        cell.eval()
        z = _probe(cell.initial_state(cell.inject(*inputs)))
        wanted = _packed(z, cell(z, cell.inject(*inputs)))
        torch.manual_seed(99)
        loaded = self.make_cell().eval()
        loaded.load_state_dict(cell.state_dict())
        for twin in (copy.deepcopy(cell), loaded):
            found = _packed(z, twin(z, twin.inject(*inputs)))
            expect_close(found, wanted, "a copy computes the same", rtol=1e-6, atol=1e-6)

    def test_a_solve_leaves_the_module_as_it_was(self, cell: Cell, inputs: tuple[Any, ...]) -> None:
        """No cached tensors: attributes and buffers are the same before and after."""
        deq = self._deq(cell)
        names = {name: set(vars(module)) for name, module in cell.named_modules()}
        _loss(deq(*inputs).z).backward()
        for name, module in cell.named_modules():
            expect_equal(set(vars(module)), names[name], f"{name or 'the cell'} gains no attribute")
        copy.deepcopy(cell)  # fails where a non-leaf tensor was left behind

    # --- helpers -------------------------------------------------------------------------------

    def _cell(self) -> Cell:
        with _seeded(0):
            return self.make_cell()

    def _inputs(self, batch: int) -> tuple[Any, ...]:
        with _seeded(1):
            return self.make_inputs(batch)

    def _deq(
        self,
        cell: Cell,
        rtol: float | None = None,
        max_steps: int | None = None,
        adjoint: Adjoint = Implicit(),
    ) -> DEQ:
        return DEQ(
            cell,
            termination=Residual(rtol or self.rtol, 1e-9),
            max_steps=max_steps or self.max_steps,
            adjoint=adjoint,
            on_failure="ignore",
        )

    def _solved(
        self, cell: Cell, inputs: tuple[Any, ...]
    ) -> tuple[Callable[[State], State], State]:
        """The map of an injection with a graph, and its fixed point."""
        with torch.no_grad():
            z = self._deq(cell, rtol=1e-10, max_steps=500)(*inputs).z
        injection = cell.inject(*inputs)

        def f(state: State) -> State:
            return cell(state, injection)

        return f, z


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Run with a seeded global generator and give the old state back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _map(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply to the floating-point tensors of a tree."""

    def on_leaf(leaf: Any) -> Any:
        return change(leaf) if _is_floating(leaf) else leaf

    return pytree.tree_map(on_leaf, tree)


def _probe(z: State) -> State:
    """A state of the form of `z` without symmetry: zeros would hide too much."""
    draw = torch.Generator().manual_seed(2)
    return _map(
        lambda leaf: 0.5 * torch.randn(leaf.shape, generator=draw, dtype=torch.float64).to(leaf), z
    )


def _packed(like: State, image: State) -> Tensor:
    return Layout.of(like).pack(image).detach()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _double(tree: Any) -> Any:
    return _map(lambda leaf: leaf.double(), tree)


def _loss(z: State) -> Tensor:
    """Weights without symmetry: a plain sum has gradient zero behind a layer norm."""
    pairs = zip(_tensors(z), _tensors(_probe(z)), strict=True)
    return torch.stack([(leaf * weights).sum() for leaf, weights in pairs]).sum()
