"""Measurements, one file per question; not part of the wheel. Results are kept in results/."""
