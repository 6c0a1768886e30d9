"""Recipes: one file per experiment, each a function that returns a full configuration.

The only place where a model meets a data set. A recipe's name is its file's name with hyphens;
its module docstring says what it trains, what to expect, and where the number is from.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from equilibria.core.errors import UserError, nearest
from equilibria.train.experiment import Experiment

DEFAULT = "pydoc-characters"


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Args:
        name: as given on the command line.
        description: what it trains; the first line of the module's docstring.
        expected: the number to expect and its source.
        experiment: the configuration.
    """

    name: str
    description: str
    expected: str
    experiment: Experiment


def names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def load(name: str) -> Recipe:
    """Return a recipe by name; hyphens and underscores are the same.

    Raises:
        UserError: no recipe has that name.
    """
    known = names()
    plain = name.lower().replace("_", "-")
    if plain not in known:
        raise UserError(
            f"no recipe is called {name!r}{nearest(plain, known)}; 'equilibria recipes' lists them"
        )
    module = importlib.import_module(f"{__name__}.{plain.replace('-', '_')}")
    return Recipe(
        name=plain,
        description=(module.__doc__ or "").strip().splitlines()[0].rstrip("."),
        expected=module.EXPECTED,
        experiment=module.recipe(),
    )
