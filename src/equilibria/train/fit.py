"""Whether weights on disk are those of a configuration, found out before a model is made of it.

A run folder may be somebody else's, and its configuration may ask for any size. Shapes cost
nothing, so the model is first made of shapes alone, and compared with what the files hold.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from equilibria.core.errors import UserError
from equilibria.models.config import ModelConfig

if TYPE_CHECKING:
    from equilibria.train.tensor_files import TensorFiles

_REGISTRATIONS = 8
"""Of parameters, per tensor that the weights have; those with norms are registered twice."""


def check_fits(files: TensorFiles, config: ModelConfig, vocabulary_size: int) -> None:
    """Refuse to make a model of a configuration that the weights do not belong to.

    Models of other packages, which need not know what a shape without numbers is, are let through:
    to read a configuration of theirs is to trust them.

    Raises:
        UserError: another name or shape, or no model at all.
    """
    if not type(config).__module__.startswith("equilibria."):
        return
    try:
        with torch.device("meta"), _at_most(_REGISTRATIONS * (len(files.shapes) + 1)):
            expected = config.build(vocabulary_size).state_dict()
    except UserError:
        raise
    except Exception as error:
        # whatever sizes beyond all bounds lead to: overflows, errors of types, or of the above
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{files.path} does not fit the configuration, of which no model can be made "
            f"({reason}); restore config.json and environment.json of the run"
        ) from error
    check_shapes(files, expected)


def check_shapes(files: TensorFiles, expected: dict[str, Tensor]) -> None:
    """Compare names and shapes with those of a model.

    Raises:
        UserError: another name or shape.
    """
    file, given = files.path, files.shapes
    if apart := names_apart(given, expected):
        raise UserError(
            f"{file} belongs to another model: {apart}; evaluate it with the configuration it was "
            "trained with"
        )
    for name, tensor in expected.items():
        if given[name] != tensor.shape:
            raise UserError(
                f"{file} has {name} of shape {given[name]}, the model's is "
                f"{tuple(tensor.shape)}; the configuration or the text has changed since"
            )


@contextmanager
def _at_most(number: int) -> Generator[None]:
    """Stop the making of modules that register more parameters, as of a million layers."""
    left = number

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("it has many more layers than the weights have tensors")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def names_apart(given: Collection[str], expected: Collection[str]) -> str | None:
    """How the names of tensors differ; None where they do not."""
    missing, foreign = {*expected} - {*given}, {*given} - {*expected}
    if not missing and not foreign:
        return None
    return (
        f"{len(missing)} tensors are missing{_first(missing)}, {len(foreign)} are unknown"
        f"{_first(foreign)}"
    )


def _first(names: set[str]) -> str:
    return f" (such as {min(names)[:60]!r})" if names else ""
