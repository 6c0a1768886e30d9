"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from equilibria.core.errors import UserError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM)
"""Errors that say more about the machine than about us."""


def disk_error(error: OSError) -> UserError:
    """What a full disk, or one that may not be written to, means for whoever called a command.

    Raises:
        OSError: the error is of another kind.
    """
    if error.errno not in _OF_THE_DISK:
        raise error
    where = f" ({error.filename})" if error.filename else ""
    return UserError(
        f"{error.strerror}{where}; make room or give another folder, and call again. Checkpoints "
        "that were complete still are"
    )


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: write beside it, flush to disk, rename over it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_temporaries(path: Path) -> None:
    """Delete what killed processes left of replacing a file; nobody may be replacing it now."""
    for leftover in path.parent.glob(f".{path.name}.{'?' * 8}"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {what}") from error


def flush_file(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
