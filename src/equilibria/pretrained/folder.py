"""The folder of a shared model: written whole, and read without trusting a byte of it.

    config.json         architecture, its options, size of the vocabulary, type of the numbers
    model.safetensors   parameters
    vocabulary.json     symbols of the token ids; of models of text
    README.md           the model card

Nothing in it is executed or imported. What is read is bounded before it is read, and what is made
is compared with the size of the weights before it is made, so that a folder of a stranger costs no
more memory than a few times its own size.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from equilibria import __version__
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.data.characters import CharacterVocabulary
from equilibria.data.words import WordVocabulary
from equilibria.models.config import ModelConfig
from equilibria.pretrained import weights
from equilibria.pretrained.architectures import Architecture, architecture, name_of
from equilibria.train.config_file import from_json, to_json
from equilibria.train.experiment import Vocabulary
from equilibria.train.files import open_regular, write_json, write_text

CONFIG, WEIGHTS, VOCABULARY, CARD = FILES = (
    "config.json",
    "model.safetensors",
    "vocabulary.json",
    "README.md",
)

SCRATCH = f".{WEIGHTS}"
"""Weights that are being written."""

_LIBRARY, _FORMAT = "equilibria", 1
_MAX_CONFIG, _MAX_CARD = 2**20, 2**20
"""Bytes."""
_BYTES_PER_TOKEN = 256
_MAX_LENGTH = 1000
_MAX_STEPS = 10_000
"""Of a solver, and positions of its history."""


@dataclass(frozen=True)
class Reading:
    """How many positions the model read at a time, and how many before them."""

    segment_length: int = 64
    """Tokens per segment."""
    memory_length: int = 64
    """Positions of memory in evaluation."""

    def __post_init__(self) -> None:
        check_positive_integer("segment_length", self.segment_length)
        if self.memory_length < 0:
            raise UserError(f"memory_length={self.memory_length} must be at least 0")

    @property
    def context(self) -> int:
        """Positions to go on with a text from."""
        return self.segment_length + self.memory_length


@dataclass(frozen=True)
class Shared:
    """What a folder holds."""

    model: nn.Module
    config: ModelConfig
    vocabulary_size: int
    vocabulary: Vocabulary | None = None
    """None of a model of other things than text."""
    reading: Reading | None = None
    """None likewise."""
    card: str = ""


def is_shared(folder: Path) -> bool:
    """Whether a folder is one of a shared model, and not that of a run, whose config names it."""
    try:
        return _LIBRARY in _small_json(folder / CONFIG, _MAX_CONFIG)
    except UserError:
        return False


def write_folder(folder: Path, shared: Shared) -> None:
    """Write the files of a model.

    Raises:
        UserError: the model is none of ours, a solver of it is a class of another package, or the
            folder cannot be written to.
    """
    config = _config_of(shared)
    # Whoever gets the folder reads it like this; what would be refused then is refused now.
    from_json(shared.config, config["model"], "model", outside=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the old ones and then in their place, the config last: it says that all is there.
        scratch = folder / SCRATCH
        weights.write_weights(scratch, shared.model)
        os.replace(scratch, folder / WEIGHTS)
        if shared.vocabulary is not None:
            write_text(folder / VOCABULARY, shared.vocabulary.to_json() + "\n")
        if shared.card:
            write_text(folder / CARD, shared.card)
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); give another folder"
        ) from error


def read_folder(folder: Path) -> Shared:
    """Read what `write_folder` wrote, by whoever; the model is on the CPU and in eval mode.

    Raises:
        UserError: a file is missing, damaged, too large or of another model; an architecture or an
            option that is not ours.
    """
    _check_links(folder)
    content = _small_json(folder / CONFIG, _MAX_CONFIG)
    kind = _kind(folder, content)
    file = folder / WEIGHTS
    header = weights.read_header(file)
    numbers = sum(form.num_bytes // form.dtype.itemsize for form in header.values())
    config, size = _config(folder, content, kind, numbers, len(header))
    dtype, reading = _dtype(folder, content), _reading(content)
    weights.check_forms(file, header, weights.forms_of(_on_no_device(folder, config, size), dtype))
    vocabulary, card = _vocabulary(folder, size), _text(folder / CARD)
    # Only now, and no larger than the file, is a model made.
    with torch.random.fork_rng(devices=[]):  # whoever loads a model draws as before
        model = config.build(size).to(dtype)
    weights.load_weights(file, model)
    return Shared(model.eval(), config, size, vocabulary, reading, card)


def _check_links(folder: Path) -> None:
    """Refuse links out of the folder, by which a file of this machine would pass for a part of it.

    In the cache of huggingface_hub the files of a snapshot are links into the folder of its
    repository: models--OWNER--NAME/snapshots/REVISION/README.md -> ../../blobs/...

    Raises:
        UserError: one leads outside.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]
    for name in FILES:
        file = folder / name
        target = _target(file)
        if not target.is_relative_to(home):
            raise UserError(
                f"{file} is a link to {target}, which is outside of the folder; put the file "
                "itself there, or get the folder again from where it was shared"
            )


