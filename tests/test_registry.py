"""Names for classes: what can be written on a command line or in a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equilibria import (
    Adjoint,
    Anderson,
    AnyOf,
    Broyden,
    Divergence,
    Fallback,
    FixedPoint,
    FixedSteps,
    Implicit,
    LinearSolver,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Solver,
    Stagnation,
    Termination,
    Unrolled,
    UserError,
    registry,
)

SIZES = st.integers(1, 10**6)
RELAXATIONS = st.floats(0, 2, exclude_min=True, exclude_max=True)
TOLERANCES = st.floats(0, 1e300)
SOLVERS = st.one_of(
    st.builds(Anderson, SIZES, RELAXATIONS, TOLERANCES),
    st.builds(Broyden, st.none() | SIZES, RELAXATIONS),
    st.builds(Picard, RELAXATIONS),
)
TERMINATIONS = st.one_of(
    st.builds(FixedSteps, SIZES),
    st.builds(Residual, TOLERANCES, st.floats(1e-300, 1)),
)
ADJOINTS = st.one_of(
    st.builds(
        Implicit,
        SOLVERS | st.builds(FixedPoint, SOLVERS),
        st.floats(0, 1, exclude_max=True),
        st.floats(1e-300, 1),
        SIZES,
    ),
    st.builds(Phantom, SIZES, RELAXATIONS),
    st.sampled_from([OneStep(), Unrolled()]),
)

OUTSIDE = '''
from dataclasses import dataclass
from equilibria import Picard

@dataclass(frozen=True)
class Halving(Picard):
    """A solver of somebody else."""
    steepness: float = 0.5
    name: str = "a:b"

class NoDataclass(Picard):
    def __init__(self, x): ...

NO_CLASS = 3
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of somebody else, importable as `their_package.their_solvers`."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "their_solvers.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield registry.find(Solver, "their_package.their_solvers:Halving")
    for name in ("their_package", "their_package.their_solvers"):
        sys.modules.pop(name, None)


def test_every_file_is_a_name() -> None:
    assert {"anderson", "broyden", "picard"} <= set(registry.names(Solver))
    assert {"residual", "fixed_steps"} <= set(registry.names(Termination))
    assert {"implicit", "one_step", "phantom", "unrolled"} <= set(registry.names(Adjoint))
    assert {"fixed_point", "gmres"} <= set(registry.names(LinearSolver))


@pytest.mark.parametrize("kind", registry.KINDS, ids=lambda kind: kind.__name__)
def test_every_name_has_its_class(kind: type) -> None:
    known = registry.names(kind)
    assert known == sorted(known)
    for name in known:
        cls = registry.find(kind, name)
        assert issubclass(cls, kind)
        assert dataclasses.is_dataclass(cls)
        assert registry.find(kind, cls.__name__) is cls
        if all(f.default is not dataclasses.MISSING for f in dataclasses.fields(cls)):
            assert registry.describe(cls()).partition("(")[0] == name
            assert registry.parse(kind, registry.describe(cls())) == cls()


def test_a_new_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import equilibria.solvers

    (tmp_path / "half_steps.py").write_text(
        "from dataclasses import dataclass\n"
        "from equilibria.core.solver import Solver\n"
        "@dataclass(frozen=True)\n"
        "class HalfSteps(Solver):\n"
        "    size: int = 2\n"
        "    def init(self, iterate, max_steps): ...\n"
        "    def step(self, evaluate, iterate, state): ...\n"
    )
    monkeypatch.setattr(
        equilibria.solvers, "__path__", [*equilibria.solvers.__path__, str(tmp_path)]
    )
    try:
        assert "half_steps" in registry.names(Solver)
        solver = registry.parse(Solver, "half_steps(size=3)")
        assert (type(solver).__name__, solver.size) == ("HalfSteps", 3)
        assert registry.describe(solver) == "half_steps(size=3)"
        nested = registry.parse(Adjoint, "implicit(solver=half_steps)")
        assert nested.solver == type(solver)()
    finally:
        sys.modules.pop("equilibria.solvers.half_steps", None)


def test_a_file_without_its_class_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import equilibria.solvers

    (tmp_path / "unfinished.py").write_text("from equilibria.solvers.picard import Picard\n")
    monkeypatch.setattr(
        equilibria.solvers, "__path__", [*equilibria.solvers.__path__, str(tmp_path)]
    )
    try:
        with pytest.raises(UserError, match="unfinished"):
            registry.find(Solver, "unfinished")
    finally:
        sys.modules.pop("equilibria.solvers.unfinished", None)


@given(SOLVERS)
def test_solvers_survive_their_description(solver: Solver) -> None:
    assert registry.parse(Solver, registry.describe(solver)) == solver


@given(TERMINATIONS)
def test_terminations_survive_their_description(termination: Termination) -> None:
    assert registry.parse(Termination, registry.describe(termination)) == termination


@given(ADJOINTS)
def test_adjoints_survive_their_description(adjoint: Adjoint) -> None:
    assert registry.parse(Adjoint, registry.describe(adjoint)) == adjoint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anderson", Anderson()),
        ("  Anderson ( history_size = 8 ) ", Anderson(history_size=8)),
        ("broyden(history_size=None)", Broyden(history_size=None)),
        ("picard(relaxation=5e-1)", Picard(relaxation=0.5)),
    ],
)
def test_descriptions_as_people_write_them(text: str, expected: Solver) -> None:
    assert registry.parse(Solver, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one_step", OneStep()),
        ("one-step", OneStep()),
        ("OneStep", OneStep()),
        ("phantom(num-steps=3, relaxation=1e-1)", Phantom(3, 0.1)),
        ("implicit(solver=picard)", Implicit(solver=Picard())),
        (
            "implicit(solver=fixed-point(solver=anderson(ridge=1e-3)), max_steps=9)",
            Implicit(solver=FixedPoint(Anderson(ridge=1e-3)), max_steps=9),
        ),
    ],
)
def test_hyphens_and_nesting(text: str, expected: Adjoint) -> None:
    assert registry.parse(Adjoint, text) == expected


def test_a_plugin_made_of_several() -> None:
    ladder = registry.parse(Solver, "fallback(anderson, broyden(history_size=None), num-steps=5)")
    assert ladder == Fallback(Anderson(), Broyden(history_size=None), num_steps=5)
    assert registry.parse(Solver, registry.describe(ladder)) == ladder
    nested = Implicit(solver=Fallback(Fallback(Picard(), Anderson()), Broyden()))
    assert registry.parse(Adjoint, registry.describe(nested)) == nested
    rule = AnyOf(Residual(1e-3), Stagnation(), Divergence())
    assert registry.parse(Termination, registry.describe(rule)) == rule
    assert registry.parse(Termination, "any-of(residual, stagnation)").rules[1] == Stagnation()


def test_a_class_from_outside(outside: type) -> None:
    solver = registry.parse(Solver, "their_package.their_solvers:Halving(steepness=0.25)")
    assert solver == outside(steepness=0.25)
    text = registry.describe(solver)
    assert text == (
        "their_package.their_solvers:Halving(relaxation=1.0, steepness=0.25, name='a:b')"
    )
    assert registry.parse(Solver, text) == solver


def test_a_class_from_outside_inside_another(outside: type) -> None:
    adjoint = Implicit(solver=outside(steepness=0.125))
    text = registry.describe(adjoint)
    assert registry.parse(Adjoint, text) == adjoint
    deeper = Implicit(solver=FixedPoint(outside()))
    assert registry.parse(Adjoint, registry.describe(deeper)) == deeper


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Solver, "andersen", r"no Solver is called 'andersen'; did you mean 'anderson'\?.*broyden"),
        (Solver, "implicit", r"no Solver is called 'implicit'.*there are: anderson, broyden"),
        (Adjoint, "implicit(solver=broydn)", r"called 'broydn'; did you mean 'broyden'\?"),
        (Solver, "anderson(histroy_size=3)", r"no option 'histroy_size'; did you mean 'history_s"),
        (Adjoint, "one_step(rtol=1)", r"no option 'rtol' \(it has: none\)"),
        (Adjoint, "implicit(solver=one_step)", "neither a fixed-point solver nor a linear one"),
        (Solver, "anderson(history_size=0)", "history_size=0 must be an integer of at least 1"),
        (Solver, "anderson(relaxation='x')", "relaxation='x' must"),
        (Termination, "fixed_steps", "num_steps"),
        (Solver, "anderson(5)", "need names"),
        (Solver, "fallback(anderson)", "Fallback got 1 solvers and needs at least 2"),
        (Solver, "fallback(anderson, residual)", r"got Residual\(.*which is no Solver"),
        (Solver, "fallback(anderson, broydn)", r"called 'broydn'; did you mean 'broyden'\?"),
        (Solver, "fallback(anderson, picard, solvers=3)", "no option 'solvers'"),
        (Solver, "fallback(*3, *4)", "is no number, word in quotes, None, or name"),
        (Solver, "anderson(**{})", "no option '\\*\\*'"),
        (Solver, "anderson(ridge=1+x)", "is no number, word in quotes, None, or name"),
        (Solver, "anderson(ridge={[]: 1})", "is no number, word in quotes, None, or name"),
        (Solver, "anderson(", "cannot be read"),
        (Solver, "", "cannot be read"),
        (Solver, "  ", "cannot be read"),
        (Solver, "3", "cannot be read"),
        (Solver, "no_such_module.Thing", "cannot import 'no_such_module'"),
        (Solver, "anderson; picard", "cannot be read"),
        (Solver, "anderson()()", "cannot be read"),
        (Solver, "anderson\0", "cannot be read"),
        (Solver, "no_such_module:Thing", "cannot import 'no_such_module'"),
        (Solver, "equilibria.solvers.picard:Pickard", "no class 'Pickard'; did you mean 'Picard'"),
        (Solver, "equilibria.adjoints.one_step:OneStep", "is no dataclass derived from Solver"),
        (Solver, ":Thing", "cannot be read"),
        (Solver, "math:", "cannot be read"),
    ],
)
def test_what_cannot_be_used_says_why(kind: type, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        registry.parse(kind, text)


@pytest.mark.parametrize("name", ["NoDataclass", "NO_CLASS", "missing"])
def test_what_is_no_plugin_outside_is_refused(outside: type, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}"):
        registry.parse(Solver, f"their_package.their_solvers:{name}")


@given(st.text(max_size=40))
def test_no_text_does_anything_but_parse_or_be_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        assert isinstance(registry.parse(Solver, text), Solver)


def test_nothing_is_executed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    with pytest.raises(UserError):
        registry.parse(Solver, f"anderson(ridge=open({str(victim)!r}, 'w'))")
    with pytest.raises(UserError):
        registry.parse(Solver, "__import__('os').system('true')")
    assert not victim.exists()


def test_numbers_keep_their_last_digit() -> None:
    third = Picard(relaxation=1 / 3)
    assert registry.parse(Solver, registry.describe(third)).relaxation == 1 / 3
    smallest = Anderson(ridge=math.ulp(0.0))
    assert registry.parse(Solver, registry.describe(smallest)) == smallest
