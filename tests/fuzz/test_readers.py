"""Damaged and hostile files: every reader takes them or says in one sentence what is wrong.

By default a few hundred mutations; EQUILIBRIA_FUZZ=20000 makes as many in all (docs/training.md has
what they found). Everything is drawn from a seed that is printed with a failure.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from equilibria import OneStep, UserError, recipes
from equilibria.cli.train import load_config
from equilibria.compat.convert import convert
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.data.characters import CharacterVocabulary
from equilibria.data.word_corpus import WordCorpusConfig
from equilibria.data.words import WordVocabulary
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.pretrained import Pretrained
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.checkpoint import CheckpointFolder
from equilibria.train.config_file import to_json
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.loop import Trainer, TrainingError
from equilibria.train.run_folder import RunFolder
from equilibria.train.tensor_files import Part, write_tensors

_spec = importlib.util.spec_from_file_location(
    "old_layouts", Path(__file__).parents[1] / "compat" / "old_layouts.py"
)
assert _spec is not None
assert _spec.loader is not None
old_layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(old_layouts)

NUM_MUTATIONS = int(os.environ.get("EQUILIBRIA_FUZZ", "450"))
MEMORY = 512 * 2**20
"""Bytes by which the largest size of the process may grow over all mutations of a reader."""
TEXT = "the quick brown dog jumps over a lazy cow . but why ?\n" * 20


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return DEQTransformerConfig(d_model=8, num_heads=2, d_inner=8).build(11)


@dataclass(frozen=True)
class Reader:
    """Makes a good file in a folder and returns it, and reads what has become of it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    mutate: Callable[[bytes, str], bytes] | None = None
    """Of a file by a seed; None for what can be done to the bytes of any file."""


def _config(folder: Path) -> Path:
    experiment = recipes.load("ptb-small").experiment
    file = folder / "config.json"
    file.write_text(json.dumps({"recipe": "ptb-small", "config": to_json(experiment)}))
    return file


def _weights(folder: Path) -> Path:
    checkpoint = CheckpointFolder(folder).path(3)
    checkpoint.mkdir()
    file = checkpoint / "model.safetensors"
    save_file(dict(tiny_model().state_dict()), file)
    return file


def _training(folder: Path) -> Path:
    checkpoint = CheckpointFolder(folder).path(3)
    checkpoint.mkdir()
    file = checkpoint / "training.pt"
    torch.save({"optimizer": {"m": torch.arange(9.0)}, "place": 7, "list": [1, "two"]}, file)
    return file


def _trainer(folder: Path) -> Trainer:
    """Of five small steps, three of them solved."""
    text = folder / "text.txt"
    text.write_text(TEXT[:400])
    experiment = Experiment(
        data=CharacterCorpusConfig(path=text, valid_fraction=0.1, test_fraction=0.1),
        model=DEQTransformerConfig(
            d_model=8, num_heads=2, d_inner=8, solve=SolveConfig(max_steps=3, adjoint=OneStep())
        ),
        task=LanguageModelingConfig(4, 8, 8, pretrain_steps=2, eval_streams=4),
        train=TrainConfig(num_steps=5, log_every=2, eval_every=5, checkpoint_every=3, device="cpu"),
    )
    task = experiment.build_task(experiment.data.load())
    return Trainer(experiment, task, RunFolder(folder))


