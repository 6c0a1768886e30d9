"""Gradients through the fixed point, one file each."""
