"""Write the tables of the docs from the results.

    python -m benchmarks.tables [--check]

Everything between the markers `<!-- NAME -->` and `<!-- end NAME -->` is generated; the text around
them is written by hand. With --check nothing is written, and the exit status says whether the
pages are up to date.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, load

DOCS = Path(__file__).parent.parent / "docs"
OURS = "equilibria"
PEERS = ("scipy", "torchdeq", "jaxopt", "optimistix")
RECOMMENDED = ("Anderson()", "Anderson(20)")

Counts = Sequence[int | None]
Results = Mapping[str, Sequence[Counts]]
"""Of one family: for each solver and instance the evaluations to each tolerance."""
Rank = tuple[int, float]
"""Unsolved instances, and the median over all with the unsolved at infinity; less is better."""


def _copy_memory() -> str:
    return (RESULTS / "copy_memory" / "table.md").read_text()


def causal_solves(result: dict[str, Any]) -> str:
    """Evaluations per part by its length, forward to two tolerances, and products backward."""
    lengths = sorted({row["length"] for row in result["rows"]})
    kinds = dict.fromkeys((row["solver"], row.get("rtol")) for row in result["rows"])
    columns = ["evaluations per part of so many positions", *map(str, lengths)]
    table: list[list[Any]] = []
    for solver, rtol in sorted(kinds, key=lambda kind: (kind[1] is None, -(kind[1] or 0.0))):
        rows = {
            r["length"]: r for r in result["rows"] if (r["solver"], r.get("rtol")) == (solver, rtol)
        }
        what = f"`{solver}`, " + (
            "products backward, to 1e-2" if rtol is None else f"to {rtol:.0e}"
        )
        numbers = [
            rows[length].get("evaluations", rows[length].get("products")) for length in lengths
        ]
        table.append([what.replace("e-0", "e-"), *(f"{number:.1f}" for number in numbers)])
    return _table(columns, table)


def _words() -> str:
    """A row per finished run, by text."""
    columns = ["recipe", "parameters", "test perplexity", "best validation"]
    columns += ["evaluations in training / test", "hours", "peak GiB"]
    table: list[list[Any]] = []
    for path in sorted((RESULTS / "language_models").glob("*.json")):
        result = json.loads(path.read_text())
        summary = result["summary"]
        solves = [summary[f"{when}_solves"] for when in ("training", "test")]
        evals = " / ".join("-" if s is None else f"{s['num_evals']['mean']:.1f}" for s in solves)
        best = min(record["loss"] for record in result["valid"])
        table.append(
            [
                f"`{result['recipe']}`",
                f"{summary['num_parameters']:,}",
                f"{summary['test_perplexity']:.1f}",
                f"{math.exp(best):.1f}",
                evals,
                f"{summary['training_time']['total_seconds'] / 3600:.2f}",
                f"{summary['peak_memory_mib'] / 1024:.2f}",
            ]
        )
    return _table(columns, table)


def _corpus(result: dict[str, Any]) -> str:
    columns = ["103 million tokens, 267,735 words", "seconds", "memory, MiB", "per segment"]
    rows = [
        [
            f"{name}, a text of {result['text_mib']:,} MiB" if key == "first" else name,
            f"{result[key]['seconds']:.1f}",
            f"{result[key]['mib']:.0f}",
            f"{result[key]['microseconds_per_segment']:.0f} microseconds",
        ]
        for key, name in (("first", "encode and open"), ("again", "open again"))
    ]
    return _table(columns, rows)


def _long_run(result: dict[str, Any]) -> str:
    """A row per model: memory of its goes, files, size of the folder."""
    columns = ["model", "steps", "memory in MiB, three goes", "most files", "run folder, MiB"]
    rows = [
        [
            name,
            f"{row['steps']:,}",
            "; ".join(f"{c['mib_at_first']:.0f} to {c['mib_at_last']:.0f}" for c in row["chunks"]),
            str(row["most_files"]),
            f"{row['folder_mib']:.1f}",
        ]
        for name, row in result["models"].items()
    ]
    return _table(columns, rows)


def _generation(result: dict[str, Any]) -> str:
    """A row per model and length; times of others over those with a cache."""
    ways = {"memory": "projected anew", "recomputed": "read again", "cached, 16 texts": "16 texts"}
    columns = ["recipe", "tokens read", "cached, ms", *ways.values()]
    columns += ["evaluations cached / read again / from the last", "difference, nats"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        ratios = [row["ratios"][f"{way} / cached"]["median"] for way in ways]
        evals = row["num_evals"]
        shown = "-" if evals is None else " / ".join(f"{value:.1f}" for value in evals.values())
        rows.append(
            [
                f"`{row['name']}`",
                f"{row['length']:,}",
                f"{row['milliseconds']['cached']['median']:.3g}",
                *(f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}" for ratio in ratios),
                shown,
                f"{row['difference']:.1e}",
            ]
        )
    return _table(columns, rows)


def main() -> None:
    """Regenerate the pages, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for page, sections in PAGES.items():
        path = DOCS / page
        old = path.read_text()
        new = regenerated(old, page, sections)
        if check and new != old:
            sys.exit(f"docs/{page} is not what the results say; run make bench-tables")
        path.write_text(new)


