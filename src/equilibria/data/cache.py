"""Where downloads and encoded texts are kept, and writing folders whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from equilibria.core.errors import UserError

ENVIRONMENT = "EQUILIBRIA_CACHE"
_SECONDS_TO_FINISH = 86_400
"""For another machine that writes to the same folder, whose locks a network disk may not tell."""


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
        _remove_leftovers(folder)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        in_use = os.open(scratch, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        fcntl.flock(in_use, fcntl.LOCK_EX)  # ends with this process, however that ends
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
        os.close(in_use)
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed processes were about to write under this name."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(OSError):  # somebody writes it, or has finished just now
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                old = os.stat(descriptor).st_mtime < time.time() - _SECONDS_TO_FINISH
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if old:
                    shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(descriptor)


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
