"""Small texts of words, and real ones where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TEXTS = {
    "train": "the cat sat\n\nthe dog <unk> sat the\n",
    "valid": "the cat ran\n",
    "test": "a dog sat\nthe end\n",
}


@pytest.fixture
def write_text(tmp_path):
    """Writes splits into a folder by a layout, and returns the folder."""

    def write(layout: str = "wiki.{}.tokens", name: str = "text", **texts: str | bytes) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, text in (texts or TEXTS).items():
            raw = text if isinstance(text, bytes) else text.encode()
            (folder / layout.format(split)).write_bytes(raw)
        return folder

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, by the environment variable."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EQUILIBRIA_CACHE", str(folder))
    return folder


@pytest.fixture
def real_text():
    """The folder of a published text, below $EQUILIBRIA_DATA."""

    def find(name: str) -> Path:
        base = os.environ.get("EQUILIBRIA_DATA")
        if not base or not (Path(base) / name).is_dir():
            pytest.skip(f"needs {name} below $EQUILIBRIA_DATA")
        return Path(base) / name

    return find
