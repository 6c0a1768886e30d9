"""`equilibria recipes`: what can be trained, with the number to expect."""

from __future__ import annotations

from collections.abc import Sequence

from equilibria import recipes
from equilibria.core.errors import UserError


def main(arguments: Sequence[str]) -> int:
    """Print one line per recipe."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: equilibria recipes\n\nLists all recipes with the number to expect.")
        return 0
    if arguments:
        raise UserError(f"recipes takes no arguments, not {arguments[0]!r}")
    known = [recipes.load(name) for name in recipes.names()]
    width = max(len(recipe.name) for recipe in known)
    for recipe in known:
        mark = " (default)" if recipe.name == recipes.DEFAULT else ""
        print(f"{recipe.name:{width}}  {recipe.description}{mark}. Expected: {recipe.expected}")
    return 0
