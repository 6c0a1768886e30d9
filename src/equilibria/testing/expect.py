"""Comparisons of the contracts; their messages say which promise was broken.

pytest explains bare asserts only in files that it rewrites, which those of an installed package
are not. So the words are here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expect(holds: bool | Tensor, promise: str) -> None:
    """Fail with `promise` unless `holds` (all elements of it)."""
    if not (bool(holds.all()) if isinstance(holds, Tensor) else holds):
        raise AssertionError(f"contract broken: {promise}")


def expect_equal(found: object, wanted: object, promise: str) -> None:
    """Fail with `promise` and both values unless they are the same; tensors to the last bit."""
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        same = found.dtype == wanted.dtype and found.shape == wanted.shape
        same = same and bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())
    else:
        same = found == wanted
    if not same:
        raise AssertionError(f"contract broken: {promise}\nfound  {found}\nwanted {wanted}")


def expect_close(
    found: Tensor, wanted: Tensor, promise: str, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Fail with `promise` and the difference unless the tensors agree to the tolerances."""
    torch.testing.assert_close(
        found,
        wanted,
        rtol=rtol,
        atol=atol,
        check_dtype=False,
        equal_nan=True,
        msg=lambda difference: f"contract broken: {promise}\n{difference}",
    )


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample in float64: (B, ...) -> (B,)."""
    flat = rows(x.detach().double())
    return flat.square().sum(1).div(max(flat.shape[1], 1)).sqrt()


def rows(x: Tensor) -> Tensor:
    """(B, ...) -> (B, D), also for one number per sample and for an empty batch."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
