"""What a new solver, gradient method or cell is tested with: problems, references, contracts.

`problems` has fixed-point problems with known solutions, `dense` the slow and certain answers,
`probes` wrappers that watch or spoil a map. The `*_contract` modules need pytest and have to be
imported by name; each is a class that turns two methods of yours into some thirty tests.
"""

from equilibria.testing.dense import implicit_gradients, jacobian, newton, spectral_radius
from equilibria.testing.probes import Recorder, Spoiled
from equilibria.testing.problems import PROBLEMS, FixedPointProblem, problem

__all__ = [
    "PROBLEMS",
    "FixedPointProblem",
    "Recorder",
    "Spoiled",
    "implicit_gradients",
    "jacobian",
    "newton",
    "problem",
    "spectral_radius",
]
