"""Cells with a guarantee: one fixed point, whatever the parameters, and a way to it.

Shape suffixes: B batch, D width, C channels, K kernel, H and W height and width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.core.autocast import without_autocast
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.core.state import State
from equilibria.deq import Cell

_NUM_SQUARINGS = 6


class _Monotone(Cell):
    """What the dense and the convolutional cell share: margin, step size, rate of contraction."""

    def __init__(self, margin: float, relative_step: float) -> None:
        super().__init__()
        if not margin > 0.0 or not math.isfinite(margin):
            raise UserError(
                f"margin={margin} must be positive: with 0 or less nothing guarantees that there "
                "is one fixed point"
            )
        if not 0.0 < relative_step < 2.0:
            raise UserError(
                f"relative_step={relative_step} must lie between 0 and 2, the range in which every "
                "step is a contraction"
            )
        self.margin = margin
        self.relative_step = relative_step

    @abstractmethod
    def norm_bound(self) -> Tensor:
        """A number L that |I - W| does not exceed, for the parameters as they are; a scalar."""

    def step_size(self) -> Tensor:
        """alpha = relative_step * m / L^2, a scalar without a gradient.

        z* does not depend on it, hence no gradient is lost.
        """
        return self.relative_step * self.margin / self.norm_bound().square()

    def contraction_rate(self) -> Tensor:
        """A factor below 1 by which every evaluation shrinks distances, at least; a scalar.

        |f(z) - f(y)| <= rate * |z - y|,    rate^2 = 1 - 2 alpha m + alpha^2 L^2
        """
        ratio = self.margin / self.norm_bound()
        step = self.relative_step
        return (1.0 - (2.0 * step - step * step) * ratio.square()).sqrt()

    def distance_bound(self, solution: Solution) -> Tensor:
        """How far a solution can be from the true fixed point, by proof: rms(z - z*) at most, (B,).

        rms(z - z*) <= rms(f(z) - z) / (1 - rate)

        For the parameters as they were in the solve. In exact arithmetic: what the residual loses
        to rounding is not in it.
        """
        return solution.residual / (1.0 - self.contraction_rate())


class MonotoneInjection(NamedTuple):
    """What one solve of a `MonotoneCell` needs: I - alpha (I - W), and alpha (U x + b)."""

    step_DD: Tensor
    drive_BD: Tensor


class MonotoneCell(_Monotone):
    """A fully connected cell whose fixed point exists and is unique, for any parameters (monDEQ).

        z* = relu(W z* + U x + b),    W = (1 - m) I - A^T A + B - B^T,    m > 0.

    The symmetric part of I - W is m I + A^T A, hence I - W is strongly monotone, however large the
    parameters grow, and nothing has to be clipped or projected while training. W itself may be of
    any size, so that plain iteration may diverge. The map of this cell is therefore one
    forward-backward step

        f(z) = relu(z - alpha ((I - W) z - U x - b)),    0 < alpha < 2 m / L^2,    L >= |I - W|,

    which has the same fixed point and is a contraction: with enough steps `Picard` always gets
    there. Its rate is sqrt(1 - m^2 / L^2) at worst. At the default margin `Anderson` and `Broyden`
    need half the steps; below a margin of about .3 solves are long, and `Broyden` the better
    choice. alpha also scales the residual that a solve reports: `distance_bound` says what it means
    for z.

    Use it where a guarantee is worth a smaller class of maps: certified robustness, physics,
    solves that must never fail. Otherwise an ordinary cell with weight norm or Jacobian
    regularisation is freer. relu is part of the proof, which needs a proximal operator that is the
    same for every alpha.

    W, L and alpha are computed once per solve, outside of autocast: about 9 products of D x D
    matrices. An evaluation is one product with a D x D matrix, like any dense cell.

    Args:
        num_inputs: width of x.
        width: width of z, D.
        margin: m. Smaller allows more maps (W has eigenvalues with a real part up to 1 - m) and
            slower solves; 1 by default.
        relative_step: alpha in units of m / L^2, between 0 and 2; 1 has the best proven rate.

    Shape:
        x (B, num_inputs), z (B, width).

    Raises:
        UserError: a margin that is not positive, a relative_step outside its range, widths below 1.

    References:
        Winston and Kolter, Monotone operator equilibrium networks, arXiv 2006.08591.
        For L: Delattre, Barthelemy, Araujo and Allauzen, arXiv 2305.16173 (Gram iteration).
    """

    def __init__(
        self, num_inputs: int, width: int, *, margin: float = 1.0, relative_step: float = 1.0
    ) -> None:
        super().__init__(margin, relative_step)
        check_positive_integer("num_inputs", num_inputs)
        check_positive_integer("width", width)
        self.width = width
        self.input = nn.Linear(num_inputs, width)
        # |A|^2 and |B - B^T| about 1: L stays near m + 1, and solves are short at the start.
        self.damping_DD = nn.Parameter(torch.randn(width, width) / (2.0 * math.sqrt(width)))
        self.rotation_DD = nn.Parameter(torch.randn(width, width) / (3.0 * math.sqrt(width)))

    def weight(self) -> Tensor:
        """W, (D, D)."""
        return self._identity() - self.operator()

    def operator(self) -> Tensor:
        """I - W, (D, D): strongly monotone with margin m."""
        A, B = self.damping_DD, self.rotation_DD
        with without_autocast(A.device):
            return self.margin * self._identity() + A.mT @ A - B + B.mT

    def norm_bound(self) -> Tensor:
        return operator_norm_bound(self.operator())

    def inject(self, x: Tensor) -> MonotoneInjection:
        operator = self.operator()
        alpha = self.relative_step * self.margin / operator_norm_bound(operator).square()
        with without_autocast(operator.device):
            drive = alpha * self.input(x.to(operator.dtype))
        return MonotoneInjection(self._identity() - alpha * operator, drive)

    def select(self, injection: MonotoneInjection, rows: Tensor) -> MonotoneInjection:
        """That of some samples only."""
        return injection._replace(drive_BD=injection.drive_BD[rows])

    def initial_state(self, injection: MonotoneInjection) -> State:
        return torch.zeros_like(injection.drive_BD)

    def forward(self, z: State, injection: MonotoneInjection) -> State:
        return F.relu(F.linear(z, injection.step_DD) + injection.drive_BD)

    def extra_repr(self) -> str:
        return f"width={self.width}, margin={self.margin}, relative_step={self.relative_step}"

    def _identity(self) -> Tensor:
        like = self.damping_DD
        return torch.eye(self.width, dtype=like.dtype, device=like.device)


class MonotoneConvInjection(NamedTuple):
    """What one solve needs: 1 - alpha m, sqrt(alpha) A, alpha (B - B^T), alpha (U x + b)."""

    keep: Tensor
    damping_CCKK: Tensor
    rotation_CCKK: Tensor
    drive_BCHW: Tensor


class MonotoneConvCell(_Monotone):
    """`MonotoneCell` with convolutions (stride 1, zeros beyond the border) for A, B and U.

        z* = relu(W z* + U x + b),    W = (1 - m) I - A^T A + B - B^T,

    with A^T and B^T the transposed convolutions. B - B^T is again one convolution, with the kernel
    of B minus that kernel flipped and its channels exchanged; an evaluation costs three
    convolutions. L = m + |A|^2 + |B - B^T|, each norm bounded through the Fourier transform of the
    kernel, holds for images of any size.

    Args:
        num_inputs: channels of x.
        channels: channels of z, C.
        kernel_size: an odd number.
        margin: m, as for `MonotoneCell`.
        relative_step: as for `MonotoneCell`.

    Shape:
        x (B, num_inputs, H, W), z (B, channels, H, W).

    Raises:
        UserError: as for `MonotoneCell`; an even kernel_size.

    References:
        Winston and Kolter, arXiv 2006.08591, section 4.
    """

    def __init__(
        self,
        num_inputs: int,
        channels: int,
        *,
        kernel_size: int = 3,
        margin: float = 1.0,
        relative_step: float = 1.0,
    ) -> None:
        super().__init__(margin, relative_step)
        check_positive_integer("num_inputs", num_inputs)
        check_positive_integer("channels", channels)
        check_positive_integer("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise UserError(
                f"kernel_size={kernel_size} is even, so that an image would change its size; give "
                "an odd one"
            )
        self.padding = kernel_size // 2
        self.input = nn.Conv2d(num_inputs, channels, kernel_size, padding=self.padding)
        shape = (channels, channels, kernel_size, kernel_size)
        scale = 1.0 / (kernel_size * math.sqrt(channels))
        self.damping_CCKK = nn.Parameter(scale / 2.0 * torch.randn(shape))
        self.rotation_CCKK = nn.Parameter(scale / 3.0 * torch.randn(shape))

    def apply_operator(self, z: Tensor) -> Tensor:
        """(I - W) z, both (B, C, H, W)."""
        A = self.damping_CCKK
        damped = F.conv_transpose2d(F.conv2d(z, A, padding=self.padding), A, padding=self.padding)
        return self.margin * z + damped - F.conv2d(z, self._skew(), padding=self.padding)

    def norm_bound(self) -> Tensor:
        damping = convolution_norm_bound(self.damping_CCKK)
        return self.margin + damping.square() + convolution_norm_bound(self._skew())

    def inject(self, x: Tensor) -> MonotoneConvInjection:
        alpha = self.step_size()
        with without_autocast(self.damping_CCKK.device):
            drive = alpha * self.input(x.to(self.damping_CCKK.dtype))
        return MonotoneConvInjection(
            1.0 - alpha * self.margin, alpha.sqrt() * self.damping_CCKK, alpha * self._skew(), drive
        )

    def select(self, injection: MonotoneConvInjection, rows: Tensor) -> MonotoneConvInjection:
        """That of some images only."""
        return injection._replace(drive_BCHW=injection.drive_BCHW[rows])

    def initial_state(self, injection: MonotoneConvInjection) -> State:
        return torch.zeros_like(injection.drive_BCHW)

    def forward(self, z: State, injection: MonotoneConvInjection) -> State:
        keep, damping, rotation, drive = injection
        damped = F.conv_transpose2d(
            F.conv2d(z, damping, padding=self.padding), damping, padding=self.padding
        )
        rotated = F.conv2d(z, rotation, padding=self.padding)
        return F.relu(keep * z - damped + rotated + drive)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, relative_step={self.relative_step}"

    def _skew(self) -> Tensor:
        """The kernel of B - B^T."""
        B = self.rotation_CCKK
        return B - B.flip(2, 3).transpose(0, 1)


@torch.no_grad()
def operator_norm_bound(matrices: Tensor) -> Tensor:
    """An upper bound of the largest singular value of matrices (..., D, D); (...).

        |M|_2 = |G_k|_2^(1 / 2^k) <= |G_k|_F^(1 / 2^k),    G_0 = M,  G_{i+1} = G_i^H G_i.

    Too large by the factor D^(1 / 2^(k + 1)) at most, 1.06 for D = 1000 with k = 6. Power
    iteration would be cheaper and tend to the norm from below, where it proves nothing.

    References:
        Delattre, Barthelemy, Araujo and Allauzen, arXiv 2305.16173.
    """
    gram = matrices.detach()
    tiny = torch.finfo(gram.dtype).tiny
    size = torch.linalg.matrix_norm(gram).clamp_min(tiny)
    log_bound = size.log()
    with without_autocast(gram.device):
        for k in range(_NUM_SQUARINGS):
            gram = gram / size[..., None, None]  # or it would overflow
            gram = gram.mH @ gram
            size = torch.linalg.matrix_norm(gram).clamp_min(tiny)
            log_bound = log_bound + size.log() / 2.0 ** (k + 1)
    return log_bound.exp()


@torch.no_grad()
def convolution_norm_bound(kernel_CCKK: Tensor) -> Tensor:
    """An upper bound of the norm of a convolution with zero padding, any image size; a scalar.

    On the infinite plane the norm is the largest one of the C x C matrices of the kernel's Fourier
    transform; zero padding cuts a part out of that operator and cannot enlarge it. The transform
    is a trigonometric polynomial of degree p = (K - 1) / 2, and between N equispaced points such a
    polynomial exceeds their maximum by the factor 1 / cos(pi p / N) at most (M. Riesz), here 1.02
    in each of the two dimensions.

    References:
        Sedghi, Gupta and Long, The singular values of convolutional layers, arXiv 1805.10408.
    """
    degree = (kernel_CCKK.shape[-1] - 1) // 2
    points = max(16 * degree, 1)
    # the fft knows no half precision
    kernel = kernel_CCKK.detach().to(torch.promote_types(kernel_CCKK.dtype, torch.float32))
    transform = torch.fft.rfft2(kernel, s=(points, points)).flatten(2).permute(2, 0, 1)
    between = math.cos(math.pi * degree / points) ** 2
    return operator_norm_bound(transform).max().to(kernel_CCKK.dtype) / between
