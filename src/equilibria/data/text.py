"""Text from a file, and the one English text that every CPython brings along."""

from __future__ import annotations

import codecs
import hashlib
from pathlib import Path

from equilibria.core.errors import UserError, nearest


def read_text(path: Path) -> str:
    r"""Return the text of the UTF-8 file at `path`.

    A byte-order mark is dropped and `\r\n` becomes `\n`, because both depend on the editor and
    not on the text. Nothing else is changed: case, accents, tabs and lone `\r` stay as they are.

    Raises:
        UserError: when there is no such file, it is a directory, cannot be read, is not UTF-8
            or holds nothing but white space.
    """
    raw = _read_bytes(path)
    body = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(raw) - len(body)
        raise UserError(
            f"'{path}' is not UTF-8 text: byte {offset} is 0x{raw[offset]:02x}, which is part of "
            "no character there; save it as UTF-8, or convert it with "
            "`iconv -f OLD_ENCODING -t UTF-8`"
        ) from None
    if not text.strip():
        what = "holds only white space" if text else "is empty"
        raise UserError(f"'{path}' {what}; give a file with text to learn from")
    return text.replace("\r\n", "\n")


def pydoc_topics() -> str:
    """Return the English language reference that ships inside CPython, about 465,000 characters.

    These are the texts behind `help("topics")` (`pydoc_data.topics`), in the order of their
    sorted names, with one blank line between two of them. It needs no download, but each
    version of Python has its own wording: record `digest` with every number measured on it.
    Some topics contain passages of others, so part of a test split was already read in training:
    fit for a first run and for comparing models on it, not for claims about English.

    Raises:
        UserError: when this Python was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python was packaged without `pydoc_data`, the built-in corpus; give a UTF-8 "
            "text file as the corpus's path, or use a Python from python.org"
        ) from None
    # How many newlines surround a topic, and of which kind, changed between Python versions.
    bodies = (topics[name].replace("\r\n", "\n").strip("\n") for name in sorted(topics))
    return "\n\n".join(bodies) + "\n"


def digest(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"there is no file '{path.absolute()}'; give the path of a UTF-8 text file"
            f"{nearest(path.name, _files_beside(path))}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a directory; give the path of one text file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(
            f"'{path}' cannot be read ({reason}); check the path and its permissions, "
            "or give another UTF-8 text file"
        ) from None


def _files_beside(path: Path) -> list[str]:
    """Return the names of the files in the folder of `path`; none when it cannot be listed."""
    try:
        return sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return []
