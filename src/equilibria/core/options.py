"""An option that does not exist names the one that was meant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Self

from equilibria.core.errors import UserError, nearest

ELSEWHERE = {
    "f_solver": "solver=Anderson()",
    "f_max_iter": "max_steps=50",
    "f_thres": "max_steps=50",
    "max_iter": "max_steps=50",
    "maxiter": "max_steps=50",
    "f_tol": "termination=Residual(rtol=1e-3)",
    "f_eps": "termination=Residual(rtol=1e-3)",
    "tol": "termination=Residual(rtol=1e-3)",
    "rtol": "termination=Residual(rtol=1e-3)",
    "atol": "termination=Residual(atol=1e-6)",
    "stop_mode": "termination=Residual(rtol=1e-3, atol=0), or Residual(rtol=0, atol=1e-3)",
    "b_solver": "adjoint=Implicit(solver=GMRES())",
    "b_max_iter": "adjoint=Implicit(max_steps=50)",
    "b_thres": "adjoint=Implicit(max_steps=50)",
    "b_tol": "adjoint=Implicit(rtol=1e-4)",
    "b_eps": "adjoint=Implicit(rtol=1e-4)",
    "ift": "adjoint=Implicit()",
    "hook_ift": "adjoint=Implicit()",
    "grad": "adjoint=Phantom(num_steps=5), or OneStep()",
    "tau": "adjoint=Phantom(relaxation=0.5), or solver=Picard(relaxation=0.5)",
    "n_states": "states=3 when the layer is called",
    "indexing": "states=[5, 10] when the layer is called",
    "eval_f_max_iter": "eval_max_steps=50",
    "history_size": "solver=Anderson(history_size=10)",
    "m": "history_size=10",
    "beta": "relaxation=1.0",
    "lam": "ridge=1e-8",
}
"""What other libraries call it, and how it is said here."""


class Options:
    """Base of configuration dataclasses whose unknown options are errors that help."""

    if not TYPE_CHECKING:  # type checkers are to look at __init__, which they know to be stricter

        def __new__(cls, *args: object, **options: object) -> Self:
            if options and is_dataclass(cls):
                known = [field.name for field in fields(cls) if field.init]
                refuse_unknown(cls.__name__, options, known)
            return super().__new__(cls)


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UserError for the first name given that is not known."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        meant = nearest(name, known)
        if name in ELSEWHERE and ELSEWHERE[name].partition("=")[0] in known:
            meant = f"; that is {ELSEWHERE[name]} here"
        elif not meant:
            meant = f"; there are {', '.join(known)}" if known else "; it has none"
        raise UserError(f"{what} has no option {name!r}{meant}")
