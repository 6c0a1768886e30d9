"""Names for classes: the only place where a string selects behaviour.

A plug-in's name is the name of its file: `solvers/anderson.py` is "anderson". Hyper-parameters are
written like a call, "anderson(history_size=8)", and nest: "implicit(solver=broyden, rtol=1e-3)".
What is made of several others takes them first: "fallback(anderson, broyden, num_steps=5)". A class
of one's own is "package.module:Class(option=1)", also inside another plug-in. Hyphens and
underscores in names are the same. The text is parsed, never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import Any

from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError, nearest
from equilibria.core.linear import LinearSolver
from equilibria.core.solver import Solver
from equilibria.core.termination import Termination
from equilibria.core.warm_start import WarmStart

KINDS: dict[type, str] = {
    Solver: "equilibria.solvers",
    LinearSolver: "equilibria.linear",
    Termination: "equilibria.terminations",
    Adjoint: "equilibria.adjoints",
    WarmStart: "equilibria.warm_starts",
}
"""Base class of each kind of plug-in, and the package whose files are the plug-ins."""


def names(kind: type) -> list[str]:
    """Names of all plug-ins of a kind, sorted."""
    package = importlib.import_module(KINDS[kind])
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(kind: type, name: str) -> type:
    """Return the class behind a name, or behind "package.module:Class".

    Raises:
        UserError: nothing has that name; the message has the nearest one and the full list.
    """
    if ":" in name:
        return _find_outside([kind], name)
    file = _file_of(kind, name)
    if file is None:
        known = names(kind)
        raise UserError(
            f"no {kind.__name__} is called {name!r}{nearest(name, known)} "
            f"(there are: {', '.join(known)})"
        )
    module = importlib.import_module(f"{KINDS[kind]}.{file}")
    for item in vars(module).values():
        if (
            isinstance(item, type)
            and issubclass(item, kind)
            and item.__module__ == module.__name__
            and _squashed(item.__name__) == _squashed(file)
        ):
            return item
    raise UserError(
        f"{module.__name__} defines no {kind.__name__} of its own name; the class in {file}.py is "
        f"to be called {file.title().replace('_', '')}, in any spelling with capitals"
    )


def parse(kind: type, text: str) -> Any:
    """Build a plug-in from its description, for example "anderson(history_size=8)".

    Raises:
        UserError: malformed text, an unknown name or option, or a value the class refuses.
    """
    return _build([kind], _tree(text), text)


def modules_outside(text: str) -> list[str]:
    """Modules that `parse` would import for a description: those of classes of one's own.

    Raises:
        UserError: malformed text.
    """
    dotted = [node for node in ast.walk(_tree(text)) if isinstance(node, ast.Attribute)]
    return [ast.unparse(node.value) for node in dotted]


def describe(plugin: Any) -> str:
    """The text from which `parse` rebuilds the plug-in: name and all options."""
    cls = type(plugin)
    parts = _parts_of(cls)
    described = list(map(_describe_value, getattr(plugin, parts))) if parts else []
    described += [f"{name}={_describe_value(getattr(plugin, name))}" for name in _options_of(cls)]
    options = ", ".join(described)
    inside = any(cls.__module__.startswith(package + ".") for package in KINDS.values())
    module = cls.__module__
    name = module.rpartition(".")[2] if inside else f"{module}:{cls.__name__}"
    return f"{name}({options})" if options else name


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(_as_python(text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{text!r} cannot be read; write a name, or a name with options such as "
            "'anderson(history_size=8)'"
        ) from error


_QUOTED_OR_MARK = re.compile(
    r"""(?P<quoted>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"|(?P<colon>(?<=\w):(?=[A-Za-z_]))"
    r"|(?<=[A-Za-z])-(?=[A-Za-z])"
)


def _as_python(text: str) -> str:
    """Write "module:Class" as "module.Class" and "one-step" as "one_step", except in quotes."""
    return _QUOTED_OR_MARK.sub(lambda m: m["quoted"] or ("." if m["colon"] else "_"), text)


def _build(kinds: list[type], node: ast.expr, text: str) -> Any:
    function, parts, arguments = node, [], []
    if isinstance(node, ast.Call):
        function, parts, arguments = node.func, node.args, node.keywords
    cls = _find_in(kinds, function, text)
    if parts and _parts_of(cls) is None:
        raise UserError(f"options in {text!r} need names, for example 'anderson(ridge=1e-8)'")
    known = _options_of(cls)
    options: dict[str, Any] = {}
    for argument in arguments:
        if argument.arg not in known:
            given = argument.arg or "**"
            raise UserError(
                f"{ast.unparse(function)} has no option {given!r}{nearest(given, known)} "
                f"(it has: {', '.join(known) or 'none'})"
            )
        options[argument.arg] = _value(argument.value, text)
    try:
        return cls(*(_value(part, text) for part in parts), **options)
    except TypeError as error:
        raise UserError(f"{text!r}: {error}") from error


def _options_of(cls: type) -> list[str]:
    """Names of the fields that are given by name."""
    parts = _parts_of(cls)
    return [field.name for field in dataclasses.fields(cls) if field.name != parts]


def _parts_of(cls: type) -> str | None:
    """The field that takes any number of others, as the solvers of a `Fallback`."""
    parameters = inspect.signature(cls).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call | ast.Name | ast.Attribute):
        return _build(list(KINDS), node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"an option of {text!r} is no number, word in quotes, None, or name"
        ) from error


def _find_in(kinds: list[type], function: ast.expr, text: str) -> type:
    if isinstance(function, ast.Attribute):
        module, _, name = ast.unparse(function).rpartition(".")
        return _find_outside(kinds, f"{module}:{name}")
    if not isinstance(function, ast.Name):
        raise UserError(f"{text!r} cannot be read; write a name, or name(option=value, ...)")
    name = function.id
    for kind in kinds:
        if len(kinds) == 1 or _file_of(kind, name) is not None:
            return find(kind, name)
    known = sorted({known for kind in kinds for known in names(kind)})
    raise UserError(
        f"nothing is called {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
    )


def _find_outside(kinds: list[type], path: str) -> type:
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot import {module_name!r} of {path!r} ({error}); install it, or put its folder "
            "on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = [name for name, item in vars(module).items() if _is_plugin(item, kinds)]
        raise UserError(f"{module_name} has no class {class_name!r}{nearest(class_name, classes)}")
    if not _is_plugin(found, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{path!r} is no dataclass derived from {wanted}")
    return found


def _is_plugin(item: object, kinds: list[type]) -> bool:
    return (
        isinstance(item, type) and issubclass(item, tuple(kinds)) and dataclasses.is_dataclass(item)
    )


def _file_of(kind: type, name: str) -> str | None:
    """The plug-in file that a name means: "one_step" for "one-step" and "OneStep"."""
    return next((file for file in names(kind) if _squashed(file) == _squashed(name)), None)


def _squashed(name: str) -> str:
    """Without case and separators, because capitals do not tell where words end: BiCGStab."""
    return name.replace("-", "").replace("_", "").lower()


def _describe_value(value: Any) -> str:
    return describe(value) if dataclasses.is_dataclass(value) else repr(value)
