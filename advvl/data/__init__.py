"""Corpora and formats: what a training loop draws its batches from.

`digits_corpus(DigitsConfig())` makes visual question answering over real handwriting: `.train`, `.validation` and
`.test` hold questions, `.pretrain` captions, each with `len()` and `batch(indices, generator)`.
"""
