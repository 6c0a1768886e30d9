"""How does peak memory depend on the number of steps, and on the history of the solver?

Three questions, all in copies of the state (bytes over the bytes of one state):

- a training step of a small DEQ-Transformer block whose solves make exactly 10, 20, 40, 80 and 160
  steps, forward and backward alike, with a history of 6;
- the same solve without gradients;
- a solve with a trivial f on large states: the peak over the bytes of the history, 2 m states for
  m differences or pairs, over m.

Every number is the peak beyond what was held before the call: parameters do not count, gradients
of parameters, z0's successors and the result do. How it is measured is said in peak.py.
`Reversible` runs in float64 with a small relaxation, because in float32 so many steps cannot be
undone; its numbers are in copies of the float64 state.

    python -m benchmarks.memory [--device cuda] [--tiny]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import cells, options
from benchmarks.cells import Map, Work
from benchmarks.methods import Solve, loss_of
from benchmarks.options import Options
from benchmarks.peak import peak_bytes
from benchmarks.variants import eager_and_fused, fastest, has_torchdeq
from equilibria import (
    Anderson,
    Broyden,
    FixedSteps,
    Implicit,
    Picard,
    Reversible,
    ReversibleAdjoint,
    Unrolled,
    solve,
)
from equilibria.linear.gmres import GMRES

STEPS, HISTORY = (10, 20, 40, 80, 160), 6
HISTORIES, PAIRS = (3, 6, 10, 20), (10, 20)
UNREACHABLE = 1e-30

Make = Callable[[int], Solve]
"""Of the number of steps."""


def ours(solver: Any, adjoint: Callable[[int], Any]) -> Make:
    """Exactly so many steps."""

    def make(num_steps: int) -> Solve:
        return lambda f, z0: solve(
            f, z0, solver=solver, adjoint=adjoint(num_steps), termination=FixedSteps(num_steps),
            max_steps=num_steps, on_failure="ignore",
        ).z  # fmt: skip

    return make


def implicit(backward: Any) -> Callable[[int], Implicit]:
    """With so many backward steps."""
    return lambda num_steps: Implicit(backward, rtol=UNREACHABLE, max_steps=num_steps)


def torchdeq(name: str) -> Make:
    """With the same solver both ways."""
    from torchdeq import get_deq

    def make(num_steps: int) -> Solve:
        layer = get_deq(
            ift=True, f_solver=name, b_solver=name, f_tol=0.0, b_tol=0.0, f_stop_mode="rel",
            b_stop_mode="rel", f_max_iter=num_steps, b_max_iter=num_steps,
        )  # fmt: skip
        return lambda f, z0: layer(f, z0)[0][-1]

    return make


def training_methods(device: torch.device) -> dict[str, tuple[Make, torch.dtype]]:
    """Ways to a gradient, and what they compute in."""
    anderson = fastest(Anderson(HISTORY), device)
    found: dict[str, tuple[Make, torch.dtype]] = {
        "Implicit, Anderson both ways": (ours(anderson, implicit(anderson)), torch.float32),
        "Implicit, Anderson and 20 steps of GMRES": (
            ours(anderson, lambda num_steps: implicit(GMRES())(20)),
            torch.float32,
        ),
        "ReversibleAdjoint": (
            ours(Reversible(relaxation=0.08), lambda num_steps: ReversibleAdjoint()),
            torch.float64,
        ),
        "Unrolled(checkpoint=True), Picard": (
            ours(Picard(), lambda num_steps: Unrolled(checkpoint=True)),
            torch.float32,
        ),
        "Unrolled, Picard": (ours(Picard(), lambda num_steps: Unrolled()), torch.float32),
        "Unrolled, Anderson": (ours(anderson, lambda num_steps: Unrolled()), torch.float32),
    }
    if has_torchdeq():
        for name in ("anderson", "broyden"):
            found[f"torchdeq {name}"] = torchdeq(name), torch.float32
    return found


def solving_methods(device: torch.device) -> dict[str, Make]:
    """Solvers alone."""
    solvers = {"Anderson(6)": Anderson(HISTORY), "Broyden(20)": Broyden(20)}
    found = {
        f"{name}, {variant}": ours(solver, lambda num_steps: Implicit())
        for name, plain in solvers.items()
        for variant, solver in eager_and_fused(plain, device).items()
    }
    if has_torchdeq():
        found |= {f"torchdeq {name}": torchdeq(name) for name in ("anderson", "broyden")}
    return found


def training(given: Options) -> dict[str, dict[str, float]]:
    """Peak of a training step over the number of steps."""
    results: dict[str, dict[str, float]] = {}
    for name, (make, dtype) in training_methods(given.device).items():
        work = _work(given, dtype)

        def step(solve_: Solve, work: Work) -> None:
            loss_of(solve_(work.prepare(), work.z0)).backward()
            work.module.zero_grad(set_to_none=True)

        results[name] = _over_steps(
            lambda solve_, work=work, step=step: step(solve_, work), make, work.z0, given
        )
        print(f"training  {name:40} {results[name]}")
    return results


def solving(given: Options) -> dict[str, dict[str, float]]:
    """Peak of a solve without gradients over the number of steps."""
    work = _work(given, torch.float32)
    results: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        f = work.prepare()
        for name, make in solving_methods(given.device).items():
            results[name] = _over_steps(lambda solve_: solve_(f, work.z0), make, work.z0, given)
            print(f"solving   {name:40} {results[name]}")
    return results


def histories(given: Options) -> list[dict[str, Any]]:
    """Peak of a solve over the bytes of its history."""
    batch, width = (2, 64) if given.tiny else (8, 65_536)
    x = 0.1 * torch.randn(batch, width, device=given.device)
    c = torch.linspace(0.1, 0.9, width, device=given.device)
    z0 = torch.zeros_like(x)
    f: Map = lambda z: torch.addcmul(x, z, c)  # noqa: E731
    sizes, pairs = (HISTORIES[:1], PAIRS[:1]) if given.tiny else (HISTORIES, PAIRS)
    solvers = {
        **{f"Anderson({m})": (Anderson(m), m) for m in sizes},
        **{f"Anderson({m}, kind='II')": (Anderson(m, kind="II"), m) for m in sizes},
        **{f"Broyden({size})": (Broyden(size), size) for size in pairs},
    }
    rounded = "history_dtype='bfloat16'"
    for m in sizes:
        solvers[f"Anderson({m}, {rounded})"] = Anderson(m, history_dtype="bfloat16"), m
    for size in pairs:
        solvers[f"Broyden({size}, {rounded})"] = Broyden(size, history_dtype="bfloat16"), size
    num_steps, rows = 2 * max(*sizes, *pairs), []
    with torch.no_grad():
        for name, (plain, history) in solvers.items():
            variants = eager_and_fused(plain, given.device)
            history_states = history if plain.history_dtype else 2 * history
            if plain.history_dtype and given.device.type == "cpu":  # Numba knows no bfloat16
                variants.pop("fused", None)
            for variant, solver in variants.items():
                run = ours(solver, lambda num_steps: Implicit())(num_steps)
                peak = peak_bytes(lambda run=run: run(f, z0), given.device)
                states = peak / (z0.numel() * z0.element_size())
                rows.append(
                    {
                        "solver": name,
                        "variant": variant,
                        "history_states": history_states,
                        "peak_states": round(states, 2),
                        "peak_over_history": round(states / history_states, 3),
                    }
                )
                print(f"history   {name:40} {rows[-1]}")
    return rows


def _over_steps(
    case: Callable[[Solve], object], make: Make, z0: Tensor, given: Options
) -> dict[str, float]:
    """Copies of the state at every number of steps, and the growth from 20 steps to the most."""
    state = z0.numel() * z0.element_size()
    peaks = {
        str(num_steps): round(
            peak_bytes(lambda solve_=make(num_steps): case(solve_), given.device) / state, 2
        )
        for num_steps in ((2, 4) if given.tiny else STEPS)
    }
    filled = list(peaks.values())[1:]  # at the fewest steps not all histories are full
    return {**peaks, "growth": round(filled[-1] / filled[0], 4)}


def _work(given: Options, dtype: torch.dtype) -> Work:
    size = cells.TransformerSize(64, 4, 256, length=16, batch=4)
    if given.tiny:
        size = cells.TINY_SIZES["small transformer"]
    return cells.transformer(size, device=given.device, dtype=dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and save it."""
    given = options.parse(__doc__, arguments)
    given.save(
        "memory", about=_work(given, torch.float32).about, history=HISTORY,
        training=training(given), solving=solving(given), histories=histories(given),
    )  # fmt: skip


if __name__ == "__main__":
    main()
