"""Lines of the metrics, however long somebody has made them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_MAX_LINE = 2**24
"""Bytes; the longest of ours, the trace of a solve of ten thousand steps, has half of them."""
_MAX_FILE = 2**32


def lines_of(file: Path) -> Iterator[str]:
    """The lines of a file; one that is longer than a record can be comes in pieces, as none.

    Raises:
        OSError: it cannot be read, or is far larger than the metrics of a run.
    """
    with file.open("rb") as lines:
        if os.fstat(lines.fileno()).st_size > _MAX_FILE:
            raise OSError(errno.EFBIG, f"it has more than {_MAX_FILE:,} bytes", str(file))
        while line := lines.readline(_MAX_LINE):
            # a crash may have cut inside of a character
            yield line.decode(errors="replace")
