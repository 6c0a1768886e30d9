"""`doctor`: what is wrong with a deep equilibrium model, with numbers, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.solution import Solution
from equilibria.core.state import State, StateError
from equilibria.deq import DEQ, Cell
from equilibria.diagnostics import doctor_checks as checks
from equilibria.diagnostics.isolation import untouched


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    """Results are wrong, or there is no fixed point to find."""
    WARNING = "warning"
    """It works, but slowly, loosely or by luck."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        cause: a fixed short name, such as "batch-statistics"; all of them are in the docs.
        severity: error or warning.
        layer: the name of the DEQ layer in the model, "" for the model itself.
        evidence: what was measured, with numbers.
        advice: what to change.
    """

    cause: str
    severity: Severity
    layer: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        return (
            f"[{self.severity}] {self.cause}{where}\n"
            f"    found:  {self.evidence}\n"
            f"    advice: {self.advice}"
        )


@dataclass(frozen=True)
class Report:
    """What `doctor` found; prints as text.

    Args:
        findings: errors first.
        measurements: per layer ("" for the model itself), named numbers worth knowing anyway.
    """

    findings: tuple[Finding, ...]
    measurements: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def causes(self) -> tuple[str, ...]:
        """Short names of what was found, without repetition."""
        return tuple(dict.fromkeys(finding.cause for finding in self.findings))

    def __str__(self) -> str:
        count = len(self.findings)
        title = "no findings" if not count else f"{count} finding{'s' if count > 1 else ''}"
        parts = [f"doctor: {title}", *map(str, self.findings)]
        for layer, numbers in self.measurements.items():
            values = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            parts.append(f"measured{' in ' + layer if layer else ''}: {values}")
        return "\n".join(parts)


def doctor(model: nn.Module, *inputs: Any, **named_inputs: Any) -> Report:
    """Examine every DEQ layer of a model on one batch, in the mode (train or eval) it is in.

    Runs the model once to see what its layers are given, then some hundred evaluations of each
    cell. Parameters, gradients, buffers and the random state are left as they were. Use a batch
    of a few samples and call it when training misbehaves, or once in a test.

    Args:
        model: a DEQ, or a module with DEQ layers somewhere inside.
        *inputs: one batch, as for the model.
        **named_inputs: likewise.

    Raises:
        UserError: the model has no DEQ layer, or none of them ran on this batch.

    Examples:
        >>> from equilibria import Cell, DEQ
        >>> class Half(Cell):
        ...     def inject(self, x): return x
        ...     def initial_state(self, injection): return torch.zeros_like(injection)
        ...     def forward(self, z, injection): return 0.5 * z + injection
        >>> print(str(doctor(DEQ(Half()), torch.ones(2, 3))).splitlines()[0])
        doctor: no findings
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, DEQ)}
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no DEQ layer to examine; give a DEQ or a module that "
            "holds one, or call examine(f, z0) on a plain map"
        )
    findings: list[Finding] = []
    measurements: dict[str, Mapping[str, float]] = {}
    with untouched(model), torch.enable_grad():
        calls = _first_calls(model, layers, inputs, named_inputs)
        if not calls:
            raise UserError(
                f"no DEQ layer of {type(model).__name__} ran on this batch; give inputs that "
                "reach one of them"
            )
        for name, patient in calls.items():
            found, numbers = _examine(patient, name)
            findings += found
            measurements[name] = numbers
    return _report(findings, measurements)


def examine(
    f: Callable[[State], State],
    z0: State,
    settings: SolveSettings = SolveSettings(),
    *,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
) -> Report:
    """`doctor` for a plain map: the same checks, except those that need a module.

    Args:
        f: the map of `solve(f, z0)`.
        z0: where its solve starts.
        settings: those of the solve.
        batch_dims: as in `solve`.
        segments: as in `solve`.
    """
    patient = checks.Patient(f, z0, settings, batch_dims=batch_dims, segments=segments)
    with untouched(), torch.enable_grad():
        findings, numbers = _examine(patient, "")
    return _report(findings, {"": numbers})


def _examine(patient: checks.Patient, layer: str) -> tuple[list[Finding], dict[str, float]]:
    numbers: dict[str, float] = {}
    try:
        patient.layout.pack(patient.map(patient.z0))
    except StateError as error:
        advice = "return a state of exactly the form of z: same tree, shapes, dtypes and device"
        return [Finding("form-of-state", Severity.ERROR, layer, str(error), advice)], numbers
    symptoms = checks.run_all(patient, numbers)
    return [
        Finding(
            s.cause, Severity.ERROR if s.is_error else Severity.WARNING, layer, s.evidence, s.advice
        )
        for s in symptoms
    ], numbers


def _bind(cell: Cell, injection: Any) -> Callable[[State], State]:
    return lambda z: cell(z, injection)


def _report(findings: list[Finding], measurements: Mapping[str, Mapping[str, float]]) -> Report:
    order = list(Severity)
    return Report(
        tuple(sorted(findings, key=lambda finding: order.index(finding.severity))), measurements
    )


def _first_calls(
    model: nn.Module,
    layers: Mapping[str, DEQ],
    inputs: tuple[Any, ...],
    named_inputs: Mapping[str, Any],
) -> dict[str, checks.Patient]:
    """What every layer is asked to solve first: the map, where it starts, and how."""
    patients: dict[str, checks.Patient] = {}
    with ExitStack() as stack:
        for name, deq in layers.items():
            stack.enter_context(_watched(deq, name, patients))
        stack.enter_context(checks.quiet())
        try:
            model(*inputs, **named_inputs)
        except StateError:
            if not patients:
                raise
            # What is wrong with the form of the state is going to be a finding.
    return patients


@contextmanager
def _watched(deq: DEQ, name: str, patients: dict[str, checks.Patient]) -> Generator[None]:
    """Note how `deq` is called first: by `forward` or `solve`, from inside a model or outside."""
    running: list[dict[str, Any]] = []

    def solve(injection: Any, **options: Any) -> Solution:
        running.append(options)
        try:
            return type(deq).solve(deq, injection, **options)
        finally:
            running.pop()

    def note(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        # another layer may have the same cell
        if name in patients or not running or len(arguments) != 2:
            return
        (z, injection), asked = arguments, running[-1]
        patients[name] = checks.Patient(
            _bind(deq.cell, injection),
            _detached(z),
            (asked.get("settings") or deq.settings).cold(),
            deq.cell,
            injection,
            asked.get("batch_dims", 1),
            asked.get("segments"),
        )

    handle = deq.cell.register_forward_pre_hook(note)
    vars(deq)["solve"] = solve
    try:
        yield
    finally:
        handle.remove()
        del vars(deq)["solve"]


def _detached(z: State) -> State:
    def copy(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return pytree.tree_map(copy, z)
