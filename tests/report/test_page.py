"""The page: what is on it, that it needs nothing else, and that texts of runs stay texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SECTIONS = ["Figures", "Learning", "Solves", "Traces", "Samples", "Configuration", "Environment"]
HOSTILE = (
    "</pre></style></title><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
)


def test_a_finished_run_has_every_section(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run())
    assert page.titles == SECTIONS
    assert page.notices == []
    anchors = {attributes["href"] for attributes in page.parsed.elements("a")}
    sections = {f"#{attributes['id']}" for attributes in page.parsed.elements("section")}
    assert anchors == sections


def test_the_drawings_of_a_run(make_run: Any, page_of: Any) -> None:
    assert page_of(make_run()).chart_titles == [
        "Loss (nats)",
        "Validation loss (nats)",
        "Recall in validation",
        "Learning rate",
        "Gradient norm, before clipping",
        "Tokens per second",
        "NFE, forward",
        "Relative residual, forward",
        "NFE, backward",
        "Relative residual, backward",
        "NFE, validation",
        "NFE by sample, test split",
        "Residuals by sample, test split",
        "NFE by sample, late training",
        "Residuals by sample, late training",
        "Forward solves",
        "Backward solves",
    ]


def test_the_headline_figures(make_run: Any, page_of: Any) -> None:
    text = page_of(make_run()).parsed.text.replace("\N{NO-BREAK SPACE}", " ")
    for figure in (
        "Recipe copy-memory-small, finished (100 steps)",
        "Test recall 0.5000",
        "Test loss 0.7500 nats",
        "Baseline memoryless 1.2500 nats",
        "Best validation loss 1.1000 step 100",
        "NFE, test 8.5 95th percentile 11.0",
        "NFE, training 7.5 95th percentile 9.0",
        "NFE, backward 4.0",
        "Relative residual, test 4.0 × 10⁻⁵",  # noqa: RUF001
        "Training time 1 min 40 s",
        "Parameters 12,345",
        "Peak memory 321 MiB",
        "it was the best of times",
        "forward solves 50 s, 50%",
    ):
        assert figure in text


def test_several_runs_stand_side_by_side(
    make_run: Any, page_of: Any, figures: dict[str, Any]
) -> None:
    other = {**figures, "test_loss": 0.25, "test_recall": 0.75}
    page = page_of(make_run("one"), make_run("two", summary=other), make_run("three", solves=None))
    rows = page.rows("Figures")
    assert rows["Test recall"] == ["0.5000", "0.7500", "0.5000"]
    assert list(rows)[:2] == ["Recipe", "State"]
    assert page.parsed.text.startswith("3 runs")
    assert "NFE in training" in page.chart_titles  # of the run without histograms
    assert {"run-1", "run-2", "run-3"} <= {a.get("class") for a in page.parsed.elements("li")}


def test_runs_of_one_name_are_told_apart(make_run: Any, page_of: Any) -> None:
    first, second = make_run("x/same"), make_run("y/same")
    text = page_of(first, second, first).parsed.text
    assert "2 runs" in text
    assert str(first) in text
    assert str(second) in text


def test_an_explicit_model_has_no_solves(
    make_run: Any, page_of: Any, figures: dict[str, Any]
) -> None:
    lines = [
        {"kind": "train", "step": s, "phase": "explicit", "loss": 1.0 / s} for s in range(1, 50)
    ]
    summary = {**figures, "training_solves": None, "test_solves": None}
    explicit = make_run("explicit", metrics=lines, summary=summary, solves=None)
    alone = page_of(explicit)
    assert "Solves" not in alone.titles
    assert "Traces" not in alone.titles
    assert "NFE" not in alone.parsed.text
    both = page_of(explicit, make_run("deq"))
    assert "Explicit, without a solve: explicit." in both.parsed.text
    assert both.rows("Figures")["NFE, test"][0] == "\N{EN DASH}"


# --- Nothing from outside, nothing that runs ------------------------------------------------------


def test_the_page_needs_nothing_else(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run("one"), make_run("two"))
    parsed = page.parsed
    assert {tag for tag, _ in parsed.tags} & {
        "script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video",
    } == set()  # fmt: skip
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value is not None
                assert value.startswith("#")
    assert "http:" not in page.html
    assert "https:" not in page.html
    assert "@import" not in page.html
    assert not re.findall(r"url\((?!#)", page.html)


def test_the_page_forbids_scripts_and_connections(make_run: Any, page_of: Any) -> None:
    policies = [
        attributes["content"]
        for attributes in page_of(make_run()).parsed.elements("meta")
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (policy,) = policies
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_drawings_are_whole_and_named_apart(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run())
    drawings = re.findall(r"<svg.*?</svg>", page.html, re.DOTALL)
    assert len(drawings) == len(page.chart_titles)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        own = set(re.findall(r'\sid="([^"]+)"', drawing))
        assert set(re.findall(r'url\(#([^)]+)\)|href="#', drawing)) - {""} <= own
        assert set(re.findall(r'href="#([^"]+)"', drawing)) <= own
        # every colour is the page's, so that both themes have it
        assert not re.findall(r"(?:fill|stroke): #", drawing)
    ids = [attributes["id"] for _, attributes in page.parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def _with_hostile_texts(make_run: Any, name: str, figures: dict[str, Any]) -> Path:
    nested = {"model": {HOSTILE: HOSTILE, "d_model": HOSTILE}, "train": {"num_steps": HOSTILE}}
    lines = [
        {"kind": "train", "step": s, "phase": HOSTILE, "loss": 1.0, HOSTILE: 2.0, "num_evals": 3}
        for s in range(1, 40)
    ]
    summary = {
        **figures,
        f"test_{HOSTILE}": 1.0,
        "baseline_losses": {HOSTILE: 1.0},
        "sample": {"prompt": HOSTILE, "text": f"{HOSTILE}\ud800\u202e\x00"},
    }
    return make_run(
        name,
        recipe=HOSTILE,
        config=nested,
        environment={HOSTILE: HOSTILE, "packages": {HOSTILE: [HOSTILE]}},
        metrics=[*lines, {"kind": HOSTILE, "step": 3}],
        summary=summary,
    )


@pytest.mark.parametrize("others", [0, 1])
def test_texts_of_a_run_are_only_texts(
    make_run: Any, page_of: Any, figures: dict[str, Any], others: int
) -> None:
    folders = [_with_hostile_texts(make_run, "<b>bold<", figures)]
    folders += [make_run(f"other-{i}") for i in range(others)]
    page = page_of(*folders)
    tags = {tag for tag, _ in page.parsed.tags}
    assert not tags & {"script", "img", "b"}
    assert "<script" not in page.html
    assert HOSTILE in "".join(page.parsed.texts)  # it is there, as text
    assert not any(name.startswith("on") for _, a in page.parsed.tags for name in a)
    page.html.encode("utf-8")
