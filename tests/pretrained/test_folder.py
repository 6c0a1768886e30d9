"""A shared model comes back as it was, and a folder of a stranger does no harm."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from equilibria import Anderson, UserError, models
from equilibria.data.words import WordVocabulary
from equilibria.models.config import ModelConfig, SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.stacked_transformer import StackedTransformerConfig
from equilibria.models.tcn import TCNConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig
from equilibria.pretrained import Pretrained
from equilibria.pretrained.architectures import ARCHITECTURES
from equilibria.pretrained.folder import FILES, is_shared
from equilibria.tasks.generation import SamplingConfig

Make = Callable[..., Pretrained]
SMALL: dict[str, Any] = {"d_model": 8, "num_heads": 2, "d_inner": 12}
CONFIGS = {
    "post-norm": DEQTransformerConfig(**SMALL),
    "adaptive": DEQTransformerConfig(
        **SMALL, cutoffs=(4, 8), div_val=2, tie_tail_projections=False, attention_window=500
    ),
    "solver": DEQTransformerConfig(**SMALL, solve=SolveConfig(Anderson(4), eval_max_steps=40)),
    "xl": TransformerXLConfig(**SMALL, num_layers=3),
    "xl-tied": TransformerXLConfig(**SMALL, num_layers=60, tied=True),
    "stacked": StackedTransformerConfig(**SMALL, num_blocks=2, num_steps=3),
    "deq-trellisnet": DEQTrellisNetConfig(d_embed=4, d_hidden=6, num_softmaxes=2),
    "trellisnet": TrellisNetConfig(d_embed=4, d_hidden=6, num_layers=3),
    "lstm": RecurrentConfig(d_embedding=4, d_hidden=6, num_layers=2),
    "gru": RecurrentConfig(unit="gru", d_embedding=4, d_hidden=6),
    "tcn": TCNConfig(d_model=4, num_blocks=2),
}
TOKENS = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))


def change(folder: Path, **options: Any) -> None:
    """Change values of config.json; names with two parts are options of the model."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for name, value in options.items():
        place = content
        *path, last = name.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    """What is said when the folder is read; nothing may be built but without numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for known in ARCHITECTURES.values():
            kind = type(known.default)
            patch.setattr(kind, "build", _only_on_meta(kind.build))
        with pytest.raises(UserError) as caught:
            Pretrained.from_pretrained(folder)
    return str(caught.value)


def _only_on_meta(build: Any) -> Any:
    def guarded(self: Any, size: int) -> Any:
        assert torch.get_default_device().type == "meta", "a model was made of an unchecked file"
        return build(self, size)

    return guarded


# --- What comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_comes_back_bit_for_bit(make: Make, tmp_path: Path, name: str) -> None:
    mine = make(CONFIGS[name])
    mine.save_pretrained(tmp_path)
    found = Pretrained.from_pretrained(tmp_path)
    assert type(found.model) is type(mine.model)
    assert not found.model.training
    assert found.config == mine.config
    assert found.vocabulary == mine.vocabulary
    assert (found.reading, found.card) == (mine.reading, mine.card)
    weights = mine.model.state_dict()
    assert found.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[n]) for n, t in found.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found.model(TOKENS).logits, mine.model(TOKENS).logits)
    sampling = SamplingConfig(num_tokens=12, temperature=2.0)
    assert found.generate("bad", "cafe", sampling=sampling) == mine.generate(
        "bad", "cafe", sampling=sampling
    )


def test_every_model_can_be_shared() -> None:
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    found = {
        item
        for name in names
        for item in vars(importlib.import_module(f"{models.__name__}.{name}")).values()
        if isinstance(item, type) and issubclass(item, ModelConfig) and "build" in vars(item)
    }
    assert found - {ModelConfig} == {type(known.default) for known in ARCHITECTURES.values()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_are_kept(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    mine = make()
    mine.model.to(dtype)
    mine.save_pretrained(tmp_path)
    found = Pretrained.from_pretrained(tmp_path).model.state_dict()
    assert {t.dtype for t in found.values()} == {dtype}
    assert all(torch.equal(t, found[name]) for name, t in mine.model.state_dict().items())


def test_words_come_back(tmp_path: Path) -> None:
    words = WordVocabulary(("<eos>", "a", "b"))
    config = DEQTransformerConfig(**SMALL)
    Pretrained(config.build(3), config, vocabulary=words).save_pretrained(tmp_path)
    found = Pretrained.from_pretrained(tmp_path)
    assert found.vocabulary == words
    assert found.reading is None
    assert found.generate("a b")[0]


def test_a_model_of_other_things_than_text(tmp_path: Path) -> None:
    config = TCNConfig(d_model=4, num_blocks=2)
    Pretrained(config.build(5), config, vocabulary_size=5).save_pretrained(tmp_path)
    found = Pretrained.from_pretrained(tmp_path)
    assert found.vocabulary is None
    assert not (tmp_path / "vocabulary.json").exists()
    with pytest.raises(UserError, match="came without a vocabulary"):
        found.generate("a")
    with pytest.raises(UserError, match="give a vocabulary, or its size"):
        Pretrained(config.build(5), config)


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Pretrained.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_can_be_written_again(make: Make, folder: Path) -> None:
    other = make(d_model=4)
    other.save_pretrained(folder)
    assert Pretrained.from_pretrained(folder).config.d_model == 4
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_shared_folders_are_told_from_others(folder: Path, tmp_path: Path) -> None:
    assert is_shared(folder)
    assert not is_shared(tmp_path)
    (tmp_path / "config.json").write_text('{"recipe": "x", "config": {}}')
    assert not is_shared(tmp_path)


def test_what_would_be_refused_is_not_written(make: Make, tmp_path: Path) -> None:
    (tmp_path / "foreign_solver.py").write_text(
        "from dataclasses import dataclass\nfrom equilibria import Anderson\n"
        "@dataclass(frozen=True)\nclass Mine(Anderson):\n    pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        from foreign_solver import Mine  # pyright: ignore[reportMissingImports]

        mine = make(solve=SolveConfig(Mine()))
        with pytest.raises(UserError, match="names a class outside of equilibria"):
            mine.save_pretrained(tmp_path / "shared")
    assert not (tmp_path / "shared" / "config.json").exists()


def test_parameters_of_several_types_are_not_shared(make: Make, tmp_path: Path) -> None:
    mine = make()
    mine.model.embedding.double()
    with pytest.raises(UserError, match="of torch.float32, torch.float64; a shared model"):
        mine.save_pretrained(tmp_path)


# --- What strangers write -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 10**12}, "says vocabulary_size=1,000,000,000,000, which is more than"),
        ({"vocabulary_size": 10**40}, "says vocabulary_size="),
        ({"vocabulary_size": 0}, "no vocabulary_size of at least 1"),
        ({"vocabulary_size": True}, "no vocabulary_size of at least 1"),
        ({"vocabulary_size": 12}, "as float32 (11,), by its config.json it is float32 (12,)"),
        ({"model__d_model": 10**9}, "says d_model=1,000,000,000"),
        ({"model__d_model": 16}, "by its config.json it is float32"),
        ({"model__d_model": "8"}, "option 'model.d_model' cannot be '8'"),
        ({"model__cutoffs": [10**9]}, "says cutoffs=1,000,000,000"),
        ({"model__cutoffs": [4]}, "does not belong to its config.json"),
        ({"model__cutoffs": [9, 4]}, "do not cut a vocabulary of 11 into clusters"),
        ({"model__norm": "both"}, "norm"),
        ({"model__no_such": 1}, "unknown option 'model.no_such'"),
        ({"model__solve__max_steps": 10**9}, "says solve.max_steps=1,000,000,000"),
        ({"model__solve__solver": "broyden(history_size=10**9)"}, "is no number, word in quotes"),
        (
            {"model__solve__solver": "fallback(broyden(history_size=999999), picard, num_steps=5)"},
            "says solve.solver.solvers.history_size=999,999",
        ),
        ({"model__cutoffs": [1] * 1001}, "has an option cutoffs of length 1,001"),
        ({"model__solve__solver": "'" + "\\'" * 600}, "option solve.solver of length 1,201"),
        ({"model__solve__solver": "-" * 999 + "1"}, "cannot be read"),
        ({"model__solve__solver": "os:system"}, "names a class outside of equilibria"),
        (
            {"model__solve__solver": "anderson(history_size=os.system('x'))"},
            "outside of equilibria",
        ),
        ({"model__solve__adjoint": "implicit(solver=a.b:C())"}, "outside of equilibria"),
        ({"model__solve__solver": "__import__('os')"}, "no Solver is called '__import__'"),
        ({"model": [1]}, "no options of the model"),
        ({"architecture": "LlamaForCausalLM"}, "the architecture 'LlamaForCausalLM' is none of"),
        ({"architecture": "DEQTransfomer"}, "did you mean 'DEQTransformer'"),
        ({"architecture": {"a": 1}}, "is none of ours"),
        ({"architecture": "TransformerXL"}, "unknown option 'model.solve'"),
        ({"equilibria": {"format": 2}}, "is of format 2, and this version of equilibria"),
        ({"equilibria": None, "model_type": "llama"}, "(it says 'llama')"),
        ({"dtype": "int8"}, "has the dtype 'int8', expected one of bfloat16, float16, float32"),
        ({"dtype": "float64"}, "as float32"),
        ({"reading": {"segment_length": 0}}, "segment_length=0 must be an integer"),
        ({"reading": {"memory_length": -1}}, "memory_length=-1 must be at least 0"),
    ],
)
def test_a_wrong_configuration_is_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    change(folder, **options)
    assert message in refusal(folder)


@pytest.mark.parametrize("name", ["xl", "tcn", "lstm", "stacked"])
def test_layers_are_not_made_by_the_million(make: Make, tmp_path: Path, name: str) -> None:
    """Less than there are numbers in the file, and far more than tensors."""
    make(CONFIGS[name]).save_pretrained(tmp_path)
    change(tmp_path, **{f"model__num_{'blocks' if name in ('tcn', 'stacked') else 'layers'}": 500})
    assert "asks for 500 layers, and the weights are" in refusal(tmp_path)


def test_code_in_a_configuration_is_not_imported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('the trap was imported')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        change(folder, model__solve__solver="trap:Solver()")
        assert "names a class outside of equilibria (trap)" in refusal(folder)
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds no named values"),
        ("\xff", "is not UTF-8 text"),
        (" " * (2**20 + 1), "has more than 1,048,576 bytes"),
        ("{}", "is not of a model that equilibria shared"),
    ],
    ids=["empty", "deep", "list", "binary", "long", "nothing"],
)
def test_a_configuration_that_is_none(folder: Path, content: str, message: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin1"))
    assert message in refusal(folder)


def _tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("output_bias"), "1 tensors are missing (such as 'output_bias')"),
        (lambda t: t.update(extra=torch.ones(2)), "1 are unknown (such as 'extra')"),
        (
            lambda t: t.update(output_bias=torch.ones(12)),
            "has output_bias as float32 (12,), by its config.json it is float32 (11,)",
        ),
        (
            lambda t: t.update(output_bias=torch.ones(11, dtype=torch.float64)),
            "has output_bias as float64 (11,)",
        ),
        (
            lambda t: t.update(output_bias=torch.ones(11, dtype=torch.int64)),
            "'output_bias' is no floating-point tensor",
        ),
    ],
    ids=["missing", "foreign", "shape", "dtype", "integers"],
)
def test_weights_of_another_model_are_refused(folder: Path, edit: Any, message: str) -> None:
    _tensors(folder, edit)
    assert message in refusal(folder)


def _header(content: Any, length: int | None = None, numbers: int = 0) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + b"\0" * numbers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is said to have 0 bytes"),
        (_header(b"{}", length=2**60), "its header is said to have"),
        (_header(b"{}", length=2**23), "its header is said to have 8,388,608 bytes"),
        (_header(b"{{}}"), "its header is not JSON"),
        (_header(b"[" * 60_000), "its header is not JSON"),
        (_header([1]), "its header names no tensors"),
        (_header({"a": {"dtype": "F32", "shape": [10**6, 10**6]}}), "and 4,000,000,000,"),
        (_header({"a": {"dtype": "F32", "shape": [-1]}}), "is no floating-point tensor"),
        (_header({"a": {"dtype": "F32", "shape": [1.5]}}), "is no floating-point tensor"),
        (_header({"a": {"dtype": "F32", "shape": "x"}}), "is no floating-point tensor"),
        (_header({"a": 3}), "is no floating-point tensor"),
        (b"\x80\x04pickle of old times, no header in it", "its header is said to have"),
    ],
)
def test_a_damaged_header_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert message in refusal(folder)


def test_places_that_overlap_are_refused(folder: Path) -> None:
    """Names, shapes and sizes fit; two tensors claim one place."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["deq.cell.content_bias"]["data_offsets"] = header["deq.cell.position_bias"][
        "data_offsets"
    ]
    file.write_bytes(_header(header) + raw[8 + length :])
    with pytest.raises(UserError, match="truncated, damaged or no safetensors file"):
        Pretrained.from_pretrained(folder)


