"""Trained models as folders that can be given to others, and the Hugging Face hub."""

from equilibria.pretrained.hub import Pretrained

__all__ = ["Pretrained"]
