"""Configurations as JSON and back, without losing a type or executing anything."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cattrs

from equilibria import registry
from equilibria.core.errors import UserError, nearest

Config = TypeVar("Config")
TRUST = "EQUILIBRIA_TRUST"
"""Environment variable: packages, with commas, whose classes a configuration file may name."""


def to_json(config: Any) -> Any:
    """Turn a tree of dataclasses into plain JSON values; plug-ins become their description."""
    if isinstance(config, tuple(registry.KINDS)):
        return registry.describe(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def from_json(default: Config, values: object, path: str = "", *, outside: bool = True) -> Config:
    """Rebuild a configuration from JSON values, on top of a default of the right types.

    Options that the file does not have keep their default, so that old runs stay readable.

    Args:
        default: a configuration of the right types.
        values: what the file says.
        path: of these options inside of the whole, for messages.
        outside: whether plug-ins may be classes of other packages that the user trusts; without,
            of none.

    Raises:
        UserError: an unknown option, or a value of the wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the configuration'} is {values!r}, expected named options")
    hints = get_type_hints(type(default))
    known = [field.name for field in dataclasses.fields(default)]  # pyright: ignore[reportArgumentType]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in known:
            raise UserError(f"unknown option {where!r}{nearest(str(name), known)}")
        current = getattr(default, name)
        if dataclasses.is_dataclass(current) and not isinstance(current, tuple(registry.KINDS)):
            changes[name] = from_json(current, value, where, outside=outside)
        else:
            changes[name] = _leaf(value, hints[name], where, outside)
    return dataclasses.replace(default, **changes)  # pyright: ignore[reportArgumentType, reportReturnType]


def _leaf(value: object, hint: Any, where: str, outside: bool) -> Any:
    try:
        return _CONVERTERS[outside].structure(value, hint)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"option {where!r} cannot be {value!r}; {_expected(hint, value)}"
        ) from error


def _expected(hint: Any, given: object) -> str:
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return f"give one of {', '.join(choices)}{nearest(str(given), choices)}"
    return f"give a value of type {hint.__name__ if isinstance(hint, type) else hint}"


def _make_converter(outside: bool) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    check = _trusted if outside else _ours
    for kind in registry.KINDS:
        converter.register_structure_hook_func(
            lambda hint, kind=kind: hint is kind,
            lambda value, _, kind=kind: registry.parse(kind, check(_strict(str, value))),
        )
    converter.register_structure_hook(Path, lambda value, _: Path(_strict(str, value)))
    converter.register_structure_hook(float, lambda value, _: float(_strict((int, float), value)))
    for plain in (bool, int, str):
        converter.register_structure_hook(
            plain, lambda value, _, plain=plain: _strict(plain, value)
        )
    return converter


def _trusted(description: str) -> str:
    """A plug-in of ours, or of a module that this program or the user has asked for.

    A file may be somebody else's, and to import a module is to run it.

    Raises:
        UserError: it is of another module.
    """
    trusted = os.environ.get(TRUST, "").split(",")
    for module in registry.modules_outside(description):
        if module not in sys.modules and module.partition(".")[0] not in trusted:
            raise UserError(
                f"the configuration wants {description!r}, whose module {module!r} would be "
                f"imported, and run; if you know and trust it, set {TRUST}="
                f"{module.partition('.')[0]}"
            )
    return description


def _ours(description: str) -> str:
    """A plug-in of ours, whatever this program has imported.

    Raises:
        UserError: it is of another module.
    """
    if modules := registry.modules_outside(description):
        raise UserError(
            f"{description!r} names a class outside of equilibria ({modules[0]}); here only names "
            "of ours are read, such as 'anderson(history_size=8)'"
        )
    return description


def _strict(kinds: type | tuple[type, ...], value: Any) -> Any:
    """cattrs would turn "5" and 5.7 into 5; a file of ours holds what it means."""
    if type(value) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
        raise TypeError(value)
    return value


_CONVERTERS = {outside: _make_converter(outside) for outside in (True, False)}
