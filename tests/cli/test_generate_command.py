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


def test_several_prompts_are_continued_together(cli: Any, finished: Any) -> None:
    one = cli("generate", finished.path, "--prompt", "the", "--num-tokens", 8)
    both = cli("generate", finished.path, "--prompt", "the", "a cow", "--num-tokens", 8)
    assert both.code == 0, both.err
    first, second = both.out.split("-" * 20 + "\n")
    assert first == one.out
    assert second.startswith("a cow")
    assert "per token: function evaluations mean" in both.err


def test_a_text_stops_where_it_is_told(cli: Any, finished: Any) -> None:
    options = ["--prompt", "the", "--num-tokens", 300, "--temperature", 2, "--top-p", 0.99]
    result = cli("generate", finished.path, *options, "--stop", "z")
    assert result.code == 0, result.err
    assert result.out.index("z") == len(result.out) - 2
    wrong = cli("generate", finished.path, *options, "--stop", "ow")
    assert wrong.code == 2
    assert "--stop 'ow' is 2 tokens of this vocabulary; give exactly one" in wrong.err
