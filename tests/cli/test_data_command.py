"""`equilibria data`, and training on words."""

from __future__ import annotations

import json

import pytest

from equilibria.cli.main import main


def test_list(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path))
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert "929,589 / 73,760 / 82,430 tokens, 10,000 words" in shown
    assert shown.count("not on this machine") == 3
    (tmp_path / "texts" / "ptb").mkdir(parents=True)
    assert main(["data", "list"]) == 0
    assert str(tmp_path / "texts" / "ptb") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gte"], "there is no 'data gte'; did you mean 'get'?"),
        (["get"], "'data get' does not take 0 arguments"),
        (["get", "ptp"], "did you mean 'ptb'"),
        (["check", "ptb", "nowhere"], "does not exist"),
    ],
)
def test_errors(words, message, capsys):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main(["data", "--help"]) == 0
    assert "equilibria data get NAME" in capsys.readouterr().out
    assert main(["data"]) == 2


def test_files_of_ones_own_are_compared(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text("a b\n")
    assert main(["data", "check", "ptb", str(tmp_path)]) == 2
    assert "has 3 tokens here and 929,589 as published" in capsys.readouterr().err


def test_training_evaluation_and_generation_on_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(tmp_path / "cache"))
    lines = "the cat sees the dog <unk>\nthe dog sees the cat\n" * 40
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(lines)
    runs = tmp_path / "runs"
    assert main([
        "train", "ptb-small", "--data.name", "None", "--data", str(tmp_path),
        "--train.folder", str(runs), "--task.pretrain-steps", "1",
        "--train.num-steps", "3", "--train.eval-every", "3", "--task.batch-size", "2",
        "--task.segment-length", "8", "--task.memory-length", "8", "--model.d-model", "16",
        "--model.num-heads", "2", "--model.d-inner", "16",
    ]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "bits/token   perplexity" in shown
    assert "unigram" in shown
    (run,) = runs.iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_test_tokens"] == 519
    assert summary["baseline_bits_per_token"]["unigram"] == pytest.approx(2.4, abs=0.2)
    assert main(["eval", str(run)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "the cat", "--num-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the cat")
