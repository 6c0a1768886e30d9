"""Start where the previous call ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.core.warm_start import Form, Known, Samples, WarmStart

OnChange = Literal["cold", "overlap", "raise"]


@dataclass
class _Last:
    """Where the previous call ended: rows (B, D), and who ended well (B,)."""

    rows: Tensor | None = None
    good: Tensor | None = None
    form: Form | None = None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Previous(WarmStart):
    """Start every sample at the fixed point that its row of the batch had in the previous call.

        z_0(call n)[b] = z*(call n - 1)[b]

    For calls in which row b goes on with the same thing: frames of a video, steps of molecular
    dynamics or of a control loop, tokens of a generation, full-batch training. In shuffled
    training row b is another sample at every call: use `Cached`.

    Memory: one state, on the device of the solve. Nothing waits for the device.

    Args:
        on_change: what to do when batch size or form of the state are not those of the previous
            call. "cold" starts cold, which `Solution.warm_started` reports. "overlap" lets the
            rows that both batches have start warm, if only the batch size differs (streams that
            end at different times, longest first). "raise" is for who relies on warm starts.

    Raises:
        UserError: an unknown `on_change`; at a call, under "raise", a change.
    """

    on_change: OnChange = "cold"

    def __post_init__(self) -> None:
        if self.on_change not in get_args(OnChange):
            raise UserError(
                f"on_change={self.on_change!r} is not one of "
                f"{', '.join(map(repr, get_args(OnChange)))}"
                f"{nearest(str(self.on_change), get_args(OnChange))}"
            )

    @property
    def needs_memory(self) -> bool:
        """The previous state."""
        return True

    @property
    def recalls(self) -> bool:
        """That is all it does."""
        return True

    def init(self) -> _Last:
        """No call yet."""
        return _Last()

    def start(self, samples: Samples, memory: _Last) -> Known | None:
        """The rows of the previous call, where they fit."""
        if memory.rows is None or memory.good is None:
            return None
        rows, good = memory.rows.to(samples.like), memory.good.to(samples.like.device)
        before, now = rows.shape[0], samples.like.shape[0]
        same_form = memory.form == samples.form
        if same_form and before == now and memory.lengths == samples.lengths:
            return rows, good
        if self.on_change == "raise":
            raise UserError(
                f"the previous call had {before} samples of another batch or form than the {now} "
                f"of this one, and {self!r} is not to start cold; clear the memory before such a "
                'call (deq.memory.clear()), or use on_change="cold"'
            )
        ragged = memory.lengths is not None or samples.lengths is not None
        if self.on_change == "cold" or not same_form or ragged:
            return None
        return _resized(rows, now), _resized(good, now)

    def remember(self, rows: Tensor, good: Tensor, samples: Samples, memory: _Last) -> None:
        """Keep this call in the place of the previous one."""
        memory.rows, memory.good = rows, good
        memory.form, memory.lengths = samples.form, samples.lengths


def _resized(rows: Tensor, size: int) -> Tensor:
    """Cut to `size` rows, or filled up with rows of zeros."""
    if rows.shape[0] >= size:
        return rows[:size]
    more = rows.new_zeros(size - rows.shape[0], *rows.shape[1:])
    return torch.cat((rows, more))
