"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from equilibria import UserError
from equilibria.train.files import (
    flush_folder,
    open_regular,
    read_bounded,
    read_json,
    write_json,
    write_text,
)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"naïve": [1, None, 2.5]})
    write_json(file, {"naïve": "é"})
    assert read_json(file, "do something") == {"naïve": "é"}
    assert os.listdir(tmp_path) == ["a.json"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, crash)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_no_json_never_replaces_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises(TypeError):
        write_json(file, {"x": object()})
    assert file.read_text() == "1\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "is missing"), (b"{", "cannot be read"), (b"\xff\xfe", "cannot be read")],
)
def test_unreadable_json_is_a_sentence(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json {reason}.*; do something"):
        read_json(file, "do something")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path, "do something")


def test_flushing_a_folder_that_is_not_there_is_harmless(tmp_path: Path) -> None:
    flush_folder(tmp_path)
    flush_folder(tmp_path / "missing")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe would be waited for, a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(UserError, match=r"cannot be read \(it is no regular file\); do so"):
            read_json(tmp_path / name, "do something")
        with pytest.raises(OSError, match="no regular file"):
            open_regular(tmp_path / name)


def test_no_more_is_read_than_a_file_may_have(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"[1]")
    assert read_bounded(file, 3) == b"[1]"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_bounded(file, 2)
    os.truncate(file, 2**40)
    with pytest.raises(UserError, match=r"a\.json cannot be read \(.*more than"):
        read_json(file, "do something")
