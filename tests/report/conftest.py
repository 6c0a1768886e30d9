"""Run folders as training leaves them, without training, and pages taken apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from equilibria.report.page import render_page
from equilibria.report.runs import read_runs

CONFIG: dict[str, Any] = {
    "data": {"num_blanks": 4, "cutoffs": []},
    "model": {"d_model": 8, "solve": {"rtol": 1e-3, "adjoint": "implicit(rtol=0.01)"}},
    "train": {"num_steps": 100},
    "seed": 0,
}
SUMMARY: dict[str, Any] = {
    "kind": "summary",
    "step": 100,
    "best_step": 80,
    "test_loss": 0.75,
    "test_recall": 0.5,
    "num_test_items": 10,
    "baseline_losses": {"memoryless": 1.25},
    "training_solves": {
        "num_evals": {"mean": 7.5, "p95": 9.0},
        "relative_residual": {"mean": 5e-4, "p95": 9e-4},
    },
    "test_solves": {
        "num_evals": {"mean": 8.5, "p95": 11.0},
        "relative_residual": {"mean": 4e-5, "p95": 8e-5},
    },
    "training_time": {
        "forward_seconds": 50.0,
        "backward_seconds": 30.0,
        "rest_seconds": 20.0,
        "total_seconds": 100.0,
    },
    "peak_memory_mib": 321.0,
    "num_parameters": 12345,
    "sample": {"prompt": "it was the best", "text": " of times"},
}
SOLVES: dict[str, Any] = {
    split: {
        "num_evals": {"values": [5, 6, 8], "samples": [1, 4, 3]},
        "relative_residual": {
            "bins_per_decade": 8,
            "bins": [-26, -25],
            "samples": [5, 3],
            "num_zero": 0,
            "num_not_finite": 0,
        },
    }
    for split in ("training", "test")
}
ENVIRONMENT: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"equilibria": "0.1.0"},
    "device": "cpu",
    "data": {"name": "copy-memory", "digest": "abc123"},
}


def train_record(step: int, **changes: Any) -> dict[str, Any]:
    """One line of the metrics."""
    equilibrium = step > 20
    return {
        "kind": "train",
        "step": step,
        "phase": "equilibrium" if equilibrium else "unrolled",
        "learning_rate": 0.01 * (1 - step / 200),
        "loss": 2.0 - step / 100,
        "gradient_norm": 1.0 / step,
        "num_evals": 8.0,
        "num_evals_max": 12.0,
        "relative_residual": 1e-3 * (1 + step % 7),
        "relative_residual_max": 2e-2,
        "backward_num_evals": 4.0 if equilibrium else None,
        "backward_relative_residual": 2e-3 if equilibrium else None,
        "seconds": 1.0,
        "tokens_per_second": 1000.0,
        **changes,
    }


def records(**changes: Any) -> list[dict[str, Any]]:
    """The metrics of a whole run; `changes` are made to every training record."""
    return [
        *(train_record(step, **changes) for step in range(2, 101, 2)),
        *(
            {"kind": "valid", "step": s, "loss": 2.1 - s / 100, "num_evals": 9.0, "recall": 0.4}
            for s in (20, 40, 60, 80, 100)
        ),
        {
            "kind": "trace",
            "step": 100,
            "forward": [[1.0, 0.1, 1e-3, None], [1.0, 0.2, 1e-2, 1e-4]],
            "backward": [[1.0, 0.1], [1.0, 0.05]],
            "forward_tolerance": 1e-3,
            "backward_tolerance": 0.1,
        },
    ]


RunFactory = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> RunFactory:
    """Writes a run folder; None for a file leaves it out."""

    def make(
        name: str = "a-run",
        *,
        recipe: Any = "copy-memory-small",
        config: Any = CONFIG,
        environment: Any = ENVIRONMENT,
        metrics: Sequence[Any] | None = None,
        summary: Any = SUMMARY,
        solves: Any = SOLVES,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        lines = records() if metrics is None else metrics
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, value in {
            "config.json": None if config is None else {"recipe": recipe, "config": config},
            "environment.json": environment,
            "summary.json": summary,
            "solves.json": solves,
        }.items():
            if value is not None:
                (folder / file).write_text(json.dumps(value))
        return folder

    return make


@dataclass
class Parsed(HTMLParser):
    """A page taken apart.

    Args:
        tags: every element with its attributes.
        texts: what a reader sees, without the style.
    """

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All text, white space made one blank."""
        return " ".join("".join(f"{text} " for text in self.texts).split())

    def elements(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


@dataclass(frozen=True)
class Page:
    """HTML and what is in it."""

    html: str

    @property
    def parsed(self) -> Parsed:
        parsed = Parsed()
        parsed.feed(self.html)
        return parsed

    @property
    def titles(self) -> list[str]:
        """Of the sections, in order."""
        return re.findall(r"<h2>(.*?)</h2>", self.html)

    @property
    def chart_titles(self) -> list[str]:
        return re.findall(r"<figcaption><strong>(.*?)</strong>", self.html)

    @property
    def notices(self) -> list[str]:
        found = re.findall(r'<p class="notice.*?</p>', self.html, re.DOTALL)
        return [re.sub(r"<.*?>", "", notice) for notice in found]

    def rows(self, section: str) -> dict[str, list[str]]:
        """Cells by the name of their row, of all tables of a section."""
        start = self.html.index(f"<h2>{section}</h2>")
        end = self.html.index("</section>", start)
        found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', self.html[start:end])
        return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in found}


@pytest.fixture(scope="session")
def page_of() -> Callable[..., Page]:
    """The page about run folders."""
    return lambda *folders: Page(render_page(read_runs(folders)))


@pytest.fixture
def figures() -> dict[str, Any]:
    """The summary that `make_run` writes, to change a copy of."""
    return dict(SUMMARY)
