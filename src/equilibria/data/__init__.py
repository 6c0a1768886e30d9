"""Data sets and the order in which a model reads them.

One file per data set, beside what they share: `text` (files and the built-in corpus),
`characters` (symbols to ids and back) and `segments` (contiguous streams for truncated
back-propagation). Nothing here knows about models, losses or training.
"""

from equilibria.data.character_corpus import CharacterCorpusConfig, TextCorpus
from equilibria.data.characters import CharacterVocabulary
from equilibria.data.segments import (
    IGNORE_INDEX,
    Segment,
    TrainingSegments,
    evaluation_segments,
)
from equilibria.data.text import digest, pydoc_topics, read_text

__all__ = [
    "IGNORE_INDEX",
    "CharacterCorpusConfig",
    "CharacterVocabulary",
    "Segment",
    "TextCorpus",
    "TrainingSegments",
    "digest",
    "evaluation_segments",
    "pydoc_topics",
    "read_text",
]
