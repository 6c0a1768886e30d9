"""The page itself: sections in their order, written as one HTML file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from equilibria import __version__
from equilibria.report.blocks import Section
from equilibria.report.runs import Run
from equilibria.report.sections import (
    configuration,
    environment,
    headline,
    learning,
    measured,
    samples,
    solves,
    traces,
)

_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS: tuple[Callable[[Sequence[Run]], Section | None], ...] = (
    headline.section,
    learning.section,
    solves.section,
    traces.section,
    measured.section,
    samples.section,
    configuration.section,
    environment.section,
)


def render_page(runs: Sequence[Run]) -> str:
    """HTML that needs nothing else: no network, no script, no file beside it.

    Whatever a run says is escaped; the page's own policy forbids scripts and connections besides.
    """
    sections = [made for make in _SECTIONS if (made := make(runs)) is not None]
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=runs[0].name.text if len(runs) == 1 else f"{len(runs)} runs",
            runs=runs,
            sections=sections,
            style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
            version=__version__,
            date=time.strftime("%Y-%m-%d %H:%M"),
        )
    )
    # JSON may hold halves of characters, which no file can
    return page.encode("utf-8", "replace").decode("utf-8")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
