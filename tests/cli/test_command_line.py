"""The command itself: help, version, list of recipes, names that are nearly right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import equilibria
from equilibria import recipes
from equilibria.cli import main as entry


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(cli: Any, word: str) -> None:
    assert cli(word) == (type(cli("--help")))(0, f"equilibria {equilibria.__version__}\n", "")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_names_every_command(cli: Any, word: str) -> None:
    result = cli(word)
    assert result.code == 0
    for command in entry.COMMANDS:
        assert f"  {command} " in result.out


def test_without_a_command_there_is_help_and_code_2(cli: Any) -> None:
    result = cli()
    assert result.code == 2
    assert "train" in result.out


@pytest.mark.parametrize(
    ("given", "meant"), [("trian", "train"), ("Evaluate", "eval"), ("recipe", "recipes")]
)
def test_a_command_that_is_nearly_right(cli: Any, given: str, meant: str) -> None:
    result = cli(given)
    assert result.code == 2
    assert result.err.startswith(f"error: there is no command {given!r}; did you mean {meant!r}?")
    assert result.out == ""


def test_every_command_has_its_module(cli: Any) -> None:
    for command in entry.COMMANDS:
        result = cli(command, "--help")
        assert result.code == 0
        assert command in result.text


def test_recipes_are_listed_with_what_to_expect(cli: Any) -> None:
    result = cli("recipes")
    assert result.code == 0
    lines = result.out.splitlines()
    assert len(lines) == len(recipes.names())
    for name, line in zip(recipes.names(), lines, strict=True):
        recipe = recipes.load(name)
        assert line.startswith(name)
        assert recipe.description in line
        assert line.endswith(f"Expected: {recipe.expected}")
        assert ("(default)" in line) == (name == recipes.DEFAULT)
    refused = cli("recipes", "all")
    assert refused.code == 2
    assert "recipes takes no arguments, not 'all'" in refused.err


def _in_a_shell(folder: Path) -> dict[str, Any]:
    sources = str(Path(equilibria.__file__).parents[1])
    return {
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": sources},
        "capture_output": True,
        "text": True,
        "check": False,
    }


def test_as_a_process(start_process: Any, tmp_path: Path) -> None:
    process = start_process(["trian"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: there is no command 'trian'")
    assert "Traceback" not in err


def test_what_the_light_commands_do_not_load(tmp_path: Path) -> None:
    """`--version` is instant: nothing of the training stack, not even torch's TensorBoard."""
    code = (
        "import sys; from equilibria.cli.main import main; main(['--version']); main([]);"
        "heavy = {'tyro', 'cattrs', 'tensorboard', 'matplotlib', 'equilibria.train'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], **_in_a_shell(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """As in `equilibria recipes | true`."""
    command = f"{sys.executable} -u -m equilibria.cli.main recipes | true"
    done = subprocess.run(command, shell=True, **_in_a_shell(tmp_path))
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
