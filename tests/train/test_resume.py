"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import math
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria import UserError
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.train.loop import Trainer

TrainerFactory = Callable[..., Trainer]
CLOCKS = {"forward_seconds", "backward_seconds", "seconds", "tokens_per_second"}


def _metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """All records without what depends on the speed of the machine."""
    return [
        {name: value for name, value in record.items() if name not in CLOCKS}
        for record in trainer.run.metrics()
    ]


def _assert_same(resumed: Trainer, straight: Trainer) -> None:
    expected = straight.task.model.state_dict()
    for name, tensor in resumed.task.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert _metrics(resumed) == _metrics(straight)
    assert resumed.statistics.as_dict() == straight.statistics.as_dict()
    assert resumed.run.checkpoints.latest() == straight.run.checkpoints.latest()
    assert resumed.run.checkpoints.best() == straight.run.checkpoints.best()
    assert resumed.run.checkpoints.best_loss() == straight.run.checkpoints.best_loss()


def _stop_before(trainer: Trainer, stops: set[int], how: Callable[[], None]) -> None:
    training_losses = trainer.task.training_losses

    def interrupted(step: int, num_chunks: int = 1) -> Any:
        if step in stops:
            how()
        return training_losses(step, num_chunks)

    trainer.task.training_losses = interrupted  # pyright: ignore[reportAttributeAccessIssue]


def _request() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class _PowerCutError(BaseException):
    pass


def _power_cut() -> None:
    raise _PowerCutError


@pytest.fixture
def straight(make_trainer: TrainerFactory) -> Trainer:
    """The uninterrupted run. Pre-training ends at step 4, epochs at 5 and 10, metrics at 5."""
    trainer = make_trainer()
    assert trainer.fit() == 0
    return trainer


@pytest.mark.parametrize("stop", [0, 3, 4, 8])
def test_stopped_by_request_at_any_step(
    make_trainer: TrainerFactory, straight: Trainer, stop: int
) -> None:
    stopped = make_trainer()
    _stop_before(stopped, {stop}, _request)
    assert stopped.fit() == 130
    resumed = make_trainer(run=stopped.run)
    torch.manual_seed(77)  # the state of a fresh process is not the state of the run
    resumed.resume()
    assert resumed.step == stop + 1
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_stopped_at_every_step(make_trainer: TrainerFactory, straight: Trainer) -> None:
    trainer = make_trainer()
    for stop in range(11):
        _stop_before(trainer, {stop}, _request)
        assert trainer.fit() == 130
        trainer = make_trainer(run=trainer.run)
        trainer.resume()
    assert trainer.fit() == 0
    _assert_same(trainer, straight)


