"""Every benchmark runs at a tiny size, so that a machine that was waited for is not wasted."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TIMED = {
    "overhead": [],
    "training_step": ["small transformer"],
    "mixed_difficulty": ["transformer"],
    "memory": [],
    "scaling": ["batch", "steps"],
    "rounded_history": [],
    "profile_step": [],
    "corpus_memory": [],
    "long_run": ["deq-transformer"],
    "generation": [],
    "gpu.wt103_block": ["bfloat16"],
    "gpu.wt103_training": ["wt103-deq-transformer-regularised", "wt103-deq-trellisnet"],
    "gpu.tiny_and_mdeq": ["mdeq"],
    "gpu.kernels": [],
    "gpu.cuda_graphs": [],
    "gpu.bf16_history": [],
}
"""What a dry run leaves out besides is the same code at another size."""

NEEDS_TORCHDEQ = pytest.mark.skipif(not find_spec("torchdeq"), reason="torchdeq is not installed")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the folder, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("name", TIMED)
def test_dry_run(
    benchmark: Callable[[str], Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark(name)
    module.main(["--tiny", "--output", str(tmp_path), *TIMED[name]])
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert file.stem == name.split(".")[-1]
    assert result["tiny"]
    assert result["device"] == "cpu"
    assert ("needs CUDA" in capsys.readouterr().out) == (
        name in ("gpu.tiny_and_mdeq", "gpu.kernels", "gpu.cuda_graphs")
    )


@NEEDS_TORCHDEQ
def test_what_dry_runs_measure_can_be_shown(
    benchmark: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, plots = benchmark("tables"), benchmark("plots")
    for name in ("overhead", "scaling"):
        names = ["batch", "steps"] if name == "scaling" else []
        benchmark(name).main(["--tiny", "--output", str(tmp_path), *names])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "load", lambda name, folder=tmp_path: json.loads(
        (folder / f"{name}.json").read_text()
    ))  # fmt: skip
    sections = tables.PAGES["performance.md"]
    page = (ROOT / "docs" / "performance.md").read_text()
    text = tables.regenerated(page, "performance.md", sections)
    assert "| torchdeq anderson / anderson, eager |" in text
    assert "Not measured yet: `python -m benchmarks.memory`" in text
    plots.main(tmp_path, tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_result_is_kept_only_of_complete_full_runs(
    benchmark: Callable[[str], Any], tmp_path: Path
) -> None:
    options = benchmark("options")
    results = benchmark("record").RESULTS
    assert options.parse("", [], ["a", "b"]).folder == results
    assert options.parse("", ["a"], ["a", "b"]).folder is None
    assert options.parse("", ["--tiny"], ["a", "b"]).folder is None
    assert options.parse("", ["--tiny", "--output", str(tmp_path)]).folder == tmp_path
    with pytest.raises(SystemExit):
        options.parse("", ["c"], ["a", "b"])


def test_the_list_for_people_is_the_queue(benchmark: Callable[[str], Any]) -> None:
    readme = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(.+?)` \| ([\d.]+) \|", readme, re.MULTILINE)
    queue = benchmark("gpu.run_queue").QUEUE
    assert [(name, about, float(minutes)) for name, about, _, minutes in rows] == [
        (entry.name, entry.about, entry.minutes) for entry in queue
    ]
    for (_, _, command, _), entry in zip(rows, queue, strict=True):
        if not entry.is_test:
            assert command.split() == ["python", *entry.command("cuda", tiny=False)[1:]]
            assert find_spec(f"{entry.folder}.{entry.name}")


def test_the_queue_goes_on_after_a_failure(
    benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    module = benchmark("gpu.run_queue")
    queue = [module.Entry("no_such_file", 1, ""), module.Entry("bf16_history", 1, "", module.GPU)]
    monkeypatch.setattr(module, "QUEUE", queue)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(SystemExit):
        module.main(["--tiny", "--device", "cpu"])
    out = capfd.readouterr().out.splitlines()
    assert "failed (exit status 1)" in out[-2]
    assert out[-1].endswith("done")


def test_peak_memory_is_exact(benchmark: Callable[[str], Any]) -> None:
    def case() -> None:
        a = torch.ones(1000)
        b = a + 1  # two at once
        del a
        c = b.double()  # 4000 and 8000 bytes
        del b, c

    peak = benchmark("peak").peak_bytes(case, torch.device("cpu"))
    assert 12_000 <= peak < 12_300  # blocks are aligned


def test_equal_parameters(benchmark: Callable[[str], Any]) -> None:
    cells, explicit = benchmark("cells"), benchmark("explicit")
    assert explicit.fitted(cells.SIZES["wide transformer"]) == (16, 1425)
    size = cells.SIZES["small transformer"]
    found = sum(explicit.count(module) for _, module, _ in [explicit.untied(size, "cpu")])
    assert abs(found / explicit.count(size.cell()) - 1) < 0.02


def test_the_loosest_tolerance(benchmark: Callable[[str], Any]) -> None:
    loosest = benchmark("methods").loosest
    assert loosest(lambda t: t <= 2e-3, 1e-4, factor=10.0) == pytest.approx(1e-3)
    assert loosest(lambda t: t <= 2e-5, 1e-4, factor=10.0) == pytest.approx(1e-5)
    assert loosest(lambda t: False, 1e-4) is None


def test_a_training_goes_on_with_its_newest_run(
    benchmark: Callable[[str], Any], tmp_path: Path
) -> None:
    module = benchmark("gpu.train_words")
    begin = module.command("ptb-small", Path("texts"), tmp_path, ["--seed", "3"])
    assert begin[3:5] == ["train", "ptb-small"]
    assert begin[-2:] == ["--seed", "3"]
    for run in ("ptb-small-20260101-000000", "ptb-small-20260102-000000"):
        (tmp_path / run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "ptb-small-20260103-000000").mkdir()  # stopped before its first checkpoint
    (tmp_path / "ptb-small-tied-20260104-000000/checkpoints/step-00000010").mkdir(parents=True)
    again = module.command("ptb-small", Path("texts"), tmp_path, ["--seed", "3"])
    assert again[4:] == ["--resume", str(tmp_path / "ptb-small-20260102-000000")]
