"""Weights of other code bases, read safely and brought into our models."""
