"""Data sets and the order in which a model reads them.

One file per data set, beside what they share: `text` (files and the built-in corpus),
`characters` (symbols to ids and back) and `segments` (contiguous streams for truncated
back-propagation). Nothing here knows about models, losses or training.
"""
