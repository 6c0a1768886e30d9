"""What a run ran on, without saying whose machine it was."""

from __future__ import annotations

import getpass
import json
import platform
import socket

import pytest
import torch

from equilibria import UserError
from equilibria.train.environment import describe_environment, peak_memory_mib
from equilibria.train.experiment import TrainConfig

CPU = torch.device("cpu")


def test_versions_and_hardware() -> None:
    described = json.loads(json.dumps(describe_environment(CPU)))
    assert described["python"] == platform.python_version()
    assert described["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert described["device"] == "cpu"
    assert described["num_threads"] == torch.get_num_threads()


def test_no_names_and_no_places() -> None:
    text = json.dumps(describe_environment(CPU))
    for private in (socket.gethostname(), "/home", "/usr"):
        assert private not in text
    if len(getpass.getuser()) > 3:
        assert getpass.getuser() not in text.split('"')


def test_peak_memory_is_that_of_this_process() -> None:
    assert 50 < peak_memory_mib(CPU) < 100_000


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TrainConfig(device="auto").torch_device() == CPU
    assert TrainConfig(device="cpu").torch_device() == CPU
    with pytest.raises(UserError, match="no GPU here; use --train.device cpu"):
        TrainConfig(device="cuda").torch_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TrainConfig(device="auto").torch_device().type == "cuda"
    assert TrainConfig(device="cpu").torch_device() == CPU


@pytest.mark.parametrize(
    "name", ["num_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints"]
)
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0 must be an integer of at least 1"):
        TrainConfig(**{name: 0})
