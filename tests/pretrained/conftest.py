"""Tiny models to share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.data.characters import CharacterVocabulary
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.pretrained import Pretrained
from equilibria.pretrained.folder import Reading

VOCABULARY = CharacterVocabulary.from_text("abcdefghij\n")


@pytest.fixture
def make() -> Callable[..., Pretrained]:
    """A model of eleven characters; options are those of its configuration."""

    def make(config: Any = None, **options: Any) -> Pretrained:
        small = {"d_model": 8, "num_heads": 2, "d_inner": 12, **options}
        config = DEQTransformerConfig(**small) if config is None else config
        torch.manual_seed(1)
        model = config.build(len(VOCABULARY)).eval()
        return Pretrained(
            model, config, vocabulary=VOCABULARY, reading=Reading(5, 7), card="# A card\n"
        )

    return make


@pytest.fixture
def folder(make: Callable[..., Pretrained], tmp_path: Path) -> Path:
    """A shared model, to be damaged at will."""
    make().save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"
