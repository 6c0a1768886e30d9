"""What a checkpoint says about a training, looked at before the training believes it.

Reading `training.pt` runs no code, and yet its values may be anything: of another type or shape,
or a view of three numbers that says it were a billion. Whatever does not fit is a ValueError here,
which becomes a sentence where a run is resumed, and would be a traceback in the middle of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, cast
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, nn

from equilibria.train.files import open_regular
from equilibria.train.optimizers import OptimizerConfig, Plateau
from equilibria.train.statistics import Clock

Numbers = TypeVar("Numbers")

_REAL = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
_LARGEST_COUNT = 2**53
"""Beyond it a float cannot tell numbers apart."""
_SAMPLES_PER_ROW = 1024
"""Solves of one step, for each row of the batch; every one has its place in the statistics."""
_PAIRS = (("num_evals", "residuals"), ("backward_num_evals", "backward_residuals"))


def check_archive(file: Path) -> None:
    """Refuse a file that would unpack to more than it is; `torch.save` compresses nothing.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such archive.
    """
    with open_regular(file) as handle, ZipFile(handle) as archive:
        members = archive.infolist()
        size = handle.seek(0, 2)
    if any(member.compress_type != ZIP_STORED for member in members):
        raise ValueError("parts of it are compressed, as torch.save leaves none")
    if sum(member.file_size for member in members) > size:
        raise ValueError("it is smaller than its parts")


def fitting_optimizer_state(
    saved: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    step: int,
    untouched: Set[int],
) -> dict[str, Any]:
    """A state that the optimiser can load, with the options that the configuration gives it.

    Args:
        saved: as `cut_optimizer_state` returned it.
        optimizer: as it was made.
        config: that it was made of.
        step: of the checkpoint.
        untouched: parameters by number that no step has changed, which may have no state.

    Raises:
        ValueError: the state of a parameter is missing, or is of another optimiser or parameter.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = [group["params"] for group in saved["param_groups"]]
    if groups != [group["params"] for group in own]:
        raise ValueError("the optimiser has other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(parameters):
        expected = _entry_of(config, parameter.dtype)
        entry = {n: v for n, v in saved["state"].get(number, {}).items() if v is not None}
        if not entry and number in untouched:
            continue
        if entry.keys() != expected.keys():
            raise ValueError(
                f"the optimiser has {_names(entry)} of parameter {number}, expected "
                f"{_names(expected)}"
            )
        for name, value in entry.items():
            like = None if expected[name].dim() == 0 else parameter
            entry[name] = _fitting(value, f"{name} of parameter {number}", like, step)
        entries[number] = entry
    if foreign := saved["state"].keys() - set(range(len(parameters))):
        raise ValueError(f"the optimiser knows no parameter {str(min(foreign, key=str))[:60]}")
    return {"state": entries, "param_groups": own}


def restored(kind: type[Numbers], saved: Any) -> Numbers:
    """A dataclass of numbers of its saved values.

    Raises:
        ValueError: other names, or a value that is no number of its type, or negative.
    """
    default, name = vars(kind()), kind.__name__.lower()
    if not isinstance(saved, Mapping) or not saved.keys() <= default.keys():
        raise ValueError(f"{name} holds other things than {_names(default)}")
    for key, value in cast(Mapping[str, Any], saved).items():
        _check_number(value, default[key], f"{name}.{key}")
    return kind(**saved)


def restored_plateau(saved: Any, config: OptimizerConfig) -> Plateau:
    """How far the learning rate has been lowered.

    Raises:
        ValueError: not a plateau, or one where the schedule knows none.
    """
    plateau = restored(Plateau, saved)
    if not 0 <= plateau.factor <= 1:  # 0 where it was lowered for ever
        raise ValueError(f"plateau.factor is {plateau.factor}, expected 0 to 1")
    if config.schedule != "plateau" and plateau != Plateau():
        raise ValueError(f"the schedule {config.schedule!r} waits for no plateau")
    return plateau


def check_interval(saved: dict[str, Any]) -> None:
    """What `Interval.from_state_dict` takes.

    Raises:
        ValueError: sums of other types or shapes.
    """
    restored(Clock, saved["clock"])
    for name in ("num_items", "num_skipped"):
        _check_number(saved.get(name, 0), 0, f"interval.{name}")
    for name in ("losses", "gradient_norms"):
        _check_tensors(saved[name], 0, f"interval.{name}")
    for name, values in saved.get("figures", {}).items():
        if not isinstance(name, str):
            raise ValueError(f"interval.figures has no names, but {str(name)[:60]!r}")
        _check_tensors(values, 0, f"interval.figures.{name}")
    for pair in _PAIRS:
        _check_pair(saved, pair, "interval")


def check_statistics(saved: dict[str, Any], batch_size: int) -> None:
    """What `SolveStatistics.load_state_dict` takes.

    Raises:
        ValueError: samples of other types or shapes, or too many of them.
    """
    _check_pair(saved, _PAIRS[0], "statistics")
    widest = max((len(row) for row in saved["num_evals"]), default=0)
    if widest > _SAMPLES_PER_ROW * batch_size:
        raise ValueError(f"statistics.num_evals has {widest:,} solves of one step")


def _entry_of(config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the optimiser remembers of a parameter, found out by a step on one."""
    probe = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
    optimizer = config.build([probe])
    probe.grad = torch.zeros_like(probe)
    optimizer.step()
    return optimizer.state[probe]


def _fitting(value: Any, name: str, like: Tensor | None, step: int) -> Tensor:
    """A tensor of a parameter's form, or, like none, a count of steps."""
    shape = torch.Size() if like is None else like.shape
    _check_form(value, name)
    if value.shape != shape or (like is not None and value.dtype != like.dtype):
        raise ValueError(f"{name} is of shape {tuple(value.shape)} and {value.dtype}")
    if like is None and not 1 <= value.item() <= step:
        raise ValueError(f"{name} is {value.item()}, expected a number of steps up to {step}")
    value = value.detach()
    # Numbers that share a place, as in a view, cannot be changed one by one.
    return value if value.is_contiguous() else value.clone(memory_format=torch.contiguous_format)


def _check_form(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_meta or value.dtype not in _REAL:
        raise ValueError(f"{name} is of {value.dtype} and {value.layout}, expected plain numbers")


def _check_tensors(values: Any, num_dims: int, name: str) -> None:
    """A list of tensors that have as many numbers as they say."""
    if not isinstance(values, list):
        raise ValueError(f"{name} is a {type(values).__name__}, expected a list")
    for value in cast(list[Any], values):
        _check_form(value, name)
        if value.dim() != num_dims:
            raise ValueError(f"{name} has a tensor of shape {tuple(value.shape)}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} has a tensor with fewer numbers than its shape has")


def _check_pair(saved: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Two figures of the same samples, step by step."""
    for name in names:
        _check_tensors(saved[name], 1, f"{where}.{name}")
    first, second = ([len(row) for row in saved[name]] for name in names)
    if first != second:
        raise ValueError(f"{where}.{names[0]} and {where}.{names[1]} are of other samples")


def _check_number(value: Any, default: Any, name: str) -> None:
    """A count where the default is one, else seconds or the like, or a loss where that is inf."""
    if type(value) is not type(default):
        raise ValueError(f"{name} is {str(value)[:60]!r}, expected a {type(default).__name__}")
    if math.isinf(default) and not math.isnan(value):
        return
    if not 0 <= value < _LARGEST_COUNT:  # nor NaN
        raise ValueError(f"{name} is {str(value)[:60]}, expected a number of at least 0")


def _names(values: Mapping[Any, Any]) -> str:
    return ", ".join(str(name)[:60] for name in values) or "nothing"
