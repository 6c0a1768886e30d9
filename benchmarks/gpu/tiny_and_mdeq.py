"""Training steps of the tanh cell and of the MDEQ block over the batch, cells plain and compiled.

As training_step.py, at batches that a GPU is given; every library runs the same f, once as it is
and once compiled by torch.compile (compile once, at the first call; its time does not count).

    python -m benchmarks.gpu.tiny_and_mdeq [--device cuda] [--tiny] [tanh mdeq]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import cells, options
from benchmarks.cells import Work
from benchmarks.methods import ours, reached
from benchmarks.options import Options
from benchmarks.training_step import TOLERANCE, compare, methods
from equilibria import Anderson

CELLS: dict[str, Callable[..., Work]] = {"tanh": cells.tanh, "mdeq": cells.multiscale}
BATCHES = {"tanh": (32, 1024), "mdeq": (8, 32, 128)}
TINY: dict[str, dict[str, int]] = {
    "tanh": {"batch": 4},
    "mdeq": {"batch": 1, "channels": 8, "size": 4},
}


def measure(name: str, batch: int, given: Options) -> list[dict[str, Any]]:
    """Plain and compiled."""
    sizes = TINY[name] if given.tiny else {"batch": batch}
    works = [CELLS[name](**sizes, device=given.device)]
    if given.device.type == "cuda":
        works.append(CELLS[name](**sizes, compiled=True, device=given.device))
    else:
        print("compiled cells: needs CUDA, skipped")
    tight = 1e-3 if given.tiny else 1e-6
    exact = reached(works[0], ours(Anderson(20), max_steps=200)(tight, tight))[1]
    tolerance = 1e-2 if given.tiny else TOLERANCE
    return [
        {
            "name": f"{name}, batch {batch}",
            "about": each.about,
            **compare(
                each, methods(given.device), exact, given, title=each.about, tolerance=tolerance
            ),
        }
        for each in works
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells and save them."""
    given = options.parse(__doc__, arguments, list(CELLS))
    rows = [
        row
        for name in given.names
        for batch in (BATCHES[name][:1] if given.tiny else BATCHES[name])
        for row in measure(name, batch, given)
    ]
    given.save("tiny_and_mdeq", tolerance=TOLERANCE, rows=rows)


if __name__ == "__main__":
    main()
