"""Corpora and formats: the sources of batches for a training loop.

`digits_corpus(DigitsConfig())` makes visual question answering over real handwriting: `.train`, `.validation` and
`.test` hold questions, `.pretrain` captions, each with `len()` and `batch(indices, generator)`.
"""
