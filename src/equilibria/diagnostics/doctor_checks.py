"""The examinations of `doctor`, one function each, in the order in which they are made.

A check takes the patient and the numbers to report, and returns the symptoms that it found. Later
checks see the map with its random numbers frozen, so that one disease does not hide another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from equilibria.adjoints.implicit import Implicit
from equilibria.api import SolveSettings, solve_with
from equilibria.core.iterate import rms
from equilibria.core.solution import Solution
from equilibria.core.state import Layout, State
from equilibria.core.status import ConvergenceError, ConvergenceWarning, Status
from equilibria.core.termination import Termination
from equilibria.deq import Cell
from equilibria.diagnostics.spectrum import spectrum
from equilibria.linear.gmres import GMRES
from equilibria.terminations.any_of import AnyOf
from equilibria.terminations.residual import Residual

_NEAR_ONE = 0.98
_SENSITIVE = 100.0
_ROUNDING = 4.0
"""Units in the last place that an evaluation of f may be off by; less is not to be asked for."""


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class Symptom:
    """What a check found; see `doctor.Finding`."""

    cause: str
    is_error: bool
    evidence: str
    advice: str


@dataclass
class Patient:
    """A map, where its solve starts, how it is solved, and the module behind it if there is one."""

    map: Callable[[State], State]
    z0: State
    settings: SolveSettings
    cell: Cell | None = None
    injection: Any = None
    batch_dims: Literal[0, 1] = 1
    segments: Tensor | None = None

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(self.z0, self.batch_dims, self.segments)

    @cached_property
    def start(self) -> Tensor:
        """The packed initial state (B, D)."""
        return self.layout.pack(self.z0).detach()

    def raw(self, packed: Tensor) -> Tensor:
        """One evaluation as it comes, packed and without gradients; buffers are given back."""
        with torch.no_grad(), self._same_buffers():
            return self.layout.pack(self.map(self.layout.unpack(packed)))

    def frozen(self, z: State) -> State:
        """One evaluation with the random numbers of the first: a function even with dropout."""
        with torch.random.fork_rng(enabled=True, devices=self._cuda):
            torch.manual_seed(0)
            return self.map(z)

    def image(self, packed: Tensor) -> Tensor:
        """`frozen` on packed states, without gradients."""
        with torch.no_grad(), self._same_buffers():
            return self.layout.pack(self.frozen(self.layout.unpack(packed)))

    @contextmanager
    def _same_buffers(self) -> Generator[None]:
        buffers = [] if self.cell is None else list(self.cell.buffers())
        saved = [buffer.clone() for buffer in buffers]
        yield
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)

    @cached_property
    def _cuda(self) -> list[int]:
        device = self.start.device
        return [device.index or 0] if device.type == "cuda" else []

    @cached_property
    def solution(self) -> Solution:
        """The forward solve with the patient's own settings."""
        with quiet(), torch.no_grad():
            settings = replace(self.settings, on_failure="ignore")
            return self.solve(settings)

    def solve(self, settings: SolveSettings) -> Solution:
        """A solve of the frozen map from the usual start."""
        return solve_with(
            self.frozen, self.z0, settings, batch_dims=self.batch_dims, segments=self.segments
        )

    @cached_property
    def fixed_point(self) -> Tensor:
        """What the solve returned, packed; the best that is known even where it failed."""
        return self.layout.pack(self.solution.z)

    def probe(self, like: Tensor) -> Tensor:
        """Noise (B, D) of the size of packed states, or of size 1 where that is zero."""
        # there and back, because no map sees what lies in the padding of a ragged batch
        return self.layout.pack(self.layout.unpack(_noise(like, self.size(like))))

    def size(self, packed: Tensor) -> Tensor:
        """Root mean square (B,) of packed states, without the padding of ragged batches."""
        scale = self.layout.norm_scale
        return rms(packed) if scale is None else rms(packed) * scale

    @property
    def eps(self) -> float:
        """Relative spacing of numbers in the narrowest part of the state."""
        return torch.finfo(_narrowest([leaf.dtype for leaf in self.layout.leaves])).eps

    @cached_property
    def image_dtype(self) -> torch.dtype:
        """The narrowest one that f returns or that its image is cast to."""
        with torch.no_grad(), self._same_buffers():
            image = pytree.tree_leaves(self.frozen(self.z0))
        # autocast may round where the state would not
        return _narrowest([t.dtype for t in (*image, *self.layout.leaves)])


