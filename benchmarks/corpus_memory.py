"""How much memory and time does a text of the size of WikiText-103 take?

    python -m benchmarks.corpus_memory [--tiny]

Writes a made-up text of 103,227,021 tokens and 267,735 different words (Zipf's frequencies, 25
words a line) to a temporary folder, encodes it in a process of its own, opens it again in another,
and cuts training segments from all over it. Reported is by how much the largest resident size of
each process was above that of importing the library, pages of the mapped file counted in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import options

NUM_TOKENS, NUM_WORDS, WORDS_PER_LINE = 103_227_021, 267_735, 25

CODE = """
import json, resource, sys, time
from pathlib import Path
from equilibria.data.segments import TrainingSegments
from equilibria.data.word_corpus import WordCorpusConfig
size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = size(), time.perf_counter()
corpus = WordCorpusConfig(folder=Path(sys.argv[1]), cache=Path(sys.argv[2])).load()
opened = time.perf_counter() - start
after_opening = size() - before
segments = TrainingSegments(corpus.train, 56, 150)
start = time.perf_counter()
for _ in range(200):
    segments.next_segment()
print(json.dumps({
    "tokens": len(corpus.train), "words": len(corpus.vocabulary), "seconds": opened,
    "mib": after_opening, "mib_with_segments": size() - before,
    "microseconds_per_segment": 1e6 * (time.perf_counter() - start) / 200,
}))
"""


def write(path: Path, num_tokens: int, num_words: int) -> None:
    """Every word at least once, the rest by Zipf; line ends are tokens, too."""
    draw = np.random.default_rng(0)
    num_lines = num_tokens // (WORDS_PER_LINE + 1)
    rest = num_tokens - num_lines * (WORDS_PER_LINE + 1)
    weights = 1.0 / np.arange(1, num_words)
    edges = np.cumsum(weights) / weights.sum()
    words = np.array([f"w{i}" for i in range(num_words - 1)])  # and the end of a line
    waiting = num_words - 1
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, num_lines, 20_000):
            count = min(20_000, num_lines - begin)
            ids = np.searchsorted(edges, draw.random((count, WORDS_PER_LINE)))
            flat, every = ids.reshape(-1), min(waiting, ids.size)
            flat[:every] = np.arange(num_words - 1 - waiting, num_words - 1 - waiting + every)
            waiting -= every
            file.writelines(" ".join(line) + "\n" for line in words[ids])
        if rest:
            file.write(" ".join(["w0"] * (rest - 1)) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, encode, open again, save."""
    given = options.parse(__doc__, arguments)
    num_tokens, num_words = (2_000, 300) if given.tiny else (NUM_TOKENS, NUM_WORDS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start = time.perf_counter()
        write(folder / "train.txt", num_tokens, num_words)
        for split in ("valid", "test"):
            (folder / f"{split}.txt").write_text("w0 w1\n" * 100)
        print(f"written in {time.perf_counter() - start:.0f} s")
        if given.tiny:  # enough for one segment of the size below
            (folder / "train.txt").write_text((folder / "train.txt").read_text() * 10)
        size = (folder / "train.txt").stat().st_size
        rows = {}
        for name in ("first", "again"):
            run = subprocess.run(
                [sys.executable, "-c", CODE, str(folder), str(folder / "cache")],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            rows[name] = json.loads(run.stdout)
            print(name, rows[name])
    given.save("corpus_memory", text_mib=round(size / 2**20), **rows)


if __name__ == "__main__":
    main()
