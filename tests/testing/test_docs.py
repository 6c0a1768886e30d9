"""The snippets of the docs of testing and diagnostics run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import equilibria

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = str(Path(equilibria.__file__).parents[1])


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("index", range(2))
def test_contracts_of_the_docs_pass(index: int, tmp_path: Path) -> None:
    code = snippets("testing.md")[index]
    (tmp_path / "test_mine.py").write_text(code)
    printed = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], tmp_path)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None
    assert int(passed[1]) >= (200 if "SolverContract" in code else 20)


@pytest.mark.parametrize(
    ("page", "index"),
    [("testing.md", 2), *(("diagnostics.md", i) for i in range(4))],
    ids=str,
)
def test_snippets_run(page: str, index: int, tmp_path: Path) -> None:
    run([sys.executable, "-c", snippets(page)[index]], tmp_path)


def test_no_snippet_is_forgotten() -> None:
    assert len(snippets("testing.md")) == 3
    assert len(snippets("diagnostics.md")) == 4
