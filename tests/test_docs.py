"""The documentation: every snippet runs as it stands, every package has its page."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import equilibria

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def snippets() -> list[tuple[str, int, str]]:
    """Page, line and code of every python block."""
    found: list[tuple[str, int, str]] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, block.start(1)) + 1
            found.append((page.name, line, block[1]))
    return found


def is_contract(code: str) -> bool:
    return "Contract)" in code


# PyTorch warns of itself when forward mode is first used, and while it compiles
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.F:DeprecationWarning")
@pytest.mark.parametrize(
    ("page", "line", "code"),
    [
        pytest.param(*snippet, id=f"{snippet[0]}:{snippet[1]}")
        for snippet in snippets()
        if not is_contract(snippet[2])
    ],
)
def test_snippet_runs(
    page: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # blank lines in front, so that a traceback shows the line of the page
    exec(compile("\n" * (line - 1) + code, page, "exec"), {"__name__": "snippet"})


def modules_with_examples() -> list[str]:
    """Modules whose docstrings have examples, found without importing any."""
    package = Path(equilibria.__file__).parent
    return [
        ".".join(("equilibria", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_the_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_package_has_a_page() -> None:
    packages = {module.name for module in pkgutil.iter_modules(equilibria.__path__) if module.ispkg}
    pages = {page.stem for page in (DOCS / "reference").glob("*.md")}
    assert packages == pages - {"top-level"}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in navigation
