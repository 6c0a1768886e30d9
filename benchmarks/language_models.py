"""What do models of equal parameters make of words, after equal steps?

    equilibria train ptb-small --data FOLDER        # and the others
    python -m benchmarks.language_models runs/ptb-small-* runs/wikitext2-small-*

Gathers what finished runs left into results/language_models, one JSON file per recipe
(configuration, environment, summary, course of the losses), and draws their losses.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.copy_memory import IMAGES, Result, gather
from benchmarks.record import RESULTS

FOLDER = RESULTS / "language_models"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(results: list[Result], path: Path) -> None:
    """Training and validation perplexities over the steps, a panel per text."""
    from matplotlib.figure import Figure

    texts: dict[str, list[Result]] = {}
    for result in results:
        texts.setdefault(result["environment"]["data"]["name"], []).append(result)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, (text, runs) in zip(panels, texts.items(), strict=True):
        for result, colour in zip(runs, COLOURS, strict=False):
            for kind, style in (
                ("train", {"linewidth": 0.6, "alpha": 0.5}),
                ("valid", {"marker": "o"}),
            ):
                steps = [record["step"] for record in result[kind]]
                values = [math.exp(min(record["loss"], 10.0)) for record in result[kind]]
                label = result["recipe"] if kind == "valid" else None
                axes.plot(steps, values, color=colour, label=label, markersize=4, **style)
        axes.set_yscale("log")
        axes.set_ylim(100.0, 1_500.0)
        axes.set_yticks(
            [100, 150, 200, 300, 500, 1_000], ["100", "150", "200", "300", "500", "1000"]
        )
        axes.set_title(text)
        axes.set_xlabel("training step (16 x 64 words)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("perplexity (thin: training; dots: validation)")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the runs named on the command line; write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for run in parser.parse_args(arguments).runs:
        result = gather(run)
        result["summary"].pop("sample", None)
        path = FOLDER / f"{result['recipe']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    draw([json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))],
         IMAGES / "words.png")  # fmt: skip


if __name__ == "__main__":
    main()
