"""Which files of a folder are the splits of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from equilibria.core.errors import UserError

SPLITS = ("train", "valid", "test")
LAYOUTS = ("wiki.{}.tokens", "ptb.{}.txt", "{}.txt", "{}.tokens")
"""How published sets name their files."""
_ALSO_VALID = ("validation", "val", "dev")


class SplitFiles(NamedTuple):
    """One file per split."""

    train: Path
    valid: Path
    test: Path


def find_splits(folder: Path) -> SplitFiles:
    """The three files of a folder, by whichever of `LAYOUTS` it has.

    Raises:
        UserError: no such folder, no layout, a split that is missing, or several layouts.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"'{folder}' {what}; give a folder with one file per split, named as in "
            f"{_names(LAYOUTS[0])}"
        )
    found = {layout: _present(folder, layout) for layout in LAYOUTS}
    found = {layout: files for layout, files in found.items() if files}
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"'{folder}' has no split of a text, but {there}; expected are "
            f"{'; or '.join(_names(layout) for layout in LAYOUTS)}"
        )
    if len(found) > 1:
        named = "; ".join(
            ", ".join(path.name for path in files.values()) for files in found.values()
        )
        raise UserError(
            f"'{folder}' has files of several texts ({named}), and which is meant is not clear; "
            "leave those of one in it"
        )
    ((layout, files),) = found.items()
    missing = [split for split in SPLITS if split not in files]
    if missing:
        names = ", ".join(layout.format(split) for split in missing)
        raise UserError(
            f"'{folder}' has {', '.join(path.name for path in files.values())} but not {names}; "
            f"put what is missing beside them{_misnamed(folder, layout)}"
        )
    return SplitFiles(*(files[split] for split in SPLITS))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, one after the other, in bounded memory.

    Raises:
        UserError: unreadable, not UTF-8 (with the place), or without a word.
    """
    try:
        has_words = False
        # Other line ends than these are characters of the text; a byte-order mark is the editor's.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                has_words = has_words or not line.isspace()
                yield line
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be read ({error.strerror or error}); check its name and permissions"
        ) from None
    if not has_words:
        raise UserError(f"'{path}' is empty or holds only white space; give a text of words")


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _present(folder: Path, layout: str) -> dict[str, Path]:
    paths = {split: folder / layout.format(split) for split in SPLITS}
    return {split: path for split, path in paths.items() if path.is_file()}


def _names(layout: str) -> str:
    return ", ".join(layout.format(split) for split in SPLITS)


def _misnamed(folder: Path, layout: str) -> str:
    for other in _ALSO_VALID:
        path = folder / layout.format(other)
        if path.exists():
            return f" (is {path.name} the validation split? It is to be called 'valid' here)"
    return ""


def _not_utf8(path: Path) -> UserError:
    """Where the first byte is that belongs to no character."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return UserError(
                    f"'{path}' is not UTF-8 text: byte {offset + error.start} (line {number}) is "
                    f"0x{line[error.start]:02x}, which is part of no character there; convert it "
                    "with `iconv -f OLD_ENCODING -t UTF-8`"
                )
            offset += len(line)
    return UserError(f"'{path}' is not UTF-8 text; convert it with `iconv -f OLD -t UTF-8`")
