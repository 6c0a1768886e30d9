"""Stopping a run from outside without losing it."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the current step.

    A second one acts as usual, for those who cannot wait. Use as a context manager; the former
    handlers come back at its end.

    Args:
        patient: a second one changes nothing. For processes that a launcher started, which hear of
            one Ctrl-C from the terminal and from the launcher.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self.signal: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._former[number] = signal.signal(number, self._receive)
            except ValueError:
                # only the main thread may handle signals; elsewhere they keep their usual effect
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # os.write, because the signal may have come in the middle of a print
        if self._patient:
            return
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        for each, handler in self._former.items():
            signal.signal(each, handler)  # pyright: ignore[reportArgumentType]

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it; 0 when nobody asked to stop."""
        return 0 if self.signal is None else 128 + self.signal
