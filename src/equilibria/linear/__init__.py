"""Solvers for the linear backward system u = J^T u + g, one file each."""
