"""What the loop knows of every sample: its best iterate, whether and how it finished."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from equilibria.core.iterate import Iterate, Measurement, choose
from equilibria.core.status import RUNNING, Status

Keep = Literal["best", "last"]


class Ledger:
    """The books of a solve that stops sample by sample.

    `fused` is the compiled "bookkeeping", if there is one: the same decisions in one call.
    """

    def __init__(
        self,
        first: Iterate,
        measurement: Measurement,
        keep: Keep,
        fused: ModuleType | None = None,
    ) -> None:
        batch, device = first.z.shape[0], first.z.device
        self.kept = first
        self.measurement = measurement
        self.status = torch.full((batch,), RUNNING, dtype=torch.int8, device=device)
        self.num_steps = torch.zeros(batch, dtype=torch.int64, device=device)
        self.frozen: tuple[Tensor, Tensor] | None = None
        """Samples that go on (B,), and where the others stay; None while all go on."""
        self._keep: Keep = keep
        self._fused = fused
        self._active: Tensor | None = None  # (B,); None while all go on
        self._archive: _Archive | None = None

    def enter(
        self, current: Iterate, measured: Measurement, codes: Tensor | None, step: int
    ) -> bool:
        """Take note of an iterate; whether the solve is over."""
        if codes is None and self._active is None:
            if step > 0:
                self._take_all(current, measured)
            return False
        codes = torch.full_like(self.status, RUNNING) if codes is None else codes
        if self._fused is not None and measured.kernels is not None:
            return self._enter_fused(self._fused, current, measured, codes, step)
        codes = torch.where(torch.isfinite(measured.residual), codes, Status.NONFINITE)
        active = self.status == RUNNING if self._active is None else self._active
        if step > 0:
            worth = self._better(measured)
            if self._keep == "best":
                # a runaway point is not worth keeping, however small rounding makes its residual
                worth = (worth & (codes != Status.DIVERGED)) | (codes == Status.SUCCESS)
            self._take(active & worth, current, measured)
        return self._finish(active & (codes != RUNNING), codes, step)

    def shown(self, measured: Measurement) -> Measurement:
        """A measurement for the trace: NaN for samples that have finished."""
        if self._active is None:
            return measured
        return Measurement(torch.where(self._active, measured.residual, torch.nan), measured.image)

    @property
    def rows_going_on(self) -> Tensor | None:
        """Indices (b,) of the samples of the present batch that go on; None while all do."""
        return None if self._active is None else self._active.nonzero().squeeze(1)

    def part_with_finished(self, rows: Tensor) -> None:
        """Put what is known of the finished samples away and go on with `rows` (b,) only."""
        if self._archive is None:
            self._archive = _Archive(self)
        self._archive.file(self)
        self._archive.origin = self._archive.origin[rows]
        self.kept = Iterate(*(tensor[rows] for tensor in self.kept))
        self.measurement = self.measurement.of_rows(rows)
        self.status, self.num_steps = self.status[rows], self.num_steps[rows]
        self.frozen = self._active = None

    @property
    def origin(self) -> Tensor:
        """Which samples of the whole batch the present ones are (b,)."""
        if self._archive is not None:
            return self._archive.origin
        return torch.arange(self.status.shape[0], device=self.status.device)

    def close(self) -> None:
        """Bring back those who left; from here on the books are of the whole batch again."""
        if self._archive is not None:
            self._archive.file(self)
            self._archive.restore(self)

    def _better(self, measured: Measurement) -> Tensor:
        """Mask (B,) of the samples whose new iterate may replace the kept one."""
        if self._keep == "last":
            return torch.isfinite(measured.residual)
        return measured.residual < self.measurement.residual

    def _take_all(self, current: Iterate, measured: Measurement) -> None:
        """`_take` of all samples that are better, which usually is every one."""
        if self._keep == "best" and measured.all_improve_on(self.measurement):
            self.kept, self.measurement = current, measured
        else:
            self._take(self._better(measured), current, measured)

    def _take(self, rows: Tensor, current: Iterate, measured: Measurement) -> None:
        if bool(rows.all()):  # by reference: no copy while all improve
            self.kept, self.measurement = current, measured
        elif bool(rows.any()):
            self.kept = choose(rows, current, self.kept)
            self.measurement = measured.where(rows, self.measurement)

    def _finish(self, finished: Tensor, codes: Tensor, step: int) -> bool:
        if bool(finished.any()):
            self.status = torch.where(finished, codes, self.status)
            self.num_steps = torch.where(finished, step, self.num_steps)
            self._active = self.status == RUNNING
            if not bool(self._active.any()):
                return True
        elif not self.status.shape[0]:
            return True  # an empty batch
        return self._hold()

    def _enter_fused(
        self,
        fused: ModuleType,
        current: Iterate,
        measured: Measurement,
        codes: Tensor,
        step: int,
    ) -> bool:
        """`enter`, decided in one call; what is kept of the states remains to be chosen."""
        batch = self.status.shape[0]
        taken, active, num_taken, num_active = fused.enter(
            codes.numpy(), measured.arrays[0], self.measurement.arrays[0], self.status.numpy(),
            self.num_steps.numpy(), step, self._keep == "best",
        )  # fmt: skip
        if num_taken == batch > 0:
            self.kept, self.measurement = current, measured
        elif num_taken:
            rows = torch.from_numpy(taken)
            self.kept = choose(rows, current, self.kept, fused)
            self.measurement = measured.where(rows, self.measurement)
        if num_active == 0:
            return True
        if num_active < batch:
            self._active = torch.from_numpy(active)
        return self._hold()

    def _hold(self) -> bool:
        """Keep the finished samples where they are; the solve goes on."""
        if self._active is not None:
            self.frozen = self._active, self.kept.z
        return False


class BlindLedger:
    """The ledger of a solve that decides nothing by numbers, so that nothing has to wait."""

    frozen = None
    rows_going_on = None

    def __init__(self, first: Iterate) -> None:
        self._first = first
        self.kept = first

    def enter(
        self, current: Iterate, measured: Measurement, codes: Tensor | None, step: int
    ) -> bool:
        """Take note of an iterate; whether the solve is over."""
        self.kept, self.measurement = current, measured
        if codes is None:
            return False
        finite = torch.isfinite(measured.residual)
        self.status = torch.where(finite, codes, Status.NONFINITE)
        self.num_steps = torch.full_like(codes, step, dtype=torch.int64)
        self.kept = choose(finite, current, self._first)
        return True

    def shown(self, measured: Measurement) -> Measurement:
        """A measurement for the trace."""
        return measured

    def close(self) -> None:
        """Nobody has left."""


class _Archive:
    """The books of the whole batch, while only some of it is still solved."""

    def __init__(self, ledger: Ledger) -> None:
        self.origin = ledger.origin
        self._kept = Iterate(*(torch.empty_like(tensor) for tensor in ledger.kept))
        self._norms = Measurement(*(torch.empty_like(norm) for norm in ledger.measurement))
        self._status = torch.empty_like(ledger.status)
        self._num_steps = torch.empty_like(ledger.num_steps)

    def file(self, ledger: Ledger) -> None:
        """Write down what is known of the samples that are still here."""
        for whole, part in (
            *zip(self._kept, ledger.kept, strict=True),
            *zip(self._norms, ledger.measurement, strict=True),
            (self._status, ledger.status),
            (self._num_steps, ledger.num_steps),
        ):
            whole[self.origin] = part

    def restore(self, ledger: Ledger) -> None:
        """Give everything back."""
        ledger.kept, ledger.measurement = self._kept, self._norms
        ledger.status, ledger.num_steps = self._status, self._num_steps
