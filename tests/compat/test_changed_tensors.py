"""Old checkpoints in which one tensor is not as it should be, and files that claim too much."""

from __future__ import annotations

import os
import resource
import zipfile
from pathlib import Path

import old_layouts  # beside this file, where pytest looks
import pytest
import torch

from equilibria import UserError
from equilibria.compat.convert import convert

LAYOUTS = {
    "transformer": old_layouts.transformer(),
    "transformer of version 1": old_layouts.transformer(version=1, adaptive=False),
    "plain transformer": old_layouts.transformer(normed=False),
    "trellisnet": old_layouts.trellisnet(experts=3),
    "trellisnet with dropconnect": old_layouts.trellisnet(dropped=True),
    "plain trellisnet": old_layouts.trellisnet(normed=False),
    "torchdeq": old_layouts.torchdeq(blocks=1),
    "plain torchdeq": old_layouts.torchdeq(normed=False, blocks=1),
}
SHAPES = {
    "scalar": lambda old: torch.tensor(1.0),
    "empty": lambda old: torch.zeros(0),
    "half": lambda old: old[: len(old) // 2].clone(),
    "one more": lambda old: torch.cat((old, old[:1])),
    "transposed": lambda old: old.transpose(0, -1).contiguous(),
    "one dimension more": lambda old: old.unsqueeze(0),
}
OTHER_KINDS = {
    "sparse": torch.Tensor.to_sparse,
    "integers": lambda old: (10 * old).long(),
    "complex": lambda old: old.to(torch.complex64),
    "quantised": lambda old: torch.quantize_per_tensor(old, 0.1, 0, torch.qint8),
    "meta": lambda old: old.to("meta"),
    "repeated": lambda old: torch.zeros(1).expand(old.shape) if old.numel() > 1 else None,
    "not a number": lambda old: old * torch.nan,
    "infinite": lambda old: old.double() * 1e300,
}


def saved(old, tmp_path: Path) -> Path:
    torch.save(old, tmp_path / "old.pkl")
    return tmp_path / "old.pkl"


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as error:
        convert(file)
    return str(error.value)


def unneeded(old, tmp_path: Path) -> set[str]:
    return set(convert(saved(old, tmp_path)).left)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", SHAPES)
def test_a_tensor_of_another_shape_is_named(layout: str, change: str, tmp_path: Path) -> None:
    old = LAYOUTS[layout]
    for name in old.keys() - unneeded(old, tmp_path):
        changed = SHAPES[change](old[name])
        if changed.shape == old[name].shape:  # of square ones
            continue
        message = refusal(saved(old | {name: changed}, tmp_path))
        assert name in message
        assert str(tuple(changed.shape)) in message
        assert "is needed" in message or "are converted" in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", OTHER_KINDS)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor", "ignore:TypedStorage")
def test_a_tensor_of_another_kind_is_named(layout: str, change: str, tmp_path: Path) -> None:
    old = LAYOUTS[layout]
    for name in old.keys() - unneeded(old, tmp_path):
        changed = OTHER_KINDS[change](old[name])
        if changed is not None:
            assert name in refusal(saved(old | {name: changed}, tmp_path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_may_be_missing(layout: str, tmp_path: Path) -> None:
    old = LAYOUTS[layout]
    for name in old.keys() - unneeded(old, tmp_path):
        file = saved({other: old[other] for other in old if other != name}, tmp_path)
        assert refusal(file)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [*SHAPES, *OTHER_KINDS])
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor", "ignore:TypedStorage")
def test_a_tensor_that_is_not_needed_may_be_anything(layout, change, tmp_path) -> None:
    old = LAYOUTS[layout]
    for name in unneeded(old, tmp_path):
        changed = (SHAPES | OTHER_KINDS)[change](old[name])
        if changed is not None and old[name].dim() > 0:
            try:
                convert(saved(old | {name: changed}, tmp_path))
            except UserError as error:
                assert name in str(error)  # noqa: PT017


def test_rows_without_direction(tmp_path):
    old = old_layouts.transformer()
    old["func.dec_attn.r_net.weight_v"][2] = 0.0
    assert "r_net.weight_v has a row of zeros" in refusal(saved(old, tmp_path))


def test_names_that_are_none_or_occur_twice(tmp_path):
    assert "its 0 is of type Tensor" in refusal(saved({0: torch.ones(2)}, tmp_path))
    assert "'steps' is of type int" in refusal(saved({"a": torch.ones(2), "steps": 3}, tmp_path))
    assert "holds an empty dictionary" in refusal(saved({}, tmp_path))
    old = old_layouts.transformer()
    old["module.inject_conv.weight"] = torch.zeros(24, 8, 1)
    assert "both 'inject_conv.weight' and 'module.inject_conv.weight'" in refusal(
        saved(old, tmp_path)
    )


def test_small_files_take_little_memory(tmp_path):
    """Some kilobytes that claim tens of gigabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = torch.zeros(1).expand(10**9, 4)
    trellisnet = {"encoder.weight": huge, "decoder.weight": huge, "decoder.bias": huge[:, 0]}
    message = refusal(saved(old_layouts.trellisnet() | trellisnet, tmp_path))
    assert "encoder.weight of shape (1000000000, 4)" in message
    assert "has 16,000,000,000 bytes and only 4 are stored" in message
    bias = {"func.pos_ff.ff1_net.bias": huge[:, 0]}
    assert "only 4 are stored" in refusal(saved(old_layouts.transformer() | bias, tmp_path))
    many = {str(number): torch.zeros(5000) for number in range(2)}
    many |= {f"copy {number}": many["1"] for number in range(100)}
    assert "made of the same bytes" in refusal(saved(many, tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000


def test_archives_are_not_expanded(tmp_path):
    old = old_layouts.transformer()
    old["func.pos_ff.ff1_net.bias"] = torch.zeros(10**6)
    with (
        zipfile.ZipFile(saved(old, tmp_path)) as plain,
        zipfile.ZipFile(tmp_path / "small.pkl", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "would expand to 4," in refusal(tmp_path / "small.pkl")


def test_folders_and_forbidden_files(tmp_path):
    assert f"'{tmp_path}' is a folder" in refusal(tmp_path)
    file = saved(old_layouts.transformer(), tmp_path)
    file.chmod(0)
    if not os.access(file, os.R_OK):  # root may read everything
        assert "cannot be read (Permission denied)" in refusal(file)


def test_dropconnect_without_weight_norm_is_refused_by_its_name(tmp_path):
    message = refusal(saved(old_layouts.trellisnet(normed=False, dropped=True), tmp_path))
    assert "DropConnect (--wdrop) without weight norm (--wnorm), which is not converted" in message
    assert "was not written by" not in message
