"""A disk that is full, or may not be written to, is a sentence and not a traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from equilibria.pretrained import Pretrained

FULL = "error: No space left on device"


def no_space(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_run_leaves_no_empty_folder(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    result = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    assert (result.code, result.err.count(FULL)) == (2, 1), result.err
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_resumed_run(cli: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        result = cli("train", "--resume", run)
        assert (result.code, result.err.count(FULL)) == (2, 1), result.err
        assert "Checkpoints that were complete still are" in result.err
    assert cli("train", "--resume", run).code == 0


def test_pictures_are_not_the_figures(
    cli: Any, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("equilibria.diagnostics.plots.plot_run", no_space)
    with pytest.warns(RuntimeWarning, match=r"pictures could not be written.*--resume draws"):
        result = cli("train", *tiny, "--train.folder", tmp_path / "runs")
    assert result.code == 0
    assert "test split" in result.out


def test_a_shared_model(
    cli: Any, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(_: object, file: Path, **__: object) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    folder = tmp_path / "shared"
    with monkeypatch.context() as patch:
        patch.setattr("equilibria.pretrained.weights.save_file", half)
        result = cli("share", finished.path, "--folder", folder)
    assert result.code == 2
    assert "cannot be written to" in result.err
    assert list(folder.iterdir()) == []
    other = tmp_path / "other"
    other.write_bytes(b"of somebody else")
    (folder / ".model.safetensors").symlink_to(other)
    assert cli("share", finished.path, "--folder", folder).code == 0
    assert ".model.safetensors" not in os.listdir(folder)
    assert other.read_bytes() == b"of somebody else"


def test_a_place_for_a_shared_model_that_cannot_be_written_to(
    cli: Any, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "shared")

    monkeypatch.setattr(Pretrained, "save_pretrained", refused)
    result = cli("share", finished.path, "--folder", tmp_path / "shared")
    assert result.code == 2
    assert result.err.startswith("error: Read-only file system (shared); ")


def test_what_is_written_may_be_read_by_others(cli: Any, finished: Any, tmp_path: Path) -> None:
    assert cli("share", finished.path, "--folder", tmp_path / "shared").code == 0
    written = [*(tmp_path / "shared").iterdir(), *finished.path.glob("checkpoints/*/*")]
    assert {oct(file.stat().st_mode & 0o777) for file in written} == {"0o644"}


def test_other_errors_are_not_hidden(cli: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: object) -> None:
        raise OSError(errno.ENODEV, "a mistake of ours")

    monkeypatch.setattr("equilibria.cli.eval.open_run", other)
    with pytest.raises(OSError, match="a mistake of ours"):
        cli("eval", run)