@cache
def _half_a_run() -> dict[str, bytes]:
    """Files of a run that was cut off after its third step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _trainer(folder).fit()
        shutil.rmtree(folder / "checkpoints" / "step-00000005")
        return snapshot(folder)


def _half(folder: Path) -> Path:
    for name, content in _half_a_run().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / "checkpoints" / "step-00000003" / "training.pt"


def _go_on(file: Path) -> int:
    """To the end: what is let through must not fail in the middle of the training."""
    trainer = _trainer(file.parents[2])
    trainer.resume()
    try:
        return trainer.fit()
    except TrainingError as error:  # a sentence, too
        raise UserError(str(error)) from error


def _part(stem: str) -> Callable[[Path], Path]:
    """Of two, as FSDP writes them; the second is damaged."""

    def make(folder: Path) -> Path:
        checkpoint = CheckpointFolder(folder).path(3)
        checkpoint.mkdir()
        for part in Part(1, 2).all():
            rows = {n: t.chunk(2)[part.number - 1] for n, t in tiny_model().state_dict().items()}
            write_tensors(checkpoint / part.file_name(stem), rows)
        return checkpoint / Part(2, 2).file_name(stem)

    return make


def _read_shards(file: Path) -> object:
    files = CheckpointFolder(file.parents[1]).optimizer_shards(3)
    return files and [files.read(name) for name in files.shapes]


def _shared(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config = DEQTransformerConfig(d_model=8, num_heads=2, d_inner=8)
        words = CharacterVocabulary.from_text("abcdefghij\n")
        Pretrained(config.build(11), config, vocabulary=words).save_pretrained(folder)
        return folder / name

    return make


def _read_shared(file: Path) -> object:
    return Pretrained.from_pretrained(file.parent)


def _best(folder: Path) -> Path:
    CheckpointFolder(folder).path(3).mkdir()
    file = folder / "best.json"
    file.write_text(json.dumps({"best": [{"step": 3, "loss": 1.5}, {"step": 2, "loss": 1.75}]}))
    return file


def _metrics(folder: Path) -> Path:
    run = RunFolder(folder)
    for step in range(5):
        run.append_metrics({"kind": "train", "step": step, "loss": 1.5, "text": "größer"})
    return run.metrics_file


def _text(folder: Path) -> Path:
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(TEXT)
    return folder / "train.txt"


def _encoded(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "text").mkdir()
        file = _text(folder / "text")
        WordCorpusConfig(folder=file.parent, cache=folder / "cache").load()
        (found,) = (folder / "cache" / "encoded").iterdir()
        return found / name

    return make


def _read_encoded(file: Path) -> object:
    root = file.parents[3]
    corpus = WordCorpusConfig(folder=root / "text", cache=root / "cache").load()
    return [int(split.sum()) for split in (corpus.train, corpus.valid, corpus.test)]


def _old(folder: Path) -> Path:
    torch.save(old_layouts.transformer(), folder / "old.pkl")
    return folder / "old.pkl"


OLD = (old_layouts.transformer, old_layouts.trellisnet, old_layouts.torchdeq)


def _other_tensors(good: bytes, seed: str) -> bytes:
    """A whole file in which one or two tensors have other shapes, sizes or kinds."""
    draw, written = random.Random(seed), io.BytesIO()
    old = draw.choice(OLD)()
    for name in draw.sample(sorted(old), draw.choice((1, 1, 2))):
        old[name] = _other_tensor(old[name], draw)
    torch.save(old, written)
    return written.getvalue()


def _other_tensor(tensor: Any, draw: random.Random) -> Any:
    shape = [draw.choice((0, 1, 2, n, 2 * n, 10**3)) for n in tensor.shape]
    match draw.randrange(6):
        case 0:
            return torch.zeros(draw.sample(shape, len(shape)))
        case 1:
            return torch.zeros(1).expand([draw.choice((n, 10**6)) for n in tensor.shape])
        case 2:
            return tensor.reshape([n for n in tensor.shape if n > 1] or [1])
        case 3:
            return tensor.to_sparse() if draw.random() < 0.5 else tensor.to("meta")
        case 4:
            return tensor.to(draw.choice((torch.int8, torch.bool, torch.complex64, torch.half)))
        case _:
            return torch.cat([tensor] * draw.choice((2, 3))) if tensor.dim() else tensor * torch.nan


def _words(folder: Path) -> Path:
    file = folder / "vocabulary.json"
    file.write_text(WordVocabulary.from_lines(TEXT.splitlines()).to_json())
    return file


def _characters(folder: Path) -> Path:
    file = folder / "vocabulary.json"
    file.write_text(CharacterVocabulary.from_text(TEXT).to_json())
    return file


def _json_of(kind: Any) -> Callable[[Path], object]:
    return lambda file: kind.from_json(file.read_text(encoding="utf-8", errors="replace"))


READERS = {
    "configuration": Reader(_config, lambda file: load_config(str(file))),
    "weights": Reader(
        _weights, lambda file: CheckpointFolder(file.parents[1]).load_weights(3, tiny_model())
    ),
    "training state": Reader(
        _training, lambda file: CheckpointFolder(file.parents[1]).load_training(3)
    ),
    "values of a training state": Reader(_half, _go_on, lambda data, seed: other_state(data, seed)),
    "part of weights": Reader(
        _part("model"),
        lambda file: CheckpointFolder(file.parents[1]).load_weights(3, tiny_model()),
    ),
    "part of an optimiser's state": Reader(_part("optimizer"), _read_shards),
    "shared configuration": Reader(_shared("config.json"), _read_shared),
    "shared weights": Reader(_shared("model.safetensors"), _read_shared),
    "shared vocabulary": Reader(_shared("vocabulary.json"), _read_shared),
    "best checkpoints": Reader(_best, lambda file: CheckpointFolder(file.parent).best()),
    "metrics": Reader(_metrics, lambda file: list(RunFolder(file.parent).metrics())),
    "words of a text": Reader(
        _text, lambda file: WordCorpusConfig(folder=file.parent, cache=file.parent / "c").load()
    ),
    "characters of a text": Reader(_text, lambda file: CharacterCorpusConfig(path=file).load()),
    "encoded text": Reader(_encoded("train.int32"), _read_encoded),
    "header of encoded text": Reader(_encoded("header.json"), _read_encoded),
    "vocabulary of encoded text": Reader(_encoded("vocabulary.json"), _read_encoded),
    "old checkpoint": Reader(_old, lambda file: convert(file)),
    "old checkpoint with other tensors": Reader(_old, lambda file: convert(file), _other_tensors),
    "word vocabulary": Reader(_words, _json_of(WordVocabulary)),
    "character vocabulary": Reader(_characters, _json_of(CharacterVocabulary)),
}


# --- Mutations ---------------------------------------------------------------------------------


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def insert(data: bytearray, draw: random.Random) -> None:
    where = draw.randrange(len(data) + 1)
    data[where:where] = draw.randbytes(draw.choice((1, 3, 17, 1000)))


def repeat(data: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(data))
    part = data[begin : begin + draw.choice((1, 9, 200))]
    data[begin:begin] = part * draw.choice((1, 5, 100))


def huge_number(data: bytearray, draw: random.Random) -> None:
    """In binary, wherever; and as digits, where there are some."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if digits and draw.random() < 0.7:
        where = draw.choice(digits)
        data[where : where + 1] = draw.choice((b"99999999999999999999", b"-1", b"1e999", b"NaN"))
        return
    value = draw.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
    where = draw.randrange(max(len(data) - 8, 1))
    data[where : where + 8] = struct.pack("<Q", value)


