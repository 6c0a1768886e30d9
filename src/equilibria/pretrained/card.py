"""The model card: what a run was, in Markdown with the front matter that the hub reads.

Made of what the run folder says, and of nothing that tells where or by whom it was run: options
that are paths are left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equilibria.train.config_file import to_json
from equilibria.train.experiment import Experiment

_FIGURES = {
    "test_loss": ("loss, nats per token", 4),
    "test_perplexity": ("perplexity", 3),
    "test_bits_per_character": ("bits per character", 4),
    "test_bits_per_token": ("bits per token", 4),
    "test_recalled": ("symbols recalled", 4),
}
_BASELINES = ("baseline_bits_per_character", "baseline_bits_per_token", "baseline_losses")


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Args:
        recipe: the name of the recipe.
        description: what it trains.
        step: of the checkpoint.
        experiment: all options.
        environment: what the run folder recorded of machine, versions and data.
        summary: the final figures; empty of a run that was not finished.
        num_parameters: of the model.
        is_text: whether the model goes on with a text.
        is_converted: whether 'equilibria convert' has made the run, of weights from elsewhere.
    """

    recipe: str
    description: str
    step: int
    experiment: Experiment
    num_parameters: int
    is_text: bool
    is_converted: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])


def card(facts: Facts) -> str:
    """The card as text."""
    sections = (
        _front_matter(facts),
        f"# {facts.recipe}" + ("" if facts.is_converted else f"\n\n{facts.description}."),
        _about(facts),
        _figures(facts),
        _data(facts),
        _loading(facts),
        _environment(facts),
        _configuration(facts),
    )
    return "\n\n".join(sections) + "\n"


def without_paths(config: Any) -> Any:
    """A configuration as JSON values, but for what is a path: that of a machine, not of a model."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return to_json(config)
    values: dict[str, Any] = {}
    plain = to_json(config)
    if not isinstance(plain, dict):  # a plug-in, which is its description
        return plain
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if not isinstance(value, Path):
            values[option.name] = without_paths(value)
    return values


def _front_matter(facts: Facts) -> str:
    tags = ["equilibria", "deep-equilibrium-model" if _has_solve(facts) else "explicit-model"]
    lines = ["---", "library_name: equilibria", "tags:", *(f"- {tag}" for tag in tags)]
    if facts.is_text:
        lines.append("pipeline_tag: text-generation")
    return "\n".join([*lines, "---"])


def _has_solve(facts: Facts) -> bool:
    return hasattr(facts.experiment.model, "solve")


def _about(facts: Facts) -> str:
    kind = type(facts.experiment.model).__name__.removesuffix("Config")
    if facts.is_converted:
        return (
            f"A {kind} of {facts.num_parameters:,} parameters, converted by equilibria from a "
            f"checkpoint of another code base. What is not in that is as in the recipe "
            f"{facts.recipe}; the figures that the recipe expects are not of this model."
        )
    return (
        f"A {kind} of {facts.num_parameters:,} parameters, trained with equilibria (step "
        f"{facts.step} of {facts.experiment.train.num_steps}, seed {facts.experiment.seed})."
    )


def _figures(facts: Facts) -> str:
    if facts.is_converted:
        return "## Figures\n\nNothing was measured since the conversion."
    if not facts.summary:
        return "## Figures\n\nThe run was not finished; nothing was measured on the test split."
    rows = [
        (name, f"{facts.summary[key]:.{digits}f}")
        for key, (name, digits) in _FIGURES.items()
        if isinstance(facts.summary.get(key), float)
    ]
    rows += [
        (f"{name}, baseline {key.removeprefix('baseline_').replace('_', ' ')}", f"{value:.4f}")
        for key in _BASELINES
        for name, value in (facts.summary.get(key) or {}).items()
    ]
    text = "## Figures\n\nTest split, best checkpoint on the validation split.\n\n"
    return text + _table(("measure", "value"), rows) + _solves(facts)


def _solves(facts: Facts) -> str:
    """Function evaluations and residuals at evaluation, which belong to every score of a DEQ."""
    solves = facts.summary.get("test_solves")
    if not solves:
        return ""
    rows = [
        ("function evaluations (NFE)", *(f"{solves['num_evals'][k]:.1f}" for k in ("mean", "p95"))),
        ("relative residual", *(f"{solves['relative_residual'][k]:.1e}" for k in ("mean", "p95"))),
    ]
    return "\n\n" + _table(("equilibria of the test", "mean", "95th percentile"), rows)


def _data(facts: Facts) -> str:
    data = facts.environment.get("data") or {}
    rows = [(f"{name}".replace("_", " "), f"`{_plain(value)}`") for name, value in data.items()]
    return "## Data\n\n" + _table(("", ""), rows) if rows else "## Data\n\nNot recorded."


def _loading(facts: Facts) -> str:
    code = [
        "from equilibria.pretrained import Pretrained",
        "",
        'pretrained = Pretrained.from_pretrained("FOLDER")  # or OWNER/NAME on the hub',
        "pretrained.model  # a torch.nn.Module in eval mode",
    ]
    command = ""
    if facts.is_text:
        code.append('print(pretrained.generate("Once upon"))')
        command = '\n\nor `equilibria generate FOLDER --prompt "Once upon"`.'
    return "## How to load\n\n```python\n" + "\n".join(code) + "\n```" + command


def _environment(facts: Facts) -> str:
    known = {k: v for k, v in facts.environment.items() if k not in ("data", "packages")}
    known.update(facts.environment.get("packages") or {})
    rows = [(name.replace("_", " "), _plain(value)) for name, value in known.items()]
    return "## Environment\n\n" + (_table(("", ""), rows) if rows else "Not recorded.")


def _configuration(facts: Facts) -> str:
    values = json.dumps(without_paths(facts.experiment), indent=1, ensure_ascii=False)
    return f"## Configuration\n\n```json\n{values}\n```"


def _plain(value: object) -> str:
    """A value that cannot break out of its cell."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return " ".join(str(value).split()).replace("|", "/").replace("`", "'")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
