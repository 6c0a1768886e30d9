"""Dropout whose masks are drawn once per solve and shared, as a fixed point needs them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.scope import once


def check_dropout(name: str, probability: float) -> None:
    """Accept a probability in [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise UserError(f"{name}={probability} must be at least 0 and below 1")


def dropout_mask(like: Tensor, shape: Collection[int], probability: float) -> Tensor:
    """Draw a mask with entries 0 or 1 / (1 - p), in the dtype and on the device of `like`."""
    keep = 1.0 - probability
    mask = torch.empty(tuple(shape), device=like.device, dtype=like.dtype)
    # Not drawn in place, which torch.vmap(randomness="different") refuses.
    return torch.bernoulli(mask, keep).div_(keep if keep > 0 else 1.0)


def variational_mask(like: Tensor, width: int, probability: float, training: bool) -> Tensor | None:
    """Draw a mask (B, 1, width) with entries 0 or 1 / (1 - p), shared over time.

    `like` (B, L, ...) gives batch size, device and dtype. None when nothing is dropped, so that
    evaluation pays nothing. For cells that draw in `inject`; `VariationalDropout1d` is the module.

    Source: Gal and Ghahramani, arXiv 1512.05287; its use in DEQs, arXiv 1909.01377, section 3.
    """
    if not training or probability == 0.0:
        return None
    return dropout_mask(like, (like.shape[0], 1, width), probability)


class VariationalDropout(nn.Module):
    """Dropout with one mask per solve: x * mask, entries 0 or 1 / (1 - p).

    Inside a solve (in the map of `solve`, in `inject` or `forward` of a cell) the first call draws
    the mask and all later ones use it: every evaluation, forward and backward, sees one function.
    There is nothing to reset. Outside of a solve every call draws, as `nn.Dropout` does. Used twice
    in one map on tensors of one shape, a module drops the same entries; use two modules for two
    masks.

    Args:
        p: probability that an entry is dropped, 0 to 1.
        shared: dimensions along which all entries share one draw; none by default. (1,) drops
            whole features of a sequence (B, length, features).

    Shape:
        Any (B, ...); the output has the same shape and dtype.

    Raises:
        UserError: p outside 0 to 1, or the batch dimension among `shared`.

    References:
        Gal and Ghahramani, arXiv 1512.05287. In DEQs: arXiv 1909.01377, section 3.
    """

    def __init__(self, p: float = 0.5, *, shared: Collection[int] = ()) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise UserError(f"p={p} is no probability; give a number from 0 to 1")
        if 0 in shared:
            raise UserError("shared=0 would couple the samples of a batch; leave dimension 0 out")
        self.p = p
        self.shared = tuple(shared)

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of x in training mode; in eval mode x itself."""
        if not self.training or self.p == 0.0:
            return x
        shape = self._mask_shape(x)
        key = (self, shape[1:], x.dtype, x.device)
        return x * once(key, lambda: dropout_mask(x, shape, self.p), rows=shape[0])

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"p={self.p}" + (f", shared={self.shared}" if self.shared else "")

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """1 along the shared dimensions."""
        shared = {dim % x.dim() for dim in self.shared}
        return tuple(1 if dim in shared else size for dim, size in enumerate(x.shape))


class _Spatial(VariationalDropout):
    """Masks for (B, C, *positions), or (B, *positions, C) with channels_last."""

    num_positions: int
    drops: str

    def __init__(self, p: float = 0.5, *, channels_last: bool = False) -> None:
        positions = range(1, self.num_positions + 1)
        channel = self.num_positions + 1
        if not channels_last:
            positions, channel = range(2, self.num_positions + 2), 1
        super().__init__(p, shared=positions if self.drops == "channels" else (channel,))

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        if x.dim() != self.num_positions + 2:
            raise UserError(
                f"{type(self).__name__} got a tensor of shape {tuple(x.shape)} and takes "
                f"{self.num_positions + 2} dimensions: batch, channels, and {self.num_positions} "
                "of position"
            )
        return super()._mask_shape(x)


class VariationalDropout1d(_Spatial):
    """Drops whole channels of (B, C, L), or of (B, L, C) with `channels_last=True`."""

    num_positions, drops = 1, "channels"


class VariationalDropout2d(_Spatial):
    """Drops whole channels of (B, C, H, W), or of (B, H, W, C) with `channels_last=True`."""

    num_positions, drops = 2, "channels"


class VariationalDropout3d(_Spatial):
    """Drops whole channels of (B, C, D, H, W), or (B, D, H, W, C) with `channels_last=True`."""

    num_positions, drops = 3, "channels"


class VariationalTokenDropout1d(_Spatial):
    """Drops whole positions of (B, C, L), or of (B, L, C) with `channels_last=True`."""

    num_positions, drops = 1, "tokens"


class VariationalTokenDropout2d(_Spatial):
    """Drops whole positions of (B, C, H, W), or of (B, H, W, C) with `channels_last=True`."""

    num_positions, drops = 2, "tokens"


class VariationalTokenDropout3d(_Spatial):
    """Drops whole positions of (B, C, D, H, W), or (B, D, H, W, C) with `channels_last=True`."""

    num_positions, drops = 3, "tokens"