@pytest.mark.parametrize("stop", [7, 11])
def test_a_power_cut_costs_only_what_came_after_the_last_checkpoint(
    make_trainer: TrainerFactory, straight: Trainer, stop: int
) -> None:
    """No handler runs; records after the checkpoint are written again, not twice."""
    stopped = make_trainer()
    _stop_before(stopped, {stop}, _power_cut)
    with pytest.raises(_PowerCutError):
        stopped.fit()
    resumed = make_trainer(run=stopped.run)
    resumed.resume()
    assert resumed.step <= stop
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_resuming_from_an_earlier_checkpoint(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    """The advice for a damaged one: delete it. The best mark went with it, and comes again."""
    trainer = make_trainer({"train": {"keep_checkpoints": 99}})
    trainer.fit()
    steps = trainer.run.checkpoints.steps()
    for step in steps[2:]:
        shutil.rmtree(trainer.run.checkpoints.path(step))
    resumed = make_trainer(run=trainer.run)
    resumed.resume()
    assert resumed.step == steps[1] < 12
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "sgd"}},
        {"optimizer": {"name": "radam"}},
        {"optimizer": {"name": "adamw", "weight_decay": 0.1, "schedule": "inverse-sqrt"}},
        {"task": {"memory_length": 0, "pretrain_steps": 0}},
        {"task": {"memory_length": 40, "pretrain_steps": 7}},
        {"model": {"solve": {"adjoint": "phantom", "solver": "broyden"}}},
        {"model": {"norm": "pre", "weight_norm": False}},
    ],
    ids=["sgd", "radam", "adamw", "no memory", "long memory", "phantom", "pre-norm"],
)
def test_whatever_the_configuration(make_trainer: TrainerFactory, changes: dict[str, Any]) -> None:
    straight = make_trainer(changes)
    assert straight.fit() == 0
    stopped = make_trainer(changes)
    _stop_before(stopped, {6}, _request)
    assert stopped.fit() == 130
    resumed = make_trainer(changes, run=stopped.run)
    resumed.resume()
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_a_finished_run_has_nothing_left_to_do(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    resumed = make_trainer(run=straight.run)
    before = straight.run.metrics_file.read_bytes()
    resumed.resume()
    assert resumed.fit() == 0
    assert resumed.step == 12
    assert straight.run.metrics_file.read_bytes() == before
    _assert_same(resumed, straight)


def test_a_run_without_checkpoint_cannot_go_on(make_trainer: TrainerFactory) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; .*start it again"):
        make_trainer().resume()


def _foreign(trainer: Trainer, state: dict[str, Any]) -> Path:
    file = trainer.run.checkpoints.path(trainer.run.checkpoints.latest()) / "training.pt"
    torch.save(state, file)
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: {**state, "optimizer": {}},
        lambda state: {**state, "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}},
        lambda state: {**state, "clock": {"ticks": 1}},
        lambda state: {**state, "random": {"cpu": torch.zeros(3), "cuda": []}},
        lambda state: {**state, "task": {**state["task"], "memory": [torch.zeros(1, 1, 1)]}},
        lambda state: {**state, "task": {"memory": None}},
    ],
    ids=["empty", "no optimiser", "another optimiser", "clock", "random", "memory", "place"],
)
def test_a_foreign_training_state_is_a_sentence(
    make_trainer: TrainerFactory,
    straight: Trainer,
    damage: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    _foreign(straight, damage(straight.run.checkpoints.load_training(12)))
    before = straight.run.metrics_file.read_bytes()
    with pytest.raises(UserError) as error:
        make_trainer(run=straight.run).resume()
    assert "\n" not in str(error.value)
    assert straight.run.metrics_file.read_bytes() == before


def test_weights_of_another_configuration_are_refused(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    with pytest.raises(UserError, match="of shape"):
        make_trainer({"model": {"d_inner": 16}}, run=straight.run).resume()


# --- Values of a training state that are not what they were --------------------------------------


def _first_entry(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The state with other values for parameter 0; None takes one away."""
    entry = {**state["optimizer"]["state"][0], **changes}
    entry = {name: value for name, value in entry.items() if value is not None}
    entries = {**state["optimizer"]["state"], 0: entry}
    return {**state, "optimizer": {**state["optimizer"], "state": entries}}


def _at(state: Any, path: str, value: Any) -> Any:
    """The state with another value at a place such as interval.losses.0."""
    name, _, rest = path.partition(".")
    if isinstance(state, list):
        changed = list(state)
        changed[int(name)] = _at(state[int(name)], rest, value) if rest else value
        return changed
    return {**state, name: _at(state[name], rest, value) if rest else value}


def _view(*shape: int) -> torch.Tensor:
    """One number that says it were many."""
    return torch.zeros(1).expand(*shape)


@pytest.fixture
def half(make_trainer: TrainerFactory) -> Trainer:
    """Stopped after step 9, four steps after the last line of metrics."""
    stopped = make_trainer()
    _stop_before(stopped, {8}, _request)
    assert stopped.fit() == 130
    return stopped


def _resumed(make_trainer: TrainerFactory, run: Any, state: dict[str, Any]) -> Trainer:
    torch.save(state, run.checkpoints.path(9) / "training.pt")
    resumed = make_trainer(run=run)
    resumed.resume()
    return resumed


SHAPE = (8, 12)  # of no parameter
DAMAGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another shape": lambda s: _first_entry(s, exp_avg=torch.zeros(SHAPE)),
    "a view of no size": lambda s: _first_entry(s, exp_avg=_view(10**6, 10**7)),
    "doubles": lambda s: _first_entry(
        s, exp_avg=s["optimizer"]["state"][0]["exp_avg"].double()
    ),
    "complex": lambda s: _first_entry(
        s, exp_avg=torch.complex(*(2 * [s["optimizer"]["state"][0]["exp_avg"]]))
    ),
    "sparse": lambda s: _first_entry(
        s, exp_avg=s["optimizer"]["state"][0]["exp_avg"].to_sparse()
    ),
    "on no device": lambda s: _first_entry(
        s, exp_avg=s["optimizer"]["state"][0]["exp_avg"].to("meta")
    ),
    "no tensor": lambda s: _first_entry(s, exp_avg="x"),
    "one name less": lambda s: _first_entry(s, exp_avg_sq=None),
    "one name more": lambda s: _first_entry(s, max_exp_avg_sq=torch.zeros(2)),
    "steps before the first": lambda s: _first_entry(s, step=torch.tensor(-1.0)),
    "steps to come": lambda s: _first_entry(s, step=torch.tensor(1e9)),
    "steps of NaN": lambda s: _first_entry(s, step=torch.tensor(math.nan)),
    "many steps": lambda s: _first_entry(s, step=torch.ones(2)),
    "a parameter less": lambda s: _at(
        s, "optimizer.state", {n: e for n, e in s["optimizer"]["state"].items() if n}
    ),
    "no parameter": lambda s: _at(s, "optimizer.state", {}),
    "a parameter more": lambda s: _at(
        s, "optimizer.state", {**s["optimizer"]["state"], 999: {}}
    ),
    "parameters of other groups": lambda s: _at(s, "optimizer.param_groups.0.params", [0]),
    "no groups": lambda s: _at(s, "optimizer.param_groups", []),
    "seconds of letters": lambda s: _at(s, "clock.forward", "a"),
    "no seconds": lambda s: _at(s, "clock", None),
    "seconds of NaN": lambda s: _at(s, "clock.total", math.nan),
    "losses of a shape": lambda s: _at(s, "interval.losses", [torch.zeros(2), torch.zeros(3)]),
    "losses that are none": lambda s: _at(s, "interval.losses", [1.0]),
    "no losses": lambda s: _at(s, "interval.losses", None),
    "many items": lambda s: _at(s, "interval.num_items", 10**400),
    "samples without": lambda s: _at(s, "interval.residuals", []),
    "samples of no size": lambda s: _at(s, "interval.num_evals.0", _view(10**9)),
    "figures without a list": lambda s: _at(s, "interval.figures", {"x": torch.zeros(1)}),
    "an unknown sum": lambda s: _at(s, "interval.ticks", []),
    "statistics of no size": lambda s: _at(s, "statistics.num_evals.0", _view(10**12)),
    "statistics of a large size": lambda s: {
        **s, "statistics": {"num_evals": [torch.zeros(10**5)], "residuals": [torch.zeros(10**5)]}
    },
    "statistics of letters": lambda s: _at(s, "statistics.residuals", ["a"]),
    "a factor of letters": lambda s: _at(s, "plateau.factor", "x"),
    "a factor that is no share": lambda s: _at(s, "plateau.factor", 1e9),
    "a factor where there is none": lambda s: _at(s, "plateau.factor", 0.5),
    "waited for ages": lambda s: _at(s, "plateau.waited", -1),
    "memory of another batch": lambda s: _at(
        s, "task.memory", [t[:2] for t in s["task"]["memory"]]
    ),
    "memory of other lengths": lambda s: _at(
        s, "task.memory.0", s["task"]["memory"][0][:, :3]
    ),
    "memory of no size": lambda s: _at(
        s, "task.memory", [_view(4, 10**9, t.shape[2]) for t in s["task"]["memory"]]
    ),
    "memory of doubles": lambda s: _at(
        s, "task.memory", [t.double() for t in s["task"]["memory"]]
    ),
    "random of letters": lambda s: _at(s, "random.0.cpu", "a"),
    "nothing random": lambda s: _at(s, "random", []),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_value_that_is_not_what_it_was_is_a_sentence(
    make_trainer: TrainerFactory, half: Trainer, damage: str
) -> None:
    state = half.run.checkpoints.load_training(9)
    with pytest.raises(UserError, match="delete that folder|another one") as error:
        _resumed(make_trainer, half.run, DAMAGES[damage](state))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("option", "value"), [("eps", None), ("betas", "x"), ("maximize", True), ("foreach", 7)]
)
def test_the_options_of_the_optimiser_are_those_of_the_configuration(
    make_trainer: TrainerFactory, half: Trainer, straight: Trainer, option: str, value: Any
) -> None:
    """Whatever a file says: it would train uphill, or end in the next step."""
    state = half.run.checkpoints.load_training(9)
    (group,) = state["optimizer"]["param_groups"]
    group[option] = value
    if value is None:
        del group[option]
    resumed = _resumed(make_trainer, half.run, state)
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_a_view_of_the_right_shape_becomes_numbers_of_its_own(
    make_trainer: TrainerFactory, half: Trainer
) -> None:
    """It could not be written to."""
    state = half.run.checkpoints.load_training(9)
    shape = state["optimizer"]["state"][0]["exp_avg"].shape
    resumed = _resumed(make_trainer, half.run, _first_entry(state, exp_avg=_view(*shape)))
    assert resumed.fit() == 0


def test_a_run_whose_steps_were_all_skipped_goes_on(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimiser has no state yet, and its parameters are as they were drawn."""
    stopped = make_trainer()
    with monkeypatch.context() as patch:
        patch.setattr(stopped.engine, "largest", lambda wishes: wishes.index_fill(0, _FIRST, 1.0))
        _stop_before(stopped, {2}, _request)
        assert stopped.fit() == 130
    state = stopped.run.checkpoints.load_training(3)
    assert state["optimizer"]["state"] == {}
    resumed = make_trainer(run=stopped.run)
    resumed.resume()
    assert resumed.fit() == 0


_FIRST = torch.tensor([0])


def test_a_parameter_without_part_in_the_loss_has_no_state(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, build = DEQTransformerConfig, DEQTransformerConfig.build

    def with_idle(self: Any, size: int) -> Any:
        model = build(self, size)
        model.idle = torch.nn.Parameter(torch.ones(3))
        return model

    monkeypatch.setattr(kind, "build", with_idle)
    stopped = make_trainer()
    _stop_before(stopped, {8}, _request)
    assert stopped.fit() == 130
    resumed = make_trainer(run=stopped.run)
    resumed.resume()
    assert resumed.fit() == 0


def test_an_archive_that_unpacks_to_more_is_not_unpacked(
    make_trainer: TrainerFactory, half: Trainer
) -> None:
    file = half.run.checkpoints.path(9) / "training.pt"
    state = {**half.run.checkpoints.load_training(9), "more": torch.zeros(10**7)}
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert file.stat().st_size < 10**6
    with pytest.raises(UserError, match="parts of it are compressed.*; delete the folder"):
        make_trainer(run=half.run).resume()


def test_a_state_of_the_former_format_of_torch_is_refused(
    make_trainer: TrainerFactory, half: Trainer
) -> None:
    """Which says sizes before it has the numbers; nobody's run has one."""
    file = half.run.checkpoints.path(9) / "training.pt"
    state = half.run.checkpoints.load_training(9)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="damaged .*delete the folder"):
        make_trainer(run=half.run).resume()
