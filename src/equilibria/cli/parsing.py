"""Command-line flags from typed dataclasses, by tyro."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from equilibria import registry
from equilibria.core.errors import UserError, nearest

Config = TypeVar("Config")


def parse(default: Config, arguments: Sequence[str], prog: str, description: str) -> Config:
    """Override `default` by flags; every field of the dataclass tree is one.

    Hyphens and underscores are the same. An unknown flag or value ends the program with code 2
    and names the nearest valid one.
    """
    try:
        return tyro.cli(
            type(default),
            default=default,
            args=list(arguments),
            prog=prog,
            description=description,
            registry=_registry(),
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _registry() -> ConstructorRegistry:
    """Teach tyro to read plug-ins such as "anderson(history_size=8)", and to name near choices."""
    rules = ConstructorRegistry()

    @rules.primitive_rule
    def plugin_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:  # pyright: ignore[reportUnusedFunction]
        kind = _plugin_kind(info.type)
        if kind is None:
            return None
        optional = get_origin(info.type) in (Union, types.UnionType)

        def read(words: list[str]) -> Any:
            if optional and words[0].lower() == "none":
                return None
            return registry.parse(kind, words[0])

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper() + ("|None" if optional else ""),
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
            str_from_instance=lambda value: ["None" if value is None else registry.describe(value)],
        )

    @rules.primitive_rule
    def choice_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:  # pyright: ignore[reportUnusedFunction]
        choices = get_args(info.type)
        if get_origin(info.type) is not Literal or not all(isinstance(c, str) for c in choices):
            return None

        def read(words: list[str]) -> str:
            if words[0] not in choices:
                raise ValueError(
                    f"{words[0]!r} is not one of {', '.join(choices)}{nearest(words[0], choices)}"
                )
            return words[0]

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(choices) + "}",
            instance_from_str=read,
            is_instance=lambda value: value in choices,
            str_from_instance=lambda value: [value],
        )

    return rules


def _plugin_kind(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((kind for kind in registry.KINDS if kind in options), None)


def long_names(words: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """A command line with the names of options that have a shorter one."""
    parts = (word.partition("=") for word in words)
    return [short.get(name, name) + equals + value for name, equals, value in parts]
