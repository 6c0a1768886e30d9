"""Metrics as JSON lines and as TensorBoard events, from one call."""

from __future__ import annotations

from typing import Any, Self

from equilibria.train.run_folder import RunFolder


class MetricsLog:
    """Writes records to `metrics.jsonl` and their numbers to `tensorboard/`.

    Args:
        run: the run folder.
        step: where this process starts; older events after it are hidden by TensorBoard.
    """

    def __init__(self, run: RunFolder, step: int) -> None:
        # here and not above: the import takes longer than all the rest of ours together
        from torch.utils.tensorboard.writer import SummaryWriter

        self._run = run
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Record one line; its kind becomes the tag's group."""
        self._run.append_metrics(record)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
