"""Published sets from their copies on the Hugging Face hub, as files in the usual layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from equilibria.core.errors import UserError
from equilibria.data.cache import written_whole
from equilibria.data.known_texts import KnownText
from equilibria.data.split_files import SPLITS, lines_of
from equilibria.data.word_corpus import check_counts, downloaded

Fetch = Callable[[KnownText, str], Iterable[str]]
"""The lines of a split."""

_ON_THE_HUB = {"train": "train", "valid": "validation", "test": "test"}


def get(
    known: KnownText,
    cache: Path | None = None,
    fetch: Fetch | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Download a set if it is not there yet, check it, and return its folder.

    An interrupted download is taken up again by the library that makes it; the folder appears
    when all splits are complete and have the published counts.

    Args:
        known: which set.
        cache: see `cache_folder`.
        fetch: gives the lines of a split; None takes them from the hub.
        say: called with one line for every split.

    Raises:
        UserError: the library is missing, the hub cannot be reached, the text is not the published
            one, or the cache cannot be written to.
    """
    folder = downloaded(known.name, cache)
    if not folder.is_dir():
        with written_whole(folder) as scratch:
            for split in SPLITS:
                path = scratch / known.layout.format(split)
                with path.open("w", encoding="utf-8", newline="\n") as file:
                    file.writelines(
                        line.rstrip("\n") + "\n" for line in (fetch or _hub)(known, split)
                    )
                say(check_split(known, split, path))
    return folder


def check_split(known: KnownText, split: str, path: Path) -> str:
    """Count and digest a split; a line that says what was found.

    Raises:
        UserError: it is not the published text.
    """
    count, digest = 0, hashlib.sha256()
    for line in lines_of(path):
        words = line.split()
        count += len(words) + 1
        digest.update((" ".join(words) + "\n").encode())
    check_counts(known, {split: count}, None)
    wanted = known.digests.get(split)
    if wanted is not None and digest.hexdigest() != wanted:
        raise UserError(
            f"the {split} split of {known.name} has as many tokens as published, and other words "
            f"(SHA-256 {digest.hexdigest()[:12]} instead of {wanted[:12]}); get it again"
        )
    checked = "count and digest" if wanted else "count"
    return f"{known.name} {split}: {count:,} tokens, {checked} as published"


def _hub(known: KnownText, split: str) -> Iterable[str]:
    """Rows of the copy on the hub, which the library downloads with progress, and only once."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "downloads need the package datasets: pip install 'equilibria[data]', or put the files "
            f"({known.layout.format('train')}, ...) into a folder and give that (--data.folder)"
        ) from None
    repository, configuration = known.hub
    try:
        rows: Any = datasets.load_dataset(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            repository, configuration, split=_ON_THE_HUB[split], revision=known.revision
        )
    except Exception as error:
        # The library raises whatever its many back ends do.
        raise UserError(
            f"{repository} cannot be read from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); check the "
            "connection and call again, or give a folder of files (--data.folder)"
        ) from error
    return (row[known.column] for row in rows)
