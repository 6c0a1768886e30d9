"""Where downloads and encoded texts are kept, and writing folders whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from equilibria.core.errors import UserError

ENVIRONMENT = "EQUILIBRIA_CACHE"


def cache_folder(given: Path | None = None) -> Path:
    """The folder given, or that of $EQUILIBRIA_CACHE, or `equilibria` in the user's cache."""
    if given is not None:
        return given.expanduser().absolute()
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "equilibria").absolute()


@contextlib.contextmanager
def written_whole(folder: Path) -> Generator[Path]:
    """A folder to write to that appears under its name at the end, or leaves nothing behind.

    Where another process was faster its folder stays, since the name says what is in it.

    Raises:
        UserError: the place cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        os.chmod(scratch, 0o755)  # as others of the group may read it: mkdtemp thinks of secrets
        yield scratch
        for path in scratch.iterdir():
            _flush(path)
        _flush(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():
                raise
        _flush(folder.parent)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"'{folder}' cannot be written to ({error.strerror or error}); free some space, or set "
        f"{ENVIRONMENT} to another folder. Nothing half-written was left there"
    )
