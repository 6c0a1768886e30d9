"""Fixed-point solvers, one file each."""
