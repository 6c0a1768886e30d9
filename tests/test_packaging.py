"""What a user gets by installing and importing: few imports, one version, complete pins."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str) -> str:
    """Output of a fresh interpreter, because pytest has imported half of everything already."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package_names(requirements: list[str]) -> set[str]:
    """Names without versions, spelled as package indices compare them."""
    return {canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements}


def test_import_loads_nothing_but_torch_and_the_standard_library() -> None:
    printed = run_python(
        "-c",
        "import sys, torch; before = set(sys.modules); import equilibria;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})",
    )
    assert set(printed.split()) - sys.stdlib_module_names <= {"equilibria", "torch"}


def test_import_leaves_the_command_line_alone() -> None:
    printed = run_python("-c", "import sys, equilibria; print(*sys.modules)")
    packages = ("cli", "data", "diagnostics", "models", "recipes", "tasks", "train")
    assert not set(printed.split()) & {f"equilibria.{name}" for name in packages}


def test_printed_version_is_that_of_the_installed_package() -> None:
    installed = metadata.version("equilibria")
    assert run_python("-m", "equilibria.cli.main", "--version") == f"equilibria {installed}\n"


def test_installing_gives_the_console_command() -> None:
    (command,) = metadata.distribution("equilibria").entry_points.select(
        group="console_scripts", name="equilibria"
    )
    assert callable(command.load())


def test_constraints_pin_every_requirement_exactly(pyproject: dict[str, Any]) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    # Neither options, nor addresses, nor versions of one build such as +cpu.
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    project = pyproject["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    # Builds of torch for CUDA want a Triton of their own.
    assert package_names(needed) - package_names(lines) == {"triton"}
    assert "torch==2.13.0" in lines


def test_the_import_contract_of_the_library_names_every_other_dependency(
    pyproject: dict[str, Any],
) -> None:
    (contract,) = (
        contract
        for contract in pyproject["tool"]["importlinter"]["contracts"]
        if contract["name"] == "The library needs only torch"
    )
    dependencies = package_names(pyproject["project"]["dependencies"])
    modules = {name.replace("-", "_") for name in dependencies - {"torch"}}
    assert modules <= set(contract["forbidden_modules"])
