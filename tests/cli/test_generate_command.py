"""`equilibria generate`: a prompt and what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_prompt_and_continuation_are_printed(cli: Any, finished: Any, text_file: Path) -> None:
    result = cli("generate", finished.path, "--prompt", "the cow", "--num-tokens", 30)
    assert result.code == 0, result.err
    assert result.out.startswith("the cow")
    assert result.out.endswith("\n")
    text = result.out[:-1]
    assert len(text) == len("the cow") + 30
    assert set(text) <= set(text_file.read_text())


def test_the_seed_decides(cli: Any, finished: Any) -> None:
    def text(*options: object) -> str:
        result = cli("generate", finished.path, "--prompt", "the", "--num-tokens", 40, *options)
        assert result.code == 0, result.err
        return result.out

    assert text() == text("--seed", 0) != text("--seed", 1)
    assert text("--temperature", 0) == text("--temperature", 0.0, "--seed", 1)
    assert text("--top-k", 1) == text("--temperature", 0)
    assert text("--top_k", 2, "--mem_len", 3) != text("--top-k", 2)


def test_any_checkpoint_can_speak(cli: Any, finished: Any) -> None:
    for checkpoint in ("best", "last", "12"):
        options = ["--prompt", "a", "--num-tokens", 3, "--checkpoint", checkpoint]
        assert cli("generate", finished.path, *options).code == 0


def test_a_long_prompt_is_read_as_far_as_the_memory_goes(cli: Any, finished: Any) -> None:
    prompt = "the quick brown dog " * 20
    result = cli("generate", finished.path, "--prompt", prompt, "--num-tokens", 5)
    assert result.code == 0, result.err
    assert result.out.startswith(prompt)