def _target(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise UserError(
            f"{file} is a link that leads nowhere; put the file itself there"
        ) from error


def _config_of(shared: Shared) -> dict[str, Any]:
    return {
        _LIBRARY: {"version": __version__, "format": _FORMAT},
        "architecture": name_of(shared.config),
        "dtype": str(weights.dtype_of(shared.model)).removeprefix("torch."),
        "vocabulary_size": shared.vocabulary_size,
        "reading": None if shared.reading is None else to_json(shared.reading),
        "model": to_json(shared.config),
    }


def _kind(folder: Path, content: dict[str, Any]) -> Architecture:
    match content.get(_LIBRARY):
        case {"format": int(number)} if number == _FORMAT:
            return architecture(content.get("architecture"))
        case {"format": int(number)}:
            raise UserError(
                f"{folder / CONFIG} is of format {number}, and this version of equilibria "
                f"({__version__}) reads {_FORMAT}; install the version that wrote it"
            )
        case _:
            foreign = content.get("model_type") or content.get("architectures")
            of = f" (it says {str(foreign)[:60]!r})" if foreign else ""
            raise UserError(
                f"{folder / CONFIG} is not of a model that equilibria shared{of}; give a folder "
                "that 'equilibria share' has written, or load it with the library that made it"
            )


def _config(
    folder: Path, content: dict[str, Any], kind: Architecture, numbers: int, tensors: int
) -> tuple[ModelConfig, int]:
    """The configuration and the size of the vocabulary, neither larger than the weights can be."""
    size, options = content.get("vocabulary_size"), content.get("model")
    if type(size) is not int or size < 1:
        raise UserError(f"{folder / CONFIG} has no vocabulary_size of at least 1; get it again")
    if not isinstance(options, dict):
        raise UserError(f"{folder / CONFIG} has no options of the model; get it again")
    # Before the configuration looks at them: its own checks can take time in proportion.
    for name, value in {**cast(dict[str, Any], options), "vocabulary_size": size}.items():
        _check_length(folder, name, value)
        _check_size(folder, name, value, numbers)
    config = from_json(kind.default, options, "model", outside=False)
    if kind.num_modules(config) > tensors:
        raise UserError(
            f"{folder / CONFIG} asks for {kind.num_modules(config):,} layers, and the weights are "
            f"{tensors:,} tensors; get the folder again from where it was shared"
        )
    for name, value in _integers(getattr(config, "solve", None), "solve"):
        _check_size(folder, name, value, _MAX_STEPS)
    return config, size


def _check_length(folder: Path, name: str, value: object) -> None:
    """Of texts and lists, also of the options inside of one."""
    if isinstance(value, str | list) and len(cast(str, value)) > _MAX_LENGTH:
        raise UserError(
            f"{folder / CONFIG} has an option {name} of length {len(cast(str, value)):,}, and none "
            f"of ours is longer than {_MAX_LENGTH}; get it again from where it was shared"
        )
    if isinstance(value, dict):
        for inner, item in cast(dict[str, object], value).items():
            _check_length(folder, f"{name}.{inner}", item)


def _integers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    """Step limits, lengths of histories and the like, of plug-ins inside of plug-ins, too."""
    if type(value) is int:
        yield name, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for option in dataclasses.fields(value):
            yield from _integers(getattr(value, option.name), f"{name}.{option.name}")
    elif isinstance(value, tuple):
        for item in cast(tuple[Any, ...], value):
            yield from _integers(item, name)


def _check_size(folder: Path, name: str, value: object, most: int) -> None:
    for item in cast(list[object], value) if isinstance(value, list) else [value]:
        if type(item) is int and abs(item) > most:
            raise UserError(
                f"{folder / CONFIG} says {name}={item:,}, which is more than {most:,}, the most "
                "that is believed of a model of its size; get it again from where it was shared"
            )


def _on_no_device(folder: Path, config: ModelConfig, size: int) -> nn.Module:
    """The model with shapes and without numbers."""
    try:
        with torch.device("meta"):
            return config.build(size)
    except (RuntimeError, OverflowError) as error:
        raise UserError(
            f"{folder / CONFIG} describes no model that can be built "
            f"({str(error).splitlines()[0][:120]}); get the folder again"
        ) from error


def _dtype(folder: Path, content: dict[str, Any]) -> torch.dtype:
    name = content.get("dtype")
    known = {"float64", "float32", "bfloat16", "float16"}
    if name not in known:
        raise UserError(
            f"{folder / CONFIG} has the dtype {str(name)[:60]!r}, expected one of "
            f"{', '.join(sorted(known))}; get it again"
        )
    return cast(torch.dtype, getattr(torch, str(name)))


def _reading(content: dict[str, Any]) -> Reading | None:
    values = content.get("reading")
    return None if values is None else from_json(Reading(), values, "reading", outside=False)


def _vocabulary(folder: Path, size: int) -> Vocabulary | None:
    """The symbols of the ids, if they are there; as many as the model has."""
    file = folder / VOCABULARY
    if not file.exists():
        return None
    vocabulary = read_vocabulary(file, size)
    if len(vocabulary) != size:
        raise UserError(
            f"{file} has {len(vocabulary):,} symbols, and the model {size:,}; get the folder again "
            "from where it was shared"
        )
    return vocabulary


def read_vocabulary(file: Path, size: int) -> Vocabulary:
    """Characters or words, as the file says, for about `size` ids.

    Raises:
        UserError: the file is damaged, or far too large for so many.
    """
    most = 2**16 + _BYTES_PER_TOKEN * size
    stored = _bounded(file, most)
    kind = _object(file, stored).get("kind")
    return (WordVocabulary if kind == "words" else CharacterVocabulary).from_json(stored)


def _small_json(file: Path, most: int) -> dict[str, Any]:
    """An object in a file of so many bytes at most."""
    return _object(file, _bounded(file, most))


def _object(file: Path, text: str) -> dict[str, Any]:
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error)[:100]}); get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no named values; get it again from where it was shared")
    return cast(dict[str, Any], content)


def _bounded(file: Path, most: int) -> str:
    try:
        with open_regular(file) as handle:
            raw = handle.read(most + 1)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give the folder of a shared model, "
            "complete with config.json and model.safetensors"
        ) from error
    if len(raw) > most:
        raise UserError(f"{file} has more than {most:,} bytes, far more than it can need")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; get it again") from error


def _text(file: Path) -> str:
    return _bounded(file, _MAX_CARD) if file.exists() else ""