@contextmanager
def quiet() -> Generator[None]:
    """No warnings of failed solves: they are reported as findings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def run_all(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """All examinations; those that need a finite map are left out where it is not."""
    symptoms = not_finite(patient, numbers)
    if symptoms:
        return symptoms
    for check in (statistics, randomness, parametrisation, coupling, precision):
        symptoms += check(patient, numbers)
    if any(s.cause == "batch-statistics" for s in symptoms):
        symptoms = [s for s in symptoms if s.cause != "cross-sample-coupling"]
    for check in (growth, forward_solve, contraction, sensitivity, backward_solve):
        symptoms += check(patient, numbers)
    return symptoms


# --- is it a map at all ------------------------------------------------------------------------


def not_finite(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """NaN or infinity in what the map is given or returns."""
    given = {"the initial state": patient.start}
    if patient.cell is not None:
        given |= {f"parameter {name}": p for name, p in patient.cell.named_parameters()}
    # NaN only: masks of attention are made of -inf by right.
    leaves = [x for x in pytree.tree_leaves(patient.injection) if isinstance(x, Tensor)]
    bad = [name for name, tensor in given.items() if not bool(torch.isfinite(tensor).all())]
    if any(bool(leaf.isnan().any()) for leaf in leaves):
        bad.append("the injection")
    if bad:
        return [
            Symptom(
                "non-finite",
                True,
                f"NaN or infinity in {_listed(bad)}, before the map is evaluated at all",
                "look at the inputs of the model, at the learning rate and at gradient clipping; "
                "a model with NaN parameters has to be restored from a checkpoint",
            )
        ]
    image = patient.raw(patient.start)
    rows = ~torch.isfinite(image).all(1)
    if not bool(rows.any()):
        return []
    return [
        Symptom(
            "non-finite",
            True,
            f"f(z0) is NaN or infinite for {int(rows.sum())} of {len(rows)} samples "
            f"(first: sample {int(rows.nonzero()[0])}), though all it is given is finite",
            "look inside the cell for a division, log, sqrt or normalisation of zeros, or an "
            "overflow in half precision; torch.autograd.set_detect_anomaly(True) names the line",
        )
    ]


def statistics(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Batch normalisation in training mode, and any buffer that an evaluation changes."""
    if patient.cell is None:
        return []
    ran = _modules_that_run(patient)
    symptoms: list[Symptom] = []
    norms = [
        f"{name} ({type(part).__name__})"
        for name, part in ran
        if isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None)
    ]
    if norms:
        symptoms.append(
            Symptom(
                "batch-statistics",
                True,
                f"{_listed(norms)} normalise over the batch inside the map, so the fixed point of "
                "a sample depends on the others and on how far they have converged",
                "use LayerNorm or GroupNorm inside the cell; batch norm may stay in `inject`, "
                "outside the layer, or inside in eval mode",
            )
        )
    buffers = dict(patient.cell.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    with torch.no_grad():
        patient.map(patient.z0)
    changed = [name for name, buffer in buffers.items() if not _same(buffer, before[name])]
    known = {name for name, part in ran if isinstance(part, _BATCH_NORMS)}
    changed = [name for name in changed if name.rpartition(".")[0] not in known]
    if changed:
        symptoms.append(
            Symptom(
                "buffers-updated-inside-the-map",
                True,
                f"one evaluation of f changes {_listed(changed)}, so f is another function at "
                "every step of the solver",
                "update running quantities once per solve, in `inject`; spectral norm belongs "
                "there too (its power iteration runs at every use in training mode)",
            )
        )
    return symptoms


def randomness(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """f(z) twice at the same z."""
    z = patient.probe(patient.start)
    before = torch.get_rng_state()
    first = patient.raw(z)
    drew = not torch.equal(before, torch.get_rng_state())
    second = patient.raw(z)
    difference = _relative(first - second, first)
    # Some kernels add up in no fixed order; that is rounding and no randomness.
    if difference <= 100 * patient.eps and not drew:
        return []
    if difference == 0:
        return []
    active = [
        f"{name} (p={part.p})"
        for name, part in _modules_that_run(patient)
        if isinstance(part, _DROPOUTS) and part.training and part.p > 0
    ]
    source = f"; {_listed(active)} draw there" if active else ""
    return [
        Symptom(
            "randomness-inside-the-map",
            True,
            f"f at the same z twice differs by {difference:.1e} of its size{source}, so there is "
            "no fixed point to find",
            "draw masks and noise once per solve, in `inject`, and hand them to `forward` "
            "(variational dropout), or use eval mode",
        )
    ]


def parametrisation(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Weights that are computed from other tensors at every evaluation."""
    if patient.cell is None:
        return []
    names: list[str] = []
    for name, part in _modules_that_run(patient):
        if isinstance(part, parametrize.ParametrizationList):
            names.append(name.replace("parametrizations.", ""))
        # The deprecated torch.nn.utils.weight_norm and spectral_norm work by such hooks.
        hooks = [type(hook).__name__ for hook in vars(part)["_forward_pre_hooks"].values()]
        if {"WeightNorm", "SpectralNorm"} & set(hooks):
            names.append(name)
    if not names:
        return []
    return [
        Symptom(
            "weights-recomputed-per-evaluation",
            False,
            f"the parametrised weights {_listed(names)} are computed again in every evaluation, "
            "though they do not depend on z",
            "read the weight once in `inject` and hand it to `forward` (torch.nn.functional.linear "
            "with the weight of the injection)",
        )
    ]


def coupling(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Whether the image of one sample depends on the state of another."""
    z = patient.probe(patient.start)
    if z.shape[0] < 2:
        return []
    moved = z.clone()
    moved[0] = -2.0 * z[0] + 1.0
    plain, other = patient.image(z)[1:], patient.image(moved)[1:]
    difference = _relative(other - plain, plain)
    if difference <= 100 * patient.eps:
        return []
    return [
        Symptom(
            "cross-sample-coupling",
            True,
            f"moving sample 0 changes the images of the other samples by {difference:.1e} of "
            "their size, but solvers and stopping work sample by sample",
            "look for a mean, softmax or normalisation over dimension 0; if the batch is one "
            "problem by design, solve it as one (batch_dims=0)",
        )
    ]


def precision(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Tolerances that the dtype of the state cannot resolve."""
    symptoms: list[Symptom] = []
    rules = _residual_rules(patient.settings.termination)
    if rules and patient.start.numel():
        symptoms += _forward_precision(patient, rules)
    limit = _resolution(_narrowest([leaf.dtype for leaf in patient.layout.leaves]))
    adjoint = patient.settings.adjoint
    if isinstance(adjoint, Implicit) and adjoint.rtol + adjoint.atol < limit:
        symptoms.append(
            Symptom(
                "tolerance-below-dtype",
                False,
                f"the backward solve is asked for {adjoint.rtol:.1e}, but products with the "
                f"Jacobian are accurate to about {limit:.1e}",
                f"set rtol of Implicit to at least {limit:.0e}",
            )
        )
    return symptoms


def _residual_rules(termination: Termination) -> list[Residual]:
    """Those among the rules that compare a residual with a tolerance."""
    if isinstance(termination, AnyOf):
        return [found for rule in termination.rules for found in _residual_rules(rule)]
    return [termination] if isinstance(termination, Residual) else []


def _forward_precision(patient: Patient, rules: list[Residual]) -> list[Symptom]:
    """Tolerances out of reach, or absolute where they should be relative.

    One rule that holds is enough to end a solve, so what counts is the loosest.
    """
    sizes = patient.size(patient.image(patient.fixed_point))
    if not bool(torch.isfinite(sizes).all()):
        sizes = patient.size(patient.image(patient.start))
    size = float(sizes.max())
    rule = max(rules, key=lambda rule: rule.atol + rule.rtol * size)
    asked = rule.rtol + (rule.atol / size if size > 0 else 1.0)
    numbers = f"rtol {rule.rtol:.1e}, atol {rule.atol:.1e} at images of size"
    limit = _resolution(patient.image_dtype)
    if asked < limit:
        dtype = str(patient.image_dtype).removeprefix("torch.")
        return [
            Symptom(
                "tolerance-below-dtype",
                False,
                f"a relative residual of {asked:.1e} is asked for ({numbers} {size:.1e}), but f "
                f"returns {dtype}, which resolves about {limit:.1e}",
                f"set rtol to at least {limit:.0e}, or compute the last operations of the cell, "
                "and keep the state, in a wider dtype",
            )
        ]
    # a fixed point below atol counts as zero, which is what atol is for
    loose = (sizes > rule.atol) & (rule.atol > rule.rtol * sizes)
    if not bool(loose.any()):
        return []
    smallest = float(sizes[loose].min())
    return [
        Symptom(
            "absolute-tolerance-decides",
            False,
            f"for {int(loose.sum())} of {len(loose)} samples atol is the larger part of the "
            f"tolerance ({numbers} {smallest:.1e}), so that a relative residual up to "
            f"{rule.rtol + rule.atol / smallest:.1e} counts as converged",
            "set atol to 0, which leaves the tolerance relative to the size of the state, or keep "
            "it if a residual of that size means nothing to you",
        )
    ]


# --- has it a fixed point that can be found ----------------------------------------------------


def growth(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Whether far-away states are brought back: |f(z)| against |z| at ever larger z."""
    size = patient.size(patient.start).clamp_min(1.0).unsqueeze(1)
    if patient.start.numel() == 0:
        return []
    gains: list[float] = []
    for scale in (1e2, 1e3):
        z = scale * size * patient.probe(torch.ones_like(patient.start))
        gain = torch.zeros(())
        for _ in range(4):  # in the direction that the map itself prefers
            image = patient.image(z)
            gain = rms(image) / rms(z).clamp_min(1e-30)
            length = patient.size(image).unsqueeze(1)
            usable = torch.isfinite(length) & (length > 0)
            z = torch.where(usable, image * (scale * size / length), z)
        worst = float(torch.nan_to_num(gain, nan=torch.inf).max())
        gains.append(worst)
    numbers["gain far out"] = gains[-1]
    if min(gains) < 1.0:
        return []
    return [
        Symptom(
            "unbounded-map",
            False,
            f"states 100 and 1000 times as large as usual grow by factors of {gains[0]:.2g} and "
            f"{gains[1]:.2g} per evaluation: nothing brings back a solver that overshoots",
            "end the cell in something bounded (tanh, layer norm), or keep the norm of the weights "
            "below 1 (weight or spectral norm, smaller initial weights)",
        )
    ]


def forward_solve(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """Whether the patient's own settings reach its own tolerance on this batch."""
    solution = patient.solution
    if not solution.status.numel():
        return []
    numbers["forward evaluations"] = solution.num_evals
    numbers["relative residual"] = float(solution.relative_residual.max())
    failed = ~solution.converged
    if not bool(failed.any()):
        return []
    codes = sorted({Status(int(code)).name for code in solution.status[failed]})
    worst = Status(int(solution.status[failed].max()))
    return [
        Symptom(
            "forward-solve-fails",
            True,
            f"{int(failed.sum())} of {len(failed)} samples miss the tolerance ({_listed(codes)}); "
            f"relative residual up to {float(solution.relative_residual.max()):.1e} after "
            f"{int(solution.num_steps.max())} steps",
            worst.message,
        )
    ]


def contraction(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """The spectral radius of the Jacobian at the fixed point."""
    if not patient.start.numel():
        return []
    with torch.enable_grad():
        found = spectrum(
            patient.frozen,
            patient.layout.unpack(patient.fixed_point),
            batch_dims=patient.batch_dims,
            segments=patient.segments,
        )
    radius = found.radius
    if not bool(torch.isfinite(radius).all()):
        return []  # a derivative is not finite, which the backward pass tells better
    row = int(radius.argmax())
    largest = float(radius[row])
    numbers["spectral radius"] = largest
    exact = patient.settings.adjoint.exact
    if largest < (1.0 if exact else _NEAR_ONE):
        return []
    angle = float(found.angle[row])
    kind = (
        "a positive eigenvalue (states drift away)"
        if angle < 0.1
        else "a negative eigenvalue (states alternate)"
        if angle > 3.04
        else f"a complex pair (states rotate by {angle:.1f} radians per evaluation)"
    )
    above = int((radius >= 1.0).sum())
    remedy = "a relaxation below 1 helps; " if angle > 1.6 else ""
    bias = (
        ""
        if exact
        else f"the gradient of {type(patient.settings.adjoint).__name__} is badly biased there, "
        "use Implicit(); "
    )
    return [
        Symptom(
            "spectral-radius-above-one" if largest >= 1.0 else "spectral-radius-near-one",
            False,
            f"the Jacobian at the returned state has spectral radius {largest:.3g}, {kind}; it is "
            f"1 or above for {above} of {len(radius)} samples, where plain iteration diverges",
            f"{bias}{remedy}use Anderson or Broyden forward and GMRES backward; to train towards "
            "a contraction, add Jacobian regularisation or weight norm, or start smaller",
        )
    ]


def sensitivity(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """How much the fixed point moves when the injection does, both relative to their size."""
    leaves, treespec = pytree.tree_flatten(patient.injection)
    if patient.cell is None or not any(_is_per_sample(leaf, patient) for leaf in leaves):
        return []
    if not bool(patient.solution.converged.all()):
        return []
    cell, step = patient.cell, max(1e-3, 30.0 * patient.eps**0.5)

    def moved(leaf: Any) -> Any:
        return _disturbed(leaf, step) if _is_per_sample(leaf, patient) else leaf

    injection = pytree.tree_unflatten([moved(leaf) for leaf in leaves], treespec)

    def elsewhere(z: State) -> State:
        return cell(z, injection)

    # Tight, so that what the residual leaves open is small beside the shift, and with settings
    # that go together whatever those of the patient are.
    tight = SolveSettings(
        termination=Residual(rtol=20.0 * patient.eps, atol=0.0),
        max_steps=max(200, patient.settings.max_steps),
    )
    start = patient.layout.unpack(patient.fixed_point)
    here = replace(patient, z0=start, settings=tight, cell=None)
    there = replace(here, map=elsewhere)
    if not bool((here.solution.converged & there.solution.converged).all()):
        return []
    shift = rms(there.fixed_point - here.fixed_point) / step
    gain = float((shift / rms(here.fixed_point).clamp_min(1e-30)).max())
    numbers["sensitivity to the injection"] = gain
    if gain < _SENSITIVE:
        return []
    return [
        Symptom(
            "sensitive-to-injection",
            False,
            f"a change of the injection by {step:.0e} of its size moves the fixed point {gain:.0f} "
            "times as much of its own size",
            "the map is close to having no unique fixed point (1 is nearly an eigenvalue of the "
            "Jacobian), or the injection is far larger than the state; regularise the Jacobian, "
            "or normalise the injection",
        )
    ]


def backward_solve(patient: Patient, numbers: dict[str, float]) -> list[Symptom]:
    """A backward pass with the patient's own settings."""
    if patient.cell is None or not patient.start.numel():
        return []
    parameters = {n: p for n, p in patient.cell.named_parameters() if p.requires_grad}
    if not parameters:
        return []
    settings = replace(patient.settings, on_failure="ignore")
    with quiet(), torch.enable_grad():
        solution = patient.solve(settings)
        z = patient.layout.pack(solution.z)
        if not z.requires_grad:
            return [_no_gradient(list(parameters))]
        try:
            gradients = _gradients(z, list(parameters.values()), patient.probe(torch.ones_like(z)))
        except ConvergenceError as error:
            return [Symptom("backward-solve-fails", True, str(error), _backward_advice(patient))]
    symptoms: list[Symptom] = []
    result = solution.backward.result
    if result is not None:
        numbers["backward products"] = result.num_evals
        numbers["backward relative residual"] = float(result.relative_residual.max())
        failed = result.status != Status.SUCCESS
        if bool(failed.any()):
            codes = sorted({Status(int(code)).name for code in result.status[failed]})
            symptoms.append(
                Symptom(
                    "backward-solve-fails",
                    True,
                    f"{int(failed.sum())} of {len(failed)} samples miss the backward tolerance "
                    f"({_listed(codes)}); residual up to "
                    f"{float(result.relative_residual.max()):.1e} of the cotangent",
                    _backward_advice(patient),
                )
            )
    lost = [name for name, g in zip(parameters, gradients, strict=True) if g is None]
    if lost:
        symptoms.append(_no_gradient(lost))
    bad = [
        name
        for name, g in zip(parameters, gradients, strict=True)
        if g is not None and not bool(torch.isfinite(g).all())
    ]
    if bad:
        symptoms.append(
            Symptom(
                "non-finite-gradient",
                True,
                f"the gradients of {_listed(bad)} are NaN or infinite at a finite fixed point",
                "look for a sqrt, norm or division at zero inside the cell; add a small constant "
                "under the root",
            )
        )
    return symptoms


def _backward_advice(patient: Patient) -> str:
    adjoint = patient.settings.adjoint
    robust = isinstance(adjoint, Implicit) and isinstance(adjoint.solver, GMRES)
    first = (
        "raise max_steps of Implicit or loosen its rtol"
        if robust
        else "use Implicit(GMRES()), which needs no contraction"
    )
    return (
        f"{first}; a residual that does not fall at all means that I - J is nearly singular, or "
        "that this is no fixed point: look at the forward solve first, then regularise the Jacobian"
    )


def _no_gradient(names: list[str]) -> Symptom:
    return Symptom(
        "no-gradient",
        False,
        f"{_listed(names)} get no gradient from the fixed point",
        "look for a detach, a no_grad block, or a weight cached without gradients (normalised "
        "weights have to be computed with grad enabled); freeze what is not meant to train",
    )


# --- helpers -----------------------------------------------------------------------------------


def _modules_that_run(patient: Patient) -> list[tuple[str, nn.Module]]:
    """Parts of the cell that one evaluation calls, in order, each once."""
    if patient.cell is None:
        return []
    ran: dict[str, nn.Module] = {}
    handles: list[Any] = []

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def note(part: nn.Module, _: Any) -> None:
            ran.setdefault(name, part)

        return note

    try:
        for name, part in patient.cell.named_modules():
            if part is not patient.cell:
                handles.append(part.register_forward_pre_hook(watch(name)))
        patient.image(patient.start)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran.items())


def _gradients(
    z: Tensor, parameters: list[nn.Parameter], cotangent: Tensor
) -> Sequence[Tensor | None]:
    """None where z does not depend on a parameter."""
    return torch.autograd.grad(z, parameters, cotangent, allow_unused=True)


def _relative(difference: Tensor, reference: Tensor) -> float:
    """Largest over the samples of one norm over the other."""
    if not difference.numel():
        return 0.0
    return float((rms(difference) / rms(reference).clamp_min(1e-30)).max())


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _resolution(dtype: torch.dtype) -> float:
    """The relative residual that an evaluation of f can be expected to reach in a dtype."""
    eps = torch.finfo(dtype).eps
    # half precision is computed in float32 and rounded once
    return eps if eps > torch.finfo(torch.float32).eps else _ROUNDING * eps


def _noise(like: Tensor, size: Tensor) -> Tensor:
    """Noise of shape (B, D) and the given size (B,), or of size 1 where that is zero."""
    draw = torch.Generator().manual_seed(0)
    size = torch.where(torch.isfinite(size) & (size > 0), size, 1.0).unsqueeze(1)
    return size * torch.randn(like.shape, generator=draw).to(like)


def _disturbed(leaf: Tensor, step: float) -> Tensor:
    """A part of an injection, moved by `step` times its size."""
    flat = leaf.detach().flatten(1).to(torch.promote_types(leaf.dtype, torch.float32))
    return leaf + step * _noise(flat, rms(flat)).to(leaf.dtype).view_as(leaf)


def _is_per_sample(leaf: object, patient: Patient) -> bool:
    """Whether a part of the injection has a row per row of the state."""
    layout = patient.layout
    rows = layout.batch_size if layout.batch_dims else (*layout.leaves[0].shape, None)[0]
    return (
        isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and leaf.dim() > 1
        and leaf.shape[0] == rows
        # a matrix of rows by rows says which belong together, as in graphs
        and not (leaf.shape[1] == rows and (layout.segments or not layout.batch_dims))
        and bool(torch.isfinite(leaf).all())
        and bool(leaf.any())
    )


def _listed(names: Iterable[str]) -> str:
    """At most three names."""
    everything = list(names)
    shown = ", ".join(everything[:3])
    return shown if len(everything) <= 3 else f"{shown} and {len(everything) - 3} more"