def test_a_tensor_that_is_named_twice_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    twice = b'{"output_bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    file.write_bytes(_header(twice + raw[9 : 8 + length]) + raw[8 + length :])
    with pytest.raises(UserError, match="truncated, damaged or no safetensors file"):
        Pretrained.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} cannot be read (No such file or directory)" in refusal(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "by its header" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "characters", "symbols": ["a"]}', "has 1 symbols, and the model 11"),
        ('{"kind": "characters", "symbols": ["a", "a"]}', "not a usable character vocabulary"),
        ('{"kind": "words", "words": [1]}', "not a usable vocabulary of words"),
        ("[]", "holds no named values"),
        (" " * 80_000, "far more than it can need"),
    ],
)
def test_another_vocabulary_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / "vocabulary.json").write_text(content)
    assert message in refusal(folder)


def test_a_card_of_gigabytes_is_not_read(folder: Path) -> None:
    with (folder / "README.md").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than 1,048,576 bytes"):
        Pretrained.from_pretrained(folder)


# --- Links, pipes and devices --------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_the_folder_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    """Else a file of whoever loads the folder would be shown, and shared on by the next one."""
    folder, outside = tmp_path / "shared", tmp_path / "secret"
    make().save_pretrained(folder)
    (folder / name).replace(outside)
    (folder / name).symlink_to(outside)
    assert f"{name} is a link to {outside}, which is outside of the folder" in refusal(folder)


def test_links_of_the_cache_of_the_hub_are_followed(make: Make, tmp_path: Path) -> None:
    """Whose snapshots are links into the blobs of the repository, and no further."""
    repository = tmp_path / "models--me--mine"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    mine = make()
    mine.save_pretrained(snapshot)
    blobs.mkdir()
    for number, name in enumerate(FILES):
        if (snapshot / name).exists():
            (snapshot / name).replace(blobs / str(number))
            (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert Pretrained.from_pretrained(snapshot).config == mine.config
    (tmp_path / "link").symlink_to(snapshot)
    assert Pretrained.from_pretrained(tmp_path / "link").config == mine.config
    (snapshot / "README.md").unlink(missing_ok=True)
    (snapshot / "README.md").symlink_to("/etc/hostname")
    assert "outside of the folder" in refusal(snapshot)


def test_links_in_a_circle_are_a_sentence(make: Make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("config.json")
    assert re.search("leads nowhere|cannot be read", refusal(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_not_waited_for(make: Make, tmp_path: Path, name: str) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "no regular file" in refusal(tmp_path)
    assert not is_shared(tmp_path) or name != "config.json"
