"""Metrics as JSON lines and as TensorBoard events, from one call."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from equilibria.train.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class MetricsLog:
    """Writes records to `metrics.jsonl` and their numbers to `tensorboard/`.

    Args:
        run: the run folder.
        step: where this process starts; older events after it are hidden by TensorBoard.
    """

    def __init__(self, run: RunFolder, step: int) -> None:
        self._run = run
        self._writer: SummaryWriter | None = self._events_after(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            warnings.warn(
                f"the last TensorBoard events could not be written ({error.strerror}); "
                "metrics.jsonl has all records",
                RuntimeWarning,
                stacklevel=2,
            )

    def write(self, record: dict[str, Any]) -> None:
        """Record one line; its kind becomes the tag's group.

        Raises:
            OSError: one of both could not be written; the next record is another attempt.
        """
        self._run.append_metrics(record)
        step = int(record["step"])
        if self._writer is None:
            self._writer = self._events_after(step - 1)
        try:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{record['kind']}/{name}", value, step)
        except OSError:
            # Its thread is dead, and it would fail for ever.
            with suppress(OSError):
                self._writer.close()
            self._writer = None
            raise

    def _events_after(self, step: int) -> SummaryWriter:
        # here and not above: the import takes longer than all the rest of ours together
        from torch.utils.tensorboard.writer import SummaryWriter

        return SummaryWriter(str(self._run.path / "tensorboard"), purge_step=step + 1)
