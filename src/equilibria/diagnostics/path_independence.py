"""Whether the fixed point depends on where the solve started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from equilibria.api import SolveSettings, solve_with
from equilibria.core.iterate import rms
from equilibria.core.state import Layout, State
from equilibria.deq import DEQ
from equilibria.diagnostics.isolation import untouched


@dataclass(frozen=True)
class Arrival:
    """Where one kind of start led, per sample (B,).

    Args:
        start: "zeros", "noise", "large noise" or "other samples".
        distance: rms distance to the reference fixed point, over the rms of that.
        cosine: of the two fixed points, the alignment score of the reference.
        converged: whether this solve and the reference both met the tolerance.
        residual: relative residual of this solve.
    """

    start: str
    distance: Tensor
    cosine: Tensor
    converged: Tensor
    residual: Tensor


@dataclass(frozen=True)
class PathIndependence:
    """Fixed points reached from several starts, compared with the one from the usual start.

    Args:
        arrivals: one per kind of start.
        tolerance: distance up to which two fixed points count as the same.
    """

    arrivals: tuple[Arrival, ...]
    tolerance: float

    @property
    def alignment(self) -> float:
        """Mean cosine over all starts and samples; 1 for a path-independent model."""
        return _mean([arrival.cosine for arrival in self.arrivals], of_none=1.0)

    @property
    def score(self) -> float:
        """Share of (start, sample) pairs that converged to the reference fixed point; 0 to 1."""
        same = [a.converged & (a.distance <= self.tolerance) for a in self.arrivals]
        return _mean(same, of_none=1.0)

    @property
    def different(self) -> float:
        """Share of the pairs that converged, but to another fixed point."""
        other = [a.converged & (a.distance > self.tolerance) for a in self.arrivals]
        return _mean(other, of_none=0.0)

    def __str__(self) -> str:
        lines = [
            f"path independence {self.score:.0%} (same fixed point), {self.different:.0%} "
            f"reached another one, mean alignment {self.alignment:.3f}",
            "start             median distance   largest   converged",
        ]
        lines += [
            f"{a.start:16}  {float(a.distance.median()):15.1e}   {float(a.distance.max()):7.1e}   "
            f"{float(a.converged.double().mean()):9.0%}"
            for a in self.arrivals
            if a.distance.numel()
        ]
        return "\n".join(lines)


def path_independence(
    deq: DEQ,
    *inputs: Any,
    settings: SolveSettings | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    **named_inputs: Any,
) -> PathIndependence:
    """Solve the same batch from several initial states and compare where it ends.

    Models that end at the same place whatever the start make better use of more steps at test
    time, and only they may be warm-started without changing the answer. Starts: zeros, noise of
    the size of the fixed point, noise ten times as large, and the fixed points of other samples
    (the one that the reference uses). Nothing of the layer changes.

    Args:
        deq: the layer, in the mode to be examined.
        *inputs: a batch, as for the layer.
        settings: of the solves; by default the layer's. Give more steps and a tighter tolerance
            than in training, since a distance is blurred by what the residuals leave open.
        tolerance: relative distance up to which two fixed points are the same.
        seed: of the noise.
        batch_dims: as for the layer.
        segments: as for the layer.
        **named_inputs: as for the layer.

    References:
        Anil et al., Path independent equilibrium models can better exploit test-time
        computation, arXiv 2211.09961 (asymptotic alignment score).
    """
    with untouched(deq), torch.no_grad():
        injection = deq.cell.inject(*inputs, **named_inputs)
        return path_independence_of_solve(
            lambda z: deq.cell(z, injection),
            deq.cell.initial_state(injection),
            settings=(settings or deq.settings).cold(),
            tolerance=tolerance,
            seed=seed,
            batch_dims=batch_dims,
            segments=segments,
        )


def path_independence_of_solve(
    f: Callable[[State], State],
    z0: State,
    *,
    settings: SolveSettings = SolveSettings(),
    tolerance: float = 1e-2,
    seed: int = 0,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
) -> PathIndependence:
    """The same for a plain `solve(f, z0)`; f has to be the same function at every call."""
    quiet = replace(settings, on_failure="ignore")
    run = partial(solve_with, f, settings=quiet, batch_dims=batch_dims, segments=segments)
    with torch.no_grad():
        reference = run(z0)
        layout = Layout.of(reference.z, batch_dims, segments)
        packed = layout.pack(reference.z)
        arrivals: list[Arrival] = []
        for name, start in _starts(packed, layout.norm_scale, seed).items():
            found = run(layout.unpack(start))
            z = layout.pack(found.z)
            arrivals.append(
                Arrival(
                    start=name,
                    distance=rms(z - packed) / rms(packed).clamp_min(_tiny(packed)),
                    cosine=torch.nn.functional.cosine_similarity(z, packed, dim=1),
                    converged=found.converged & reference.converged,
                    residual=found.relative_residual,
                )
            )
    return PathIndependence(tuple(arrivals), tolerance)


def _starts(fixed_point: Tensor, scale: Tensor | None, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = (rms(fixed_point) if scale is None else rms(fixed_point) * scale).unsqueeze(1)
    noise = size * torch.randn(fixed_point.shape, generator=draw).to(fixed_point)
    starts = {
        "zeros": torch.zeros_like(fixed_point),
        "noise": noise,
        "large noise": -10.0 * noise,
    }
    if fixed_point.shape[0] > 1:
        starts["other samples"] = fixed_point.roll(1, dims=0)
    return starts


def _mean(values: list[Tensor], of_none: float) -> float:
    together = torch.cat(values).double()
    return float(together.mean()) if together.numel() else of_none


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
