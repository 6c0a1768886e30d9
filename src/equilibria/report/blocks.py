"""What sections are made of: plain values, which a template of the same name shows.

Strings are text and never HTML; the templates escape them. Only `Chart.svg` is markup, made by
`charts` from numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class RunName:
    """How a run is called on the page.

    Args:
        number: from 1; picks the colour.
        text: name of its folder.
    """

    number: int
    text: str

    @property
    def colour(self) -> int:
        """Which of the colours of `style.css` is this run's."""
        return (self.number - 1) % NUM_COLOURS + 1


NUM_COLOURS = 8


@dataclass(frozen=True)
class Tile:
    """One figure, large, with what it is."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Figures of a single run."""

    template: ClassVar = "tiles.html"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Row:
    """A named line of a table."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows under columns; a column belongs to a run, or has a plain heading."""

    template: ClassVar = "table.html"
    columns: tuple[RunName | str, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    is_code: bool = False
    """Whether cells are code, which is set in a fixed width."""
    is_folded: bool = False
    """Whether it is shown on demand, under its caption."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and what to know to read it."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Charts:
    """Drawings side by side, as many as fit."""

    template: ClassVar = "charts.html"
    charts: tuple[Chart, ...]
    runs: tuple[RunName, ...] = ()
    """For a legend; empty where all belongs to one run."""


@dataclass(frozen=True)
class Part:
    """A share of a bar."""

    label: str
    value: str
    percent: float


@dataclass(frozen=True)
class Bar:
    """Something whole, such as the time of a run, and its parts."""

    run: RunName
    value: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Bars:
    """Bars of several runs under one heading."""

    template: ClassVar = "bars.html"
    caption: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Passage:
    """Text that a model continued."""

    template: ClassVar = "passage.html"
    run: RunName
    prompt: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Folded:
    """Long text that is shown on demand."""

    template: ClassVar = "folded.html"
    title: str
    text: str


@dataclass(frozen=True)
class Note:
    """A sentence, of a run or in general."""

    template: ClassVar = "note.html"
    text: str
    run: RunName | None = None


Block = Tiles | Table | Charts | Bars | Passage | Folded | Note


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""

    @property
    def anchor(self) -> str:
        """Name of the section in the address of the page."""
        return "-".join(self.title.lower().split())
