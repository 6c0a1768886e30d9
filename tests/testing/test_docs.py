"""The contracts in the docs are found by pytest, and the cells and solvers there keep them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
SOURCES = str(Path(equilibria.__file__).parents[1])


def run(folder: Path, *options: str) -> int:
    """Run the contracts of the page as a reader would; return how many tests passed."""
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    contracts = [code for code in blocks if "Contract)" in code]
    assert len(contracts) == 2
    for number, code in enumerate(contracts):
        (folder / f"test_snippet_{number}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0


def test_contracts_of_the_docs_on_one_problem(tmp_path: Path) -> None:
    assert run(tmp_path, "-k", "tanh or TestTanh") >= 30


@pytest.mark.slow
def test_contracts_of_the_docs_pass(tmp_path: Path) -> None:
    assert run(tmp_path) >= 220
