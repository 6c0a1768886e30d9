"""Contracts and the one solver loop: problem, iterate, state packing, status, norms."""
