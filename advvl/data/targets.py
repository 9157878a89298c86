"""VQA's soft targets: the score of an answer by the number of annotators who gave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from advvl.checks import is_number, is_whole, shown
from advvl.errors import ConfigurationError, DataError

ANNOTATOR_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


def annotator_score(count: int) -> float:
    """Return VQA's score of an answer that `count` of the ten annotators gave: 0, .3, .6, .9, and 1 from four on.

    It is the mean of min(matches/3, 1) over the ten ways to leave one annotator out.

    Raises:
        DataError: a count outside 0..10.

    Source: Antol et al., "VQA", ICCV 2015.
    """
    if not is_whole(count) or not 0 <= count <= 10:
        raise DataError(f"expected a count of annotators in 0..10, got {shown(count)}; VQA asks ten of them")
    return ANNOTATOR_SCORES[min(count, len(ANNOTATOR_SCORES) - 1)]


def soft_targets(targets: Sequence[Mapping[str, Sequence[float]]], num_answers: int) -> Tensor:
    """Turn VQA targets `{"labels": [int], "scores": [float]}` into rows `(B, num_answers)`; answers not named score 0.

    Raises:
        ConfigurationError: no number of answers.
        DataError: a target is malformed, or names an answer outside the vocabulary.
    """
    if not is_whole(num_answers) or num_answers < 1:
        raise ConfigurationError(f"expected num_answers to be a whole number of 1 or more, got {shown(num_answers)}")
    if not isinstance(targets, list | tuple):
        raise DataError(f"expected a list of targets, got {shown(targets)}")
    rows = torch.zeros(len(targets), num_answers)
    for row, target in enumerate(targets):
        labels, scores = (target.get(name) if isinstance(target, Mapping) else None for name in ("labels", "scores"))
        if not (isinstance(labels, list | tuple) and isinstance(scores, list | tuple)):
            raise DataError(f"expected lists of labels and scores in target {row}, got {shown(target)}")
        if len(labels) != len(scores):
            raise DataError(
                f"expected one score per label in target {row}, got {len(labels)} labels, {len(scores)} scores"
            )
        for label, score in zip(labels, scores, strict=True):
            known = is_whole(label) and 0 <= label < num_answers
            if not (known and is_number(score) and 0.0 <= score <= 1.0):
                raise DataError(
                    f"expected labels in 0..{num_answers - 1} and scores in [0, 1] in target {row}, "
                    f"got label {shown(label)} with score {shown(score)}; check the answer vocabulary"
                )
            rows[row, int(label)] = score
    return rows
