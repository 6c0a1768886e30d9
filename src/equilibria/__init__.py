"""Deep Equilibrium Models: fixed-point layers with exact gradients in constant memory."""

from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.neumann_series import NeumannSeries
from equilibria.adjoints.one_step import OneStep
from equilibria.adjoints.phantom import Phantom
from equilibria.adjoints.reversible_adjoint import ReversibleAdjoint
from equilibria.adjoints.shine import Shine
from equilibria.adjoints.unrolled import Unrolled
from equilibria.api import SolveSettings, solve
from equilibria.core.adjoint import Adjoint, BackwardReport, SecondDerivativeError
from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate, Measurement
from equilibria.core.linear import LinearResult, LinearSolver
from equilibria.core.pure import TransformError
from equilibria.core.replay import ReplayError
from equilibria.core.scope import SolveScope, once, solve_scope
from equilibria.core.solution import Solution
from equilibria.core.solver import Solver
from equilibria.core.state import State, StateError
from equilibria.core.status import ConvergenceError, ConvergenceWarning, Status
from equilibria.core.termination import Termination
from equilibria.core.warm_start import WarmStart, WarmStartMemory
from equilibria.deq import DEQ, Cell
from equilibria.graphed import GraphedSolve
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.fixed_point import FixedPoint
from equilibria.linear.gmres import GMRES
from equilibria.linear.neumann import Neumann
from equilibria.regularizers.correction import FixedPointCorrection
from equilibria.regularizers.jacobian import JacobianRegularizer, jacobian_penalty
from equilibria.regularizers.spectral_radius import spectral_radius
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.broyden import Broyden
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.picard import Picard
from equilibria.solvers.reversible import Reversible
from equilibria.terminations.any_of import AnyOf
from equilibria.terminations.divergence import Divergence
from equilibria.terminations.fixed_steps import FixedSteps
from equilibria.terminations.residual import Residual, ToleranceSchedule
from equilibria.terminations.stagnation import Stagnation
from equilibria.warm_starts.cached import Cached
from equilibria.warm_starts.previous import Previous
from equilibria.warm_starts.random import Random
from equilibria.warm_starts.zeros import Zeros

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "GMRES",
    "Adjoint",
    "Anderson",
    "AnyOf",
    "BackwardReport",
    "BiCGStab",
    "Broyden",
    "Cached",
    "Cell",
    "ConvergenceError",
    "ConvergenceWarning",
    "Divergence",
    "Fallback",
    "FixedPoint",
    "FixedPointCorrection",
    "FixedSteps",
    "GraphedSolve",
    "Implicit",
    "Iterate",
    "JacobianRegularizer",
    "LinearResult",
    "LinearSolver",
    "Measurement",
    "Neumann",
    "NeumannSeries",
    "NewtonKrylov",
    "OneStep",
    "Phantom",
    "Picard",
    "Previous",
    "Random",
    "ReplayError",
    "Residual",
    "Reversible",
    "ReversibleAdjoint",
    "SecondDerivativeError",
    "Shine",
    "Solution",
    "SolveScope",
    "SolveSettings",
    "Solver",
    "Stagnation",
    "State",
    "StateError",
    "Status",
    "Termination",
    "ToleranceSchedule",
    "TransformError",
    "Unrolled",
    "UserError",
    "WarmStart",
    "WarmStartMemory",
    "Zeros",
    "jacobian_penalty",
    "once",
    "solve",
    "solve_scope",
    "spectral_radius",
]
