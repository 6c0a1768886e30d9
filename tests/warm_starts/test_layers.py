"""Warm starts of a DEQ: modes, copies, explicit starts, names, compiled and exported code."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from equilibria import (
    DEQ,
    Cached,
    Cell,
    FixedSteps,
    Implicit,
    Picard,
    Previous,
    Random,
    SolveSettings,
    UserError,
    Zeros,
)
from equilibria.diagnostics.doctor import doctor
from equilibria.diagnostics.gradient_quality import gradient_quality
from equilibria.diagnostics.path_independence import path_independence

BOTH = {"warm_start": Cached(10), "adjoint": Implicit(warm_start=Cached(10))}


def test_training_over_epochs(make_deq, x):
    deq = make_deq(**BOTH)
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    for epoch in range(2):
        for index in batches:
            solution = deq(x[index], sample_index=index)
            solution.z.sum().backward()
            assert bool(solution.warm_started.all()) is (epoch > 0)
            assert bool((solution.backward.result.num_steps == 0).all()) is (epoch > 0)


def test_evaluation_starts_cold_unless_told_otherwise(make_deq, x):
    """And leaves the memory of training alone; the index may be given all the same."""
    deq = make_deq(**BOTH)
    deq(x, sample_index=range(4)).z.sum().backward()
    deq.eval()
    cold = make_deq().eval()
    for index in (None, range(4), ["any", "thing", "at", "all"]):
        solution = deq(x, sample_index=index)
        assert torch.equal(solution.z, cold(x).z)
        assert solution.warm_started is None
        solution.z.sum().backward()
    deq.train()
    assert deq(x.flip(0), sample_index=[3, 2, 1, 0]).num_steps.max() == 0


def test_training_and_evaluation_do_not_share_a_memory(make_deq, x):
    """Sample 0 of the validation set is not sample 0 of the training set."""
    deq = make_deq(warm_start=Cached(10), eval_warm_start=Cached(10))
    deq(x, sample_index=range(4))
    deq.eval()
    assert not deq(x, sample_index=range(4)).warm_started.any()
    assert deq(x, sample_index=range(4)).warm_started.all()
    deq.memory.clear()
    assert not deq(x, sample_index=range(4)).warm_started.any()
    assert deq.train()(x, sample_index=range(4)).warm_started.all()


def test_a_given_z0_wins_and_is_left_out(make_deq, x):
    deq = make_deq(**BOTH)
    deq(x, sample_index=range(4))
    z0 = torch.ones(4, 5, dtype=torch.float64)
    once = SolveSettings(Picard(), FixedSteps(1), warm_start=Cached(10))
    solution = deq(x, z0=z0, settings=once)
    assert solution.warm_started is None
    assert torch.equal(solution.z, deq.cell(z0, deq.cell.inject(x)))
    assert deq(x, sample_index=range(4)).num_steps.max() == 0


def test_the_cells_own_state_is_the_cold_start(make_deq, x):
    deq = make_deq(solver=Picard(), termination=FixedSteps(1), warm_start=Random(probability=0.0))
    deq.cell.initial_state = torch.ones_like
    assert torch.equal(deq(x).z, deq.cell(torch.ones(4, 5).double(), deq.cell.inject(x)))
    deq.train_settings = SolveSettings(Picard(), FixedSteps(1), warm_start=Zeros())
    assert torch.equal(deq(x).z, deq.cell(torch.zeros(4, 5).double(), deq.cell.inject(x)))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_start_cold_and_have_their_own_memory(duplicate, make_deq, x):
    deq = make_deq(warm_start=Previous())
    deq(x)
    twin = duplicate(deq)
    assert not twin(x).warm_started.any()
    assert deq(x).warm_started.all()
    twin(x[:2])
    assert deq(x).warm_started.all()


def test_the_memory_is_no_part_of_the_state_dict(make_deq, x):
    deq, plain = make_deq(**BOTH), make_deq()
    deq(x, sample_index=range(4)).z.sum().backward()
    assert set(deq.state_dict()) == set(plain.state_dict())
    deq.load_state_dict(plain.state_dict())
    assert len(pickle.dumps(deq)) < 2 * len(pickle.dumps(make_deq()))


def test_the_memory_follows_the_module(make_deq, x):
    deq = make_deq(warm_start=Previous())
    deq(x)
    deq.float()
    deq.train_settings = SolveSettings(warm_start=Previous())
    solution = deq(x.float())
    assert solution.z.dtype == torch.float32
    assert solution.warm_started.all()


def test_two_layers_of_one_configuration_do_not_mix(make_deq, x):
    warm_start = Previous()
    first, second = make_deq(warm_start=warm_start), make_deq(warm_start=warm_start)
    first(x)
    assert not second(x).warm_started.any()


def test_diagnostics_compare_cold_solves(make_deq, x):
    """And ask for no index."""
    deq = make_deq(**BOTH)
    deq(x, sample_index=range(4))
    assert doctor(deq, x, sample_index=range(4)) is not None
    assert path_independence(deq, x) is not None
    assert gradient_quality(deq, x) is not None
    assert deq(x, sample_index=range(4)).num_steps.max() == 0


class Asking(Cell):
    def inject(self, x, sample_index):
        return x + sample_index

    def initial_state(self, injection):
        return torch.zeros_like(injection)

    def forward(self, z, injection):
        return 0.5 * z + injection


def test_a_cell_that_waits_for_the_index_itself():
    with pytest.raises(UserError, match=r"Asking.inject has an input called sample_index"):
        DEQ(Asking())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warm_start": Cached}, "instance, not the class"),
        ({"eval_warm_start": "previous"}, "is no WarmStart"),
    ],
)
def test_bad_settings(arguments, message, make_deq):
    with pytest.raises(UserError, match=message):
        make_deq(**arguments)


def test_no_index(make_deq, x):
    deq = make_deq(adjoint=Implicit(warm_start=Cached(4)))
    with pytest.raises(UserError, match=r"Cached\(num_entries=4.* no sample_index was given"):
        deq(x)
    with torch.no_grad():
        deq(x)


FIXED = {
    "solver": Picard(),
    "termination": FixedSteps(3),
    "max_steps": 3,
    "on_failure": "ignore",
}


@pytest.mark.parametrize("warm_start", [None, Zeros(), Random(probability=0.0)], ids=repr)
def test_what_needs_no_memory_compiles_to_one_graph(warm_start, make_deq, x):
    deq = make_deq(warm_start=warm_start, **FIXED)
    compiled = torch.compile(lambda x: deq(x).z, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), deq(x).z)


def test_what_remembers_breaks_the_graph_and_works(make_deq, x):
    deq = make_deq(warm_start=Previous(), **FIXED)
    compiled = torch.compile(lambda x: deq(x), backend="eager")
    with torch.no_grad():
        first, second = compiled(x), compiled(x)
    assert not first.warm_started.any()
    assert second.warm_started.all()
    assert (second.residual <= first.residual).all()


class Network(nn.Module):
    def __init__(self, deq):
        super().__init__()
        self.deq = deq

    def forward(self, x):
        return self.deq(x).z


@pytest.mark.skipif(sys.platform == "win32", reason="torch.export")
@pytest.mark.filterwarnings("ignore")
def test_export_of_evaluation_and_a_clear_word_otherwise(make_deq, x):
    network = Network(make_deq(warm_start=Previous(), **FIXED)).eval()
    with torch.no_grad():
        program = torch.export.export(network, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), network(x))
        warm = Network(make_deq(eval_warm_start=Previous(), **FIXED)).eval()
        with pytest.raises(UserError, match="no warm start that remembers"):
            torch.export.export(warm, (x,), strict=False)
    assert not warm.deq.eval_memory._kept
