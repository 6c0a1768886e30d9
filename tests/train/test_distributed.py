"""Several processes train as one would, on gloo, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import equilibria
from equilibria import UserError
from equilibria.tasks.task import Evaluation, Share
from equilibria.train.checkpoint import CheckpointFolder
from equilibria.train.engine import Engine, start_engine
from equilibria.train.tensor_files import TensorFiles

WORKER = Path(__file__).with_name("processes.py")
_spec = importlib.util.spec_from_file_location("processes", WORKER)
assert _spec is not None
assert _spec.loader is not None
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"train": {"strategy": "fsdp"}},
    "fsdp-background": {"train": {"strategy": "fsdp", "save_in_background": True}},
    "chunks": {"train": {"batch_chunks": 2}},
    "fsdp-chunks": {"train": {"strategy": "fsdp", "batch_chunks": 2}},
    "trellisnet": {"model": "trellisnet", "changes": {"task": {"memory_length": 1}}},
    "penalty": {
        "changes": {"task": {"stabilisers": {"jacobian_weight": 0.5, "jacobian_probability": 0.5}}}
    },
}


def launch(folder: Path, devices: int, cases: dict[str, dict[str, Any]]) -> None:
    """Run all cases in one launch."""
    config = folder / f"cases-{devices}.json"
    config.write_text(
        json.dumps(
            {
                name: {
                    **case,
                    "train": {"strategy": "ddp", **case.get("train", {}), "devices": devices},
                }
                for name, case in cases.items()
            }
        )
    )
    sources = str(Path(equilibria.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(devices), str(WORKER), str(config), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def alone(folder: Path, name: str, case: dict[str, Any]) -> Path:
    """The same run in this process."""
    processes.run(folder, name, case, Engine(torch.device("cpu")))
    return folder / name


def curves(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What was recorded, by kind and step, without times."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        (record.pop("kind"), record.pop("step")): {
            name: value
            for name, value in record.items()
            if isinstance(value, float) and "second" not in name
        }
        for record in records
    }


def weights(run: Path, step: int = 10) -> dict[str, torch.Tensor]:
    """Of one file or of parts."""
    files = TensorFiles(run / "checkpoints" / f"step-{step:08d}", "model", "look")
    return {name: files.read(name) for name in files.shapes}


def assert_same_run(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Loss curves and weights to 1e-6; figures of solves, which stop by sample, as well."""
    left, right = curves(one), curves(other)
    assert left.keys() == right.keys()
    for key, record in left.items():
        chosen = {name: value for name, value in record.items() if name not in but}
        wanted = {name: value for name, value in right[key].items() if name not in but}
        assert chosen == pytest.approx(wanted, rel=1e-6), key
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8)


def first_half(run: Path, copy: Path) -> None:
    """A run as it was after its checkpoint of step 5."""
    shutil.copytree(run / "checkpoints" / "step-00000005", copy / "checkpoints" / "step-00000005")
    shutil.copy(run / "metrics.jsonl", copy)


def differing_solves() -> tuple[str, ...]:
    """Mixing looks at each sample alone, so that counts agree; residuals are at rounding."""
    return ("relative_residual", "relative_residual_max", "backward_relative_residual")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in two processes, one launch."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, 2, CASES)
    return folder


@pytest.mark.parametrize("name", [name for name in CASES if name != "penalty"])
def test_two_processes_equal_one(two: Path, tmp_path: Path, name: str) -> None:
    case = {k: v for k, v in CASES[name].items() if k != "train"}
    assert_same_run(two / name, alone(tmp_path, name, case), but=differing_solves())


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    """A row each."""
    launch(tmp_path, 4, {name: CASES[name] for name in ("ddp", "fsdp")})
    straight = alone(tmp_path, "straight", {})
    for name in ("ddp", "fsdp"):
        assert_same_run(tmp_path / name, straight, but=differing_solves())


def test_all_processes_decide_alike_on_the_penalty(two: Path, tmp_path: Path) -> None:
    """Its probes differ, whether it applies does not."""
    straight = curves(alone(tmp_path, "penalty", CASES["penalty"]))
    found = curves(two / "penalty")
    steps = range(1, 11)
    applied = [found[("train", s)].get("jacobian_penalty", 0.0) > 0.0 for s in steps]
    wanted = [straight[("train", s)].get("jacobian_penalty", 0.0) > 0.0 for s in steps]
    assert applied == wanted
    assert any(applied)


def test_a_run_goes_on_with_another_number_of_processes(two: Path, tmp_path: Path) -> None:
    """From shards in two processes to one, and from one to two."""
    straight = alone(tmp_path, "straight", {})
    for name in ("fsdp", "straight"):
        first_half(two / name if name == "fsdp" else straight, tmp_path / f"from-{name}")
    processes.run(tmp_path, "from-fsdp", {}, Engine(torch.device("cpu")))
    assert_same_run(tmp_path / "from-fsdp", straight, but=differing_solves())
    between = {"train": {"log_every": 3}}  # the checkpoint of step 5 is between two lines
    seldom = alone(tmp_path, "seldom", between)
    first_half(seldom, tmp_path / "from-seldom")
    launch(tmp_path, 2, {"from-straight": {"train": {"strategy": "fsdp"}}, "from-seldom": between})
    assert_same_run(tmp_path / "from-straight", straight, but=differing_solves())
    assert_same_run(tmp_path / "from-seldom", seldom, but=differing_solves())


@pytest.mark.slow
def test_shards_of_two_processes_are_taken_up_by_four(two: Path, tmp_path: Path) -> None:
    """And those of four by two."""
    straight = alone(tmp_path, "straight", {})
    first_half(two / "fsdp", tmp_path / "from-two")
    launch(tmp_path, 4, dict.fromkeys(("from-two", "four"), CASES["fsdp"]))
    first_half(tmp_path / "four", tmp_path / "from-four")
    launch(tmp_path, 2, {"from-four": CASES["fsdp"]})
    for name in ("from-two", "from-four"):
        assert_same_run(tmp_path / name, straight, but=differing_solves())


@pytest.mark.parametrize("name", ["fsdp", "fsdp-background"])
def test_every_process_writes_its_shards(two: Path, name: str) -> None:
    checkpoints = two / name / "checkpoints"
    assert sorted(path.name for path in (checkpoints / "step-00000010").iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "training.pt",
    ]
    state = CheckpointFolder(checkpoints).load_training(10)["optimizer"]["state"]
    assert all(
        not isinstance(v, torch.Tensor) or v.ndim == 0 for e in state.values() for v in e.values()
    )
    assert not list(checkpoints.glob(".*"))


def test_rows_are_shared_without_gaps() -> None:
    rows = [range(12)[Share(rank, 3).rows(12)] for rank in range(3)]
    assert [row for share in rows for row in share] == list(range(12))
    with pytest.raises(UserError, match="give a multiple of their number"):
        Share(0, 5).rows(12)
    assert [Share(1, 5).rows_if_equal(n) for n in (12, 10)] == [slice(None), slice(2, 4)]


def test_evaluations_are_means_over_items() -> None:
    def part(loss: float, num_items: int, recall: float) -> Evaluation:
        none = torch.ones(num_items)
        return Evaluation(loss, num_items, none, none, 1.0, {"recall": recall})

    whole = Evaluation.gathered([part(1.0, 1, 0.0), part(3.0, 3, 1.0)])
    assert (whole.loss, whole.num_items, whole.figures) == (2.5, 4, {"recall": 0.75})
    assert whole.num_evals.numel() == 4


def test_several_machines_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun --nnodes 2 --nproc-per-node 4"):
        start_engine(torch.device("cpu"), 4, 2)