def other_value(data: bytearray, draw: random.Random) -> None:
    """JSON of another type somewhere in JSON; elsewhere a flip."""
    try:
        tree: Any = json.loads(data)
    except (ValueError, RecursionError):
        flip(data, draw)
        return
    values: list[Any] = [
        None, True, -1, 0, 10**30, 1e308, "", "../../etc/passwd", "os:system('true')", [], {},
        [[[[]]]], "\u0000", "solver(" * 50, {"a": {}},
    ]  # fmt: skip
    paths = list(_paths(tree))
    tree = _replaced(tree, draw.choice(paths), draw.choice(values))
    data[:] = json.dumps(tree).encode()


def other_name(data: bytearray, draw: random.Random) -> None:
    """A name of JSON or of a header, changed in one letter."""
    letters = [i for i, byte in enumerate(data[:4000]) if 97 <= byte <= 122]
    if letters:
        data[draw.choice(letters)] = draw.randrange(97, 123)


def nest(data: bytearray, draw: random.Random) -> None:
    depth = draw.choice((10, 1_000, 100_000))
    data[:] = b"[" * depth + bytes(data) + b"]" * depth


def nothing(data: bytearray, draw: random.Random) -> None:
    data[:] = draw.choice((b"", b"\0" * 100, b"{}", b"[]", b"null", b"\xff\xfe", b"PK\x03\x04"))


