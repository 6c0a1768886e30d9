"""`equilibria share`: what others get is what the run had."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.cli.runs import load_task, open_run
from equilibria.pretrained import Pretrained


@pytest.fixture(scope="module")
def shared(cli: Any, finished: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share") / "shared"
    result = cli("share", finished.path, "--folder", folder)
    assert result.code == 0, result.err
    assert "config.json, model.safetensors, vocabulary.json, README.md" in result.out
    return folder


def test_it_scores_as_the_run_bit_for_bit(finished: Any, shared: Path) -> None:
    task, _, _ = load_task(*open_run(finished.path), "best")
    wanted = task.evaluate("test")
    task.model = Pretrained.from_pretrained(shared).model
    found = task.evaluate("test")
    assert found.loss == wanted.loss
    assert torch.equal(found.num_evals, wanted.num_evals)
    assert torch.equal(found.relative_residual, wanted.relative_residual)


def test_it_speaks_as_the_run(cli: Any, finished: Any, shared: Path) -> None:
    options = ["--prompt", "the cow", "a", "--num-tokens", 40, "--seed", 3]
    run, other = (cli("generate", path, *options) for path in (finished.path, shared))
    assert other.code == 0, other.err
    assert other.out == run.out


def test_the_card_says_what_the_run_was(finished: Any, shared: Path) -> None:
    card = (shared / "README.md").read_text()
    summary = json.loads((finished.path / "summary.json").read_text())
    environment = json.loads((finished.path / "environment.json").read_text())
    for part in (
        "---\nlibrary_name: equilibria\n",
        "# pydoc-characters",
        "pipeline_tag: text-generation",
        f"| bits per character | {summary['test_loss'] / math.log(2):.4f} |",
        f"| function evaluations (NFE) | {summary['test_solves']['num_evals']['mean']:.1f} |",
        f"{summary['test_solves']['relative_residual']['p95']:.1e} |",
        "unigram, baseline bits per character",
        f"| digest | `{environment['data']['digest']}` |",
        "| name | `cow.txt` |",
        f"| torch | {torch.__version__} |",
        '"d_model": 8',
        "from equilibria.pretrained import Pretrained",
    ):
        assert part in card


def test_nothing_shared_tells_where_it_was_made(finished: Any, shared: Path) -> None:
    for file in shared.iterdir():
        content = file.read_bytes()
        assert str(finished.path.parent).encode() not in content
        assert b"/tmp" not in content


def test_the_data_are_not_needed(cli: Any, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["path"] = str(tmp_path / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    assert cli("share", run, "--folder", tmp_path / "shared").code == 0
    assert Pretrained.from_pretrained(tmp_path / "shared").vocabulary is not None


def test_figures_are_those_of_the_checkpoint_or_none(cli: Any, run: Path, tmp_path: Path) -> None:
    (run / "summary.json").unlink()
    assert cli("share", run, "--folder", tmp_path / "a", "--checkpoint", "last").code == 0
    assert "The run was not finished" in (tmp_path / "a" / "README.md").read_text()


def test_it_goes_to_the_hub(
    cli: Any, finished: Any, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    pushed: dict[str, Any] = {}

    def push(self: Pretrained, name: str, private: bool | None) -> str:
        if name == "me/refused":
            raise PermissionError("401 Unauthorized\nmore")
        pushed[name] = (self.card, private)
        return f"https://hub/{name}"

    monkeypatch.setattr(Pretrained, "push_to_hub", push)
    result = cli("share", finished.path, "--push", "me/cow")
    assert (result.code, result.out) == (0, "https://hub/me/cow\n")
    assert pushed == {"me/cow": ((shared / "README.md").read_text(), None)}
    result = cli("share", finished.path, "--push", "me/refused")
    assert result.code == 2
    assert "cannot be pushed to the hub (PermissionError: 401 Unauthorized)" in result.err


def test_a_model_of_copying(cli: Any, tmp_path: Path) -> None:
    flags = {
        "data.num-blanks": 5, "data.num-valid": 4, "data.num-test": 4, "model.d-model": 8,
        "model.num-blocks": 2, "task.batch-size": 4, "task.eval-batch-size": 4,
        "train.num-steps": 2, "train.eval-every": 2, "train.checkpoint-every": 2,
        "train.folder": tmp_path / "runs", "train.device": "cpu",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    trained = cli("train", "copy-memory-tcn", *words)
    assert trained.code == 0, trained.err
    (path,) = (tmp_path / "runs").iterdir()
    result = cli("share", path, "--folder", tmp_path / "shared")
    assert result.code == 0, result.err
    found = Pretrained.from_pretrained(tmp_path / "shared")
    assert found.vocabulary is None
    assert "copy-memory" in found.card
    refused = cli("generate", tmp_path / "shared", "--prompt", "a")
    assert "no language model of a text" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say where the model goes: --folder DIR, --push OWNER/NAME, or both"),
        (["--push", "cow"], "--push 'cow' is not OWNER/NAME"),
        (["--folder", "file"], "is a file; give --folder another name"),
        (["--folder", "full"], "holds other things than a shared model"),
        (["--folder", "new", "--checkpoint", "7"], "no checkpoint '7'"),
    ],
)
def test_what_cannot_be_done_is_refused(
    cli: Any,
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    result = cli("share", finished.path, *options)
    assert result.code == 2
    assert message in result.err
    assert not Path("new").exists()


def test_a_shared_folder_is_no_run(cli: Any, shared: Path) -> None:
    assert "give --prompt TEXT" in cli("generate", shared).err
    last = cli("generate", shared, "--prompt", "a", "--checkpoint", "last")
    assert "holds one checkpoint only" in last.err