def regenerated(text: str, page: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """A page with its generated sections made anew."""
    for name, make in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        made = make()
        text, found = re.subn(
            pattern, lambda match, made=made: match[1] + made + match[2], text, flags=re.DOTALL
        )
        if found != 1:
            sys.exit(f"docs/{page} has no section between the markers of {name!r}")
    return text


# --- forward -----------------------------------------------------------------------------------


def _forward() -> tuple[dict[str, Results], dict[str, dict[str, Results]]]:
    """Counts by family, of ours and of every library of others."""

    def read(library: str) -> dict[str, Results]:
        return {
            family: {
                name: [instance["evaluations"] for instance in instances]
                for name, instances in solvers.items()
                if "skipped" not in instances[0]
            }
            for family, solvers in load(f"evaluations_{library}")["counts"].items()
        }

    return read(OURS), {library: read(library) for library in PEERS}


def summary() -> str:
    """Families x tolerances: best of ours, what we recommend, best of the others."""
    ours, libraries = _forward()
    choices = {"best of ours": list(next(iter(ours.values()))), **{n: [n] for n in RECOMMENDED}}
    rows: list[list[str]] = []
    pairs: dict[str, list[list[tuple[Rank, Rank]]]] = {name: [] for name in choices}
    for family, results in ours.items():
        others = {name: r for library in libraries.values() for name, r in library[family].items()}
        row = [family]
        for choice, names in choices.items():
            mine = {name: results[name] for name in names}
            pairs[choice].append(list(zip(_bests(mine), _bests(others), strict=True)))
            row.append(_three(mine))
        rows.append([*row, _three(others), _winner(others)])
    for title, judge in {
        "no more than the best of others": _wins,
        "times the best": _ratios,
    }.items():
        rows.append([f"**{title}**", *(judge(p) for p in pairs.values()), "", ""])
    columns = ["family", *map(_code, choices), "best of others", "which is, at 1e-6"]
    return _table(columns, rows)


def _wins(families: list[list[tuple[Rank, Rank]]]) -> str:
    """Families in which ours solves as many and needs no more, at each tolerance and at all."""
    held = [[mine[0] <= theirs[0] and mine[1] <= theirs[1] for mine, theirs in f] for f in families]
    each = " / ".join(str(sum(column)) for column in zip(*held, strict=True))
    return f"{each}, all three {sum(map(all, held))} of {len(held)}"


def _ratios(families: list[list[tuple[Rank, Rank]]]) -> str:
    """Geometric mean over the families that both solve, at each tolerance."""
    means: list[str] = []
    for column in zip(*families, strict=True):
        ratios = [a[1] / b[1] for a, b in column if max(a[1], b[1]) < float("inf")]
        means.append(f"{statistics.geometric_mean(ratios):.2f}")
    return " / ".join(means)


def solved() -> str:
    """How many instances each of ours and each library solve to the tightest tolerance."""
    ours, libraries = _forward()
    columns = ["family", OURS, *(f"`{name}`" for name in RECOMMENDED), *PEERS]
    rows = [
        [
            family,
            _solved(results),
            *(_solved({name: results[name]}) for name in RECOMMENDED),
            *(_solved(libraries[library][family]) for library in PEERS),
        ]
        for family, results in ours.items()
    ]
    return _table(columns, rows)


def one_for_all() -> str:
    """Every solver as the only one: what it solves, and its cost relative to the best of all."""
    ours, libraries = _forward()
    budget = load(f"evaluations_{OURS}")["budget"]
    everything = {OURS: ours, **libraries}
    best = {
        family: _bests({n: r for counts in everything.values() for n, r in counts[family].items()})
        for family in ours
    }
    lines: list[tuple[float, list[str]]] = []
    for counts in everything.values():
        for name in _solver_names(counts):
            families = [family for family in ours if name in counts[family]]
            if len(families) < len(ours):
                continue  # dense methods, which cannot do them all
            ranks = [(_bests({name: counts[f][name]}), best[f]) for f in families]
            costs = [
                statistics.geometric_mean(
                    min(mine[t][1], budget) / least[t][1] for mine, least in ranks
                )
                for t in range(len(ranks[0][0]))
            ]
            solved = sum(r[-1] is not None for f in families for r in counts[f][name])
            shown = " / ".join(f"{cost:.2f}" for cost in costs)
            lines.append((math.prod(costs), [_code(name), str(solved), shown]))
    columns = ["solver", "instances solved to 1e-6", "evaluations, times the best of all"]
    return _table(columns, [row for _, row in sorted(lines)])


def every_solver() -> str:
    """Medians of every solver on every family, to the tightest tolerance."""
    ours, libraries = _forward()
    families = list(ours)
    everything = {OURS: ours, **libraries}
    rows = [
        [_code(name)]
        + [
            _text(_rank([instance[-1] for instance in counts[family][name]]))
            if name in counts[family]
            else "not run"
            for family in families
        ]
        for library, counts in everything.items()
        for name in _solver_names(counts)
    ]
    return _table(["solver", *families], rows)


def _solver_names(counts: dict[str, Results]) -> list[str]:
    return list(dict.fromkeys(name for family in counts.values() for name in family))


def _bests(results: Results) -> list[Rank]:
    """At each tolerance, of the solver that leaves fewest unsolved, then has the lowest median."""
    number = len(next(iter(results.values()))[0])
    return [
        min(_rank([instance[tolerance] for instance in r]) for r in results.values())
        for tolerance in range(number)
    ]


def _rank(counts: Counts) -> Rank:
    """Unsolved instances, then the median with those at infinity."""
    missing = sum(count is None for count in counts)
    median = statistics.median(float("inf") if count is None else count for count in counts)
    return missing, median


def _three(results: Results) -> str:
    return " / ".join(_text(rank) for rank in _bests(results))


def _winner(results: Results) -> str:
    return min(results, key=lambda name: _rank([instance[-1] for instance in results[name]]))


def _solved(results: Results) -> str:
    """Instances that some solver of these gets to the tightest tolerance."""
    instances = range(max(len(r) for r in results.values()))
    return str(sum(any(r[i][-1] is not None for r in results.values()) for i in instances))


# --- backward ----------------------------------------------------------------------------------


def backward() -> str:
    """Medians of products with J^T, every solver on every family."""
    results = load("backward")
    names = [name for solvers in results["libraries"].values() for name in solvers]
    rows = [
        [family, *(_three({name: counts[name]}) for name in names)]
        for family, counts in results["counts"].items()
    ]
    return _table(["family", *(f"`{name}`" for name in names)], rows)


# --- about -------------------------------------------------------------------------------------


def about() -> str:
    """Commands, machine and versions."""
    lines: list[str] = []
    for name in [*(f"evaluations_{library}" for library in (OURS, *PEERS)), "backward"]:
        result = load(name)
        packages = ", ".join(f"{p} {v}" for p, v in result["versions"].items() if v)
        lines.append(
            f"- `results/{name}.json`: `{result['command']}`; {result['machine']}; Python "
            f"{result['python']}; {packages}; seeds {result['seeds'][0]} to "
            f"{result['seeds'][-1]}; at most {result['budget']} evaluations.\n"
        )
    return "".join(lines)


def families() -> str:
    """What the families are."""
    names = load(f"evaluations_{OURS}")["families"]
    return _table(["family", "what it is"], [[name, about] for name, about in names.items()])


# --- how to choose -----------------------------------------------------------------------------


def solvers() -> str:
    """Our solvers: what they solve of all instances, and at what cost."""
    ours, _ = _forward()
    budget = load(f"evaluations_{OURS}")["budget"]
    rows: list[tuple[float, list[str]]] = []
    for name in _solver_names(ours):
        counts = [r for family in ours.values() for r in family[name]]
        solved = [sum(r[t] is not None for r in counts) for t in range(3)]
        means = [
            statistics.geometric_mean(budget if r[t] is None else r[t] for r in counts)
            for t in range(3)
        ]
        each = " / ".join(f"{mean:.0f}" for mean in means)
        rows.append((means[-1], [_code(name), " / ".join(map(str, solved)), each]))
    total = sum(len(next(iter(family.values()))) for family in ours.values())
    columns = ["solver", f"solved, of {total}", "evaluations, geometric mean"]
    return _table(columns, [row for _, row in sorted(rows)])


def linear_solvers() -> str:
    """Linear solvers for the backward system: what they solve, and at what cost."""
    results = load("backward")
    rows: list[tuple[float, list[str]]] = []
    for name in results["libraries"][OURS]:
        counts = [r for family in results["counts"].values() for r in family[name]]
        solved = [sum(r[t] is not None for r in counts) for t in range(3)]
        means = [
            statistics.geometric_mean(results["budget"] if r[t] is None else r[t] for r in counts)
            for t in range(3)
        ]
        each = " / ".join(f"{mean:.0f}" for mean in means)
        rows.append((means[-1], [_code(name), " / ".join(map(str, solved)), each]))
    total = sum(len(next(iter(family.values()))) for family in results["counts"].values())
    columns = ["solver", f"solved, of {total}", "products with J^T, geometric mean"]
    return _table(columns, [row for _, row in sorted(rows)])


def gradients() -> str:
    """Cost and bias of every gradient method over the spectral radius."""
    rows = load("gradients")["rows"]
    radii = list(dict.fromkeys(row["spectral_radius"] for row in rows))
    table: dict[str, list[str]] = {}
    for row in rows:
        error, products = row["error"], row["products"]
        table.setdefault(row["method"], []).append(f"{error:.0e} ({products:.0f})")
    columns = ["method", *(f"radius {radius}" for radius in radii)]
    return _table(columns, [[_code(name), *cells] for name, cells in table.items()])


# --- performance -------------------------------------------------------------------------------

PERFORMANCE = (
    "overhead",
    "profile_step",
    "training_step",
    "mixed_difficulty",
    "memory",
    "rounded_history",
    "scaling",
)
EQUAL = " at equal residual"
Spread = Mapping[str, float]


def _measured(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """A section made of results/NAME.json, or of the words that there is none."""

    def section() -> str:
        result = load(name) if (RESULTS / f"{name}.json").exists() else {}
        if "device" not in result:  # none, or one of an earlier form of the benchmark
            return f"Not measured yet: `python -m benchmarks.{name}`.\n"
        return make(result)

    return section


def overhead_steps(result: dict[str, Any]) -> str:
    """Microseconds per step of every solver over the shapes, and times the floor."""
    rows = [row for row in result["rows"] if "picard" in row["microseconds_per_step"]]
    names = dict.fromkeys(name for row in rows for name in row["microseconds_per_step"])
    table = [[name, *(_overhead(row, name) for row in rows)] for name in names]
    return _table(["microseconds per step (times the floor)", *map(_shape, rows)], table)


def overhead_ratios(result: dict[str, Any]) -> str:
    """Overhead of the peers over ours."""
    rows = [row for row in result["rows"] if "picard" in row["microseconds_per_step"]]
    pairs = dict.fromkeys(pair for row in rows for pair in row["ratios"])
    table = [[pair, *(_spread(row["ratios"].get(pair)) for row in rows)] for pair in pairs]
    return _table(["overhead, median (quartiles)", *map(_shape, rows)], table)


def overhead_sweep(result: dict[str, Any]) -> str:
    """Anderson over the history at the shape of the sweep."""
    swept = [row for row in result["rows"] if "picard" not in row["microseconds_per_step"]]
    if not swept:
        return "Not measured yet: `python -m benchmarks.overhead`.\n"
    shape = _shape(swept[0])
    rows = sorted(
        (row for row in result["rows"] if _shape(row) == shape), key=lambda row: row["history"]
    )
    names = swept[0]["microseconds_per_step"]
    columns = [f"{shape}, history", *(str(row["history"]) for row in rows)]
    return _table(columns, [[name, *(_overhead(row, name) for row in rows)] for name in names])


def _shape(row: Mapping[str, Any]) -> str:
    return f"{row['batch']} x {row['width']:,}"


def _overhead(row: Mapping[str, Any], name: str) -> str:
    if name not in row["microseconds_per_step"]:
        return ""
    median = row["microseconds_per_step"][name]["median"]
    text = f"{median:,.0f}" if median >= 1000 else f"{median:.3g}"
    floor = row["over_floor"].get(name)
    return text if floor is None else f"{text} ({floor['median']:.3g})"


def training(result: dict[str, Any]) -> str:
    """One table per cell: time, cost and what is reached."""
    return "\n".join(_training_table(row) for row in result["rows"])


def _training_table(row: Mapping[str, Any]) -> str:
    columns = [
        "method", "ms", "over ours", "evaluations / products", "worst residual, forward / backward",
        "error of the gradient", "peak MiB",
    ]  # fmt: skip
    table: list[list[str]] = []
    for name, spread in row["milliseconds"].items():
        cost = row["reached"].get(name, {})
        table.append(
            [
                name,
                f"{spread['median']:.4g}",
                _spread(row["ratios"].get(f"{name} / {row['mine']}")),
                f"{cost['evaluations']:.0f} / {cost['products']:.0f}" if cost else "",
                f"{cost['residual']:.1e} / {cost['backward_residual']:.1e}" if cost else "",
                f"{cost['gradient_error']:.1e}" if cost else "",
                f"{cost['peak_mib']:.3g}" if cost else "",
            ]
        )
    missed = [name for name, found in row["tolerances_at_equal_residual"].items() if found is None]
    floor = _spread(row["ratios"][f"{row['mine']} / floor"])
    notes = f"{row['mine']} over the floor: {floor}."
    if missed:
        notes += f" Not at equal residual within the step limit: {', '.join(missed)}."
    return f"**{row['about']}**\n\n{_table(columns, table)}\n{notes}\n"


def explicit(result: dict[str, Any]) -> str:
    """The DEQ beside explicit models of equal parameters."""
    table: list[list[str]] = []
    for row in result["rows"]:
        if "explicit" not in row:
            continue
        mine = {
            "milliseconds": row["milliseconds"][row["mine"]],
            "parameters": row["parameters"],
            "peak_mib": row["reached"][row["mine"]]["peak_mib"],
        }
        for name, model in {f"DEQ, {row['mine']}": mine, **row["explicit"]}.items():
            table.append(
                [
                    row["about"],
                    name,
                    f"{model['parameters']:,}",
                    f"{model['milliseconds']['median']:.4g}",
                    f"{model['peak_mib']:.4g}",
                ]
            )
    return _table(["block", "model", "parameters", "ms", "peak MiB"], table)


def difficulty(result: dict[str, Any]) -> str:
    """One table per map: time and rows."""
    parts: list[str] = []
    for row in result["results"]:
        table: list[list[str]] = []
        for name, spread in row["milliseconds"].items():
            cost = row["rows"].get(name, {})
            table.append(
                [
                    name,
                    f"{spread['median']:.4g}",
                    _spread(row["ratios"].get(f"{name} / {row['mine']}")),
                    f"{cost['evaluated']:,}" if cost else "",
                    str(cost.get("evaluated_over_useful", "")),
                    f"{cost['residual']:.1e}" if cost else "",
                ]
            )
        columns = ["method", "ms", "over the first", "rows", "over useful rows", "worst residual"]
        steps = next(iter(row["rows"].values()))["steps_quartiles"]
        quartiles = ", ".join(f"{step:.0f}" for step in steps)
        parts.append(
            f"**{row['about']}**; steps of the samples, from least to most by quartiles: "
            f"{quartiles}\n\n{_table(columns, table)}"
        )
    return "\n".join(parts)


def memory_training(result: dict[str, Any]) -> str:
    """Peak of a training step over the number of steps."""
    return _over_steps("training step", result["training"])


def memory_solving(result: dict[str, Any]) -> str:
    """Peak of a solve over the number of steps."""
    return _over_steps("solve without gradients", result["solving"])


def _over_steps(title: str, methods: Mapping[str, Mapping[str, float]]) -> str:
    steps = [key for key in next(iter(methods.values())) if key != "growth"]
    columns = [f"{title}, copies of the state at", *(f"{n} steps" for n in steps), "growth"]
    rows = [
        [name, *(f"{peaks[n]:.4g}" for n in steps), f"{peaks['growth']:.4g}"]
        for name, peaks in methods.items()
    ]
    return _table(columns, rows)


def memory_history(result: dict[str, Any]) -> str:
    """Peak of a solve over its history."""
    columns = ["solver", "steps", "history, states", "peak, states", "peak over history"]
    rows = [
        [
            f"`{row['solver']}`",
            row["variant"],
            row["history_states"],
            row["peak_states"],
            row["peak_over_history"],
        ]
        for row in result["histories"]
    ]
    return _table(columns, rows)


def rounded_history(result: dict[str, Any]) -> str:
    """Evaluations with a rounded history over those with a plain one, and what is solved."""
    columns = ["solver", "to", "solved, plain", "solved, rounded", "evaluations, rounded / plain"]
    columns.append("families beyond 1.1")
    table: list[list[Any]] = []
    for solver in dict.fromkeys(row["solver"] for row in result["rows"]):
        families = [row for row in result["rows"] if row["solver"] == solver]
        for i, tolerance in enumerate(result["tolerances"]):
            pairs = {
                row["family"]: [
                    (p[i], r[i]) for p, r in zip(row["plain"], row["rounded"], strict=True)
                ]
                for row in families
            }
            ratios = {name: _evaluations_ratio(both) for name, both in pairs.items()}
            every = [pair for both in pairs.values() for pair in both]
            beyond = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1.1]
            solved = [sum(pair[j] is not None for pair in every) for j in (0, 1)]
            total = f"{_evaluations_ratio(every):.3f}"
            table.append([_code(solver), f"{tolerance:g}", *solved, total, ", ".join(beyond)])
    return _table(columns, table)


def _evaluations_ratio(pairs: Sequence[tuple[int | None, int | None]]) -> float:
    """Of the sums, over instances that both solve; NaN where there are none."""
    both = [(p, r) for p, r in pairs if p is not None and r is not None]
    return sum(r for _, r in both) / sum(p for p, _ in both) if both else math.nan


def profile_step(result: dict[str, Any]) -> str:
    """Operators of a step by kind, and what factorisations take by themselves."""
    kinds = list(next(iter(result["profiles"].values()))["shares"])
    rows = [
        [name, row["operators"], *(f"{100 * row['shares'].get(kind, 0):.0f} %" for kind in kinds)]
        for name, row in result["profiles"].items()
    ]
    alone = [
        [f"{result['batch']} systems of {n}", *(f"{case['median']:.3g}" for case in cases.values())]
        for n, cases in result["isolated"].items()
    ]
    names = list(next(iter(result["isolated"].values())))
    return (
        _table([f"a step at {result['batch']} x {result['width']}", "operators", *kinds], rows)
        + "\n"
        + _table(["microseconds, alone", *names], alone)
    )


def scaling(result: dict[str, Any]) -> str:
    """Exponents, and the peers' time over ours at the largest value."""
    rows = result["rows"]
    names = dict.fromkeys(name for row in rows for name in row["exponents"])
    columns = ["exponent (times ours at the largest)", *(row["dimension"] for row in rows)]
    table: list[list[str]] = []
    for name in names:
        cells: list[str] = []
        for row in rows:
            last = row["points"][-1]
            pair = next((p for p in last["ratios"] if p.startswith(f"{name} / ")), None)
            exponent = row["exponents"].get(name)
            shown = "" if exponent is None else f"{exponent:.2f}"
            cells.append(f"{shown} ({last['ratios'][pair]['median']:.3g})" if pair else shown)
        table.append([name, *cells])
    return _table(columns, table)


def gpus() -> str:
    """What there is of every GPU."""
    folders = sorted(path for path in (RESULTS / "gpu").glob("*") if path.is_dir())
    if not folders:
        return (
            "Nothing has been measured on a GPU yet. What is to be run is in "
            "`benchmarks/gpu/README.md`.\n"
        )
    return "\n".join(f"**{folder.name}**\n\n{_gpu(folder)}" for folder in folders)


def _gpu(folder: Path) -> str:
    steps: list[list[str]] = []
    shares: list[list[str]] = []
    for name in ("training_step", "wt103_block", "tiny_and_mdeq"):
        if not (folder / f"{name}.json").exists():
            continue
        for row in load(name, folder)["rows"]:
            mine, peer = row["mine"], row["best_peer_at_equal_residual"]
            steps.append(
                [
                    f"{row['about']}, {row['name']}",
                    f"{row['milliseconds'][mine]['median']:.4g}",
                    "" if peer is None else peer.removesuffix(EQUAL),
                    "" if peer is None else _spread(row["ratios"][f"{peer} / {mine}"]),
                    _spread(row["ratios"][f"{mine} / floor"]),
                ]
            )
            shares += [
                [row["name"], solver, _spread(share)]
                for solver, share in row.get("share_of_f", {}).items()
            ]
    columns = ["training step", "ours, ms", "best peer at equal residual", "over ours"]
    text = _table([*columns, "ours over the floor"], steps) if steps else ""
    if shares:
        text += "\n" + _table(["WikiText-103-size block", "solver", "solver over f"], shares)
    files = ", ".join(f"`{path.name}`" for path in sorted(folder.glob("*.json")))
    return f"{text}\nResults: {files}.\n"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"


def about_performance() -> str:
    """Commands, machine and versions of what has been measured."""
    lines: list[str] = []
    for name in PERFORMANCE:
        result = load(name) if (RESULTS / f"{name}.json").exists() else {}
        if "device" not in result:
            continue
        packages = ", ".join(f"{p} {v}" for p, v in result["versions"].items() if v)
        lines.append(
            f"- `results/{name}.json`: `{result['command']}`; commit {result['commit']}, "
            f"{result['date']}; {result['machine']}, {result['threads']} thread; Python "
            f"{result['python']}; {packages}.\n"
        )
    return "".join(lines) or "Nothing has been measured yet: `make bench`.\n"


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "peers.md": {
        "families": families,
        "summary": summary,
        "solved": solved,
        "one for all": one_for_all,
        "every solver": every_solver,
        "backward": backward,
        "about": about,
    },
    "how-to-choose.md": {
        "solvers": solvers,
        "linear solvers": linear_solvers,
        "gradients": gradients,
    },
    "performance.md": {
        "overhead": _measured("overhead", overhead_steps),
        "overhead ratios": _measured("overhead", overhead_ratios),
        "overhead sweep": _measured("overhead", overhead_sweep),
        "profile": _measured("profile_step", profile_step),
        "training": _measured("training_step", training),
        "explicit": _measured("training_step", explicit),
        "difficulty": _measured("mixed_difficulty", difficulty),
        "memory training": _measured("memory", memory_training),
        "memory solving": _measured("memory", memory_solving),
        "memory history": _measured("memory", memory_history),
        "rounded history": _measured("rounded_history", rounded_history),
        "scaling": _measured("scaling", scaling),
        "gpus": gpus,
        "about performance": about_performance,
    },
    "language-models.md": {
        "corpus": _measured("corpus_memory", _corpus),
        "copy memory": _copy_memory,
        "words": _words,
        "causal solves": _measured("causal_solves", causal_solves),
        "generation": _measured("generation", _generation),
    },
    "training.md": {"long run": _measured("long_run", _long_run)},
}


def _text(rank: Rank) -> str:
    missing, median = rank
    number = "-" if median == float("inf") else f"{median:.0f}"
    return number + (f" ({missing} not)" if missing else "")


def _code(name: str) -> str:
    """Names that can be typed, as code."""
    return f"`{name}`" if "(" in name else name


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
