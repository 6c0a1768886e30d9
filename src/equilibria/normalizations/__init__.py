"""Weights normalised once per solve, one file each."""
