"""The configuration: between runs what differs, and all of each."""

from __future__ import annotations

import html
import json
from typing import Any

from equilibria.report.sections.configuration import flattened

ABSENT = "\N{EN DASH}"


def test_options_by_dotted_name() -> None:
    values = {"a": {"b": 1, "c": {"d": None}}, "e": [1, "x"], "f": {}, "g": "text"}
    assert dict(flattened(values)) == {
        "a.b": "1",
        "a.c.d": "null",
        "e": '[1, "x"]',
        "f": "{}",
        "g": "text",
    }


def test_only_what_differs_is_compared(make_run: Any, page_of: Any) -> None:
    first = {"model": {"d_model": 8, "solve": {"rtol": 1e-3}}, "seed": 0, "name": "same"}
    second = {"model": {"d_model": 8, "solve": {"rtol": 1e-4}}, "seed": 0, "name": "same"}
    third = {"model": {"d_model": 16}, "seed": 0, "name": "same", "more": [1]}
    page = page_of(
        make_run("one", config=first),
        make_run("two", config=second),
        make_run("three", config=third, recipe="another"),
    )
    assert page.rows("Configuration") == {
        "recipe": ["copy-memory-small", "copy-memory-small", "another"],
        "model.d_model": ["8", "8", "16"],
        "model.solve.rtol": ["0.001", "0.0001", ABSENT],
        "more": [ABSENT, ABSENT, "[1]"],
    }


def test_no_difference_is_said(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run("one"), make_run("two"))
    assert page.notices == ["The configurations are the same."]
    assert page.rows("Configuration") == {}


def test_every_configuration_is_there_in_full(make_run: Any, page_of: Any) -> None:
    config = {"model": {"name": "<&>", "deep": {"values": [1, 2.5, None]}}}
    page = page_of(make_run(config=config))
    start = page.html.index("<details>")
    full = page.html[page.html.index("<pre>", start) + 5 : page.html.index("</pre>", start)]
    assert json.loads(html.unescape(full)) == config


def test_long_values_are_cut(make_run: Any, page_of: Any) -> None:
    page = page_of(
        make_run("one", config={"text": "a" * 10_000}), make_run("two", config={"text": "b"})
    )
    assert len(page.rows("Configuration")["text"][0]) < 600
