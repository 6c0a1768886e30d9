"""Which sequence models of 14 thousand parameters can copy over 400 positions?

    equilibria train copy-memory-tcn        # and lstm, gru, deq-transformer
    python -m benchmarks.copy_memory runs/copy-memory-*

Gathers what finished runs left into results/copy_memory: per recipe one JSON file (configuration,
environment, summary, course of the losses), and one picture and one table of all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

FOLDER = RESULTS / "copy_memory"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
PUBLISHED = {
    "copy-memory-deq-transformer": ("DEQ-Transformer", 3.5e-6),
    "copy-memory-tcn": ("TCN", 2.7e-5),
    "copy-memory-lstm": ("LSTM", 0.0501),
    "copy-memory-gru": ("GRU", 0.0491),
}
"""Name and loss in arXiv 1909.01377, table 1."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
Result = dict[str, Any]


def gather(run: Path) -> Result:
    """What one finished run is worth keeping of, without places on this machine."""
    saved = json.loads((run / "config.json").read_text())
    del saved["config"]["train"]["folder"]
    for place in ("folder", "cache", "path"):
        saved["config"]["data"].pop(place, None)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "phase", "loss", "recall", "num_evals", "relative_residual", "seconds")
    return {
        **saved,
        "environment": json.loads((run / "environment.json").read_text()),
        "summary": json.loads((run / "summary.json").read_text()),
        "train": [_some(r, names) for r in records if r["kind"] == "train"],
        "valid": [_some(r, (*names, "exact_recall")) for r in records if r["kind"] == "valid"],
    }


def _some(record: Result, names: tuple[str, ...]) -> Result:
    """The named figures to five digits."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in record.items()
        if name in names
    }


def table(results: list[Result]) -> str:
    """One row per run, best first."""
    lines = [
        "| model | parameters | test loss | published | symbols recalled | sequences recalled "
        "| evaluations (NFE) | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: r["summary"]["test_loss"]):
        name, published = PUBLISHED[result["recipe"]]
        summary = result["summary"]
        solves = summary["test_solves"]
        evals = f"{solves['num_evals']['mean']:.1f}" if solves else "-"
        lines.append(
            f"| {name} | {summary['num_parameters']:,} | {summary['test_loss']:.2e} "
            f"| {published:.2g} | {summary['test_recall']:.2%} "
            f"| {summary['test_exact_recall']:.2%} | {evals} "
            f"| {summary['training_time']['total_seconds'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    """Training losses of all runs over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for result, colour in zip(results, COLOURS, strict=False):
        steps = [record["step"] for record in result["train"]]
        losses = [record["loss"] for record in result["train"]]
        name, published = PUBLISHED[result["recipe"]]
        axes.plot(steps, losses, color=colour, label=f"{name} (published: {published:.2g})")
        axes.axhline(published, color=colour, linestyle=":", linewidth=1)
        switch = [r["step"] for r in result["train"] if r["phase"] == "unrolled"]
        if switch:
            axes.axvline(switch[-1], color="#595959", linewidth=0.8)
            axes.annotate("equilibrium from here", (switch[-1], 0.5), (4, 0),
                          textcoords="offset points", fontsize=8, color="#595959")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("training step (16 sequences)")
    axes.set_ylabel("training loss (nats per position)")
    axes.set_title("Copy memory, T = 400; dotted: published")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the runs named on the command line; write JSON, picture and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    results = [gather(run) for run in parser.parse_args().runs]
    order = list(PUBLISHED)
    results.sort(key=lambda result: order.index(result["recipe"]))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for result in results:
        path = FOLDER / f"{result['recipe'].removeprefix('copy-memory-')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    draw(results, IMAGES / "copy-memory.png")
    (FOLDER / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