def other_state(good: bytes, seed: str) -> bytes:
    """A state that torch saved, with another value at one place."""
    draw = random.Random(seed)
    state = torch.load(io.BytesIO(good), weights_only=True)
    path = draw.choice([path for path in _paths(state) if path])
    *above, last = path
    place = state
    for key in above:
        place = place[key]
    if draw.random() < 0.2:
        del place[last]
    else:
        place[last] = draw.choice(_foreign_values(place[last]))
    changed = io.BytesIO()
    torch.save(state, changed)
    return changed.getvalue()


def _foreign_values(value: Any) -> list[Any]:
    """Of other types and shapes; of a tensor also such that are nearly as it was."""
    plain: list[Any] = [
        None, True, -1, 0, 10**30, 1e308, math.nan, -math.inf, "", "x", [], {}, [[]], {0: {}},
        torch.zeros(0), torch.zeros(3), torch.zeros(2, 2), torch.tensor(math.nan),
        torch.tensor(7), torch.zeros(1).expand(10**12), torch.zeros(1, 1).expand(10**6, 10**7),
    ]  # fmt: skip
    if not isinstance(value, torch.Tensor):
        return plain
    near = [
        value.double(), value.half(), value.bool(), value.to(torch.complex64), value.flatten()[:1],
        value.unsqueeze(0), value.unsqueeze(-1), value.flatten()[:1].expand(10**9), value * 1e30,
        value.to_sparse(), value.to("meta"), torch.nn.Parameter(value.float()), value.flatten(),
        torch.zeros((), dtype=value.dtype).expand(value.shape), torch.cat([value.flatten()] * 9),
    ]  # fmt: skip
    return [*plain, *near]


MUTATIONS = (
    flip, truncate, insert, repeat, huge_number, other_value, other_value, other_name, nest,
    nothing,
)  # fmt: skip


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree[:50])
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from _paths(value, (*path, key))


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree[path[0]] = _replaced(tree[path[0]], path[1:], value)
    return tree


def mutated(good: bytes, seed: str) -> bytes:
    draw = random.Random(seed)
    data = bytearray(good)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if data:
            draw.choice(MUTATIONS)(data, draw)
    return bytes(data)


# --- The test ----------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_it_or_says_what_is_wrong(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("do not touch")
    template = tmp_path / "template"
    template.mkdir()
    good = reader.make(template)
    reader.read(good)  # a good file is read
    place, data = good.relative_to(template), good.read_bytes()
    shutil.rmtree(template)
    before, modules = peak(), set(sys.modules)
    refused = 0
    for number in range(-(-NUM_MUTATIONS // len(READERS))):
        inside.mkdir()
        moved = reader.make(inside)
        assert moved == inside / place
        moved.write_bytes((reader.mutate or mutated)(data, f"{name}:{number}"))
        try:
            reader.read(moved)
        except UserError:
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"{name}:{number} ends in {type(error).__name__}: {error}"
            ) from error
        shutil.rmtree(inside)
    assert snapshot(outside) == {"precious": b"do not touch"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]
    assert peak() - before < MEMORY
    assert refused > 0 or name == "metrics"  # whose damaged lines are skipped
    assert not {"antigravity", "this"} & (set(sys.modules) - modules)
