"""`equilibria data`: list, download and check the published texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from equilibria.core.errors import UserError, nearest

_USAGE = """\
usage: equilibria data list                 the published texts, and which are on this machine
       equilibria data get NAME             download one, check it, keep it in the cache
       equilibria data check NAME FOLDER    compare files of your own with the published counts

The cache is $EQUILIBRIA_CACHE, or equilibria in the user's cache folder."""


def main(arguments: Sequence[str]) -> int:
    """Run one of the three."""
    match list(arguments):
        case [] | ["-h" | "--help", *_]:
            print(_USAGE)
            return 0 if arguments else 2
        case [_, "-h" | "--help", *_]:
            print(_USAGE)
            return 0
        case ["list"]:
            _list()
        case ["get", name]:
            _get(name)
        case ["check", name, folder]:
            _check(name, Path(folder))
        case words:
            word, *rest = words
            known = ("list", "get", "check")
            if word in known:
                raise UserError(f"'data {word}' does not take {len(rest)} arguments\n{_USAGE}")
            raise UserError(f"there is no 'data {word}'{nearest(word, known)}\n{_USAGE}")
    return 0


def _list() -> None:
    from equilibria.data.known_texts import KNOWN_TEXTS
    from equilibria.data.word_corpus import downloaded

    for known in KNOWN_TEXTS.values():
        folder = downloaded(known.name)
        counts = " / ".join(f"{count:,}" for count in known.num_tokens.values())
        print(
            f"{known.name:14} {known.title} ({known.licence})\n"
            f"{'':14} {counts} tokens, {known.num_words:,} words\n"
            f"{'':14} {folder if folder.is_dir() else 'not on this machine'}"
        )


def _get(name: str) -> None:
    from equilibria.data.downloads import get
    from equilibria.data.known_texts import known_text

    print(f"{name} is in {get(known_text(name))}")


def _check(name: str, folder: Path) -> None:
    from equilibria.data.downloads import check_split
    from equilibria.data.known_texts import known_text
    from equilibria.data.split_files import SPLITS, find_splits

    known = known_text(name)
    for split, path in zip(SPLITS, find_splits(folder), strict=True):
        print(check_split(known, split, path))
