"""The largest eigenvalues of the Jacobian; the method is in `equilibria.regularizers`."""

from equilibria.regularizers.spectral_radius import Spectrum, spectral_radius, spectrum

__all__ = ["Spectrum", "spectral_radius", "spectrum"]
