"""Scores of UNITER's tasks other than answers in words: VCR's three accuracies, recall of retrieval, overlap of regions.

`advvl.evaluation.objectives.score` scores logits against soft targets, for VQA and visual entailment;
`advvl.tasks.metrics` scores sentences of NLVR2. `published=True` reproduces bugs of the published scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.checks import is_whole
from advvl.errors import ConfigurationError, DataError, ShapeError

CHOICES: Final = 4
"""Answers of a question of VCR, and rationales of an answer."""


@dataclass(frozen=True)
class VCRAccuracy:
    """Shares of questions: answered correctly, justified correctly given the right answer, and both.

    Arguments:
        qa, qar, both: Q→A, QA→R and Q→AR.
        qa_loss, qar_loss: mean cross-entropy of the four answers' scores, and of the right answer's four rationales.
    """

    qa: float
    qar: float
    both: float
    qa_loss: float
    qar_loss: float


def vcr_accuracy(scores: Tensor, answers: Tensor, rationales: Tensor, *, published: bool = False) -> VCRAccuracy:
    """Zellers et al., "From Recognition to Cognition: Visual Commonsense Reasoning", CVPR 2019; its three accuracies.

    Arguments:
        scores: of a question's choices, `(N, 8)` (four answers, four rationales of the right one) or `(N, 20)` (four
            answers, then four rationales of each): a model's `logits[:, 1].reshape(N, -1)`.
        answers, rationales: the right ones, 0 to 3, `(N,)` or `(N, 1)`.
        published: of 20 columns, take the rationales of all N questions for each, as VILLA's `validate` does in a batch.

    Raises:
        ShapeError, DataError: scores or targets that do not fit.
    """
    if scores.ndim != 2 or scores.shape[1] not in (2 * CHOICES, CHOICES + CHOICES**2) or not len(scores):
        raise ShapeError(
            f"expected scores of shape (N, 8) or (N, 20), got {tuple(scores.shape)}; give one row for each question"
        )
    _check_finite("scores", scores)
    answers, rationales = (
        _choices(name, t, len(scores)) for name, t in (("answers", answers), ("rationales", rationales))
    )
    scores = scores.double()
    first = CHOICES + CHOICES * answers if scores.shape[1] > 2 * CHOICES else torch.full_like(answers, CHOICES)
    columns = first[:, None] + torch.arange(CHOICES, device=scores.device)
    columns = columns.flatten().expand(len(scores), -1) if published and scores.shape[1] > 2 * CHOICES else columns
    of_answers, of_rationales = scores[:, :CHOICES], scores.gather(1, columns)
    qa, qar = of_answers.argmax(1) == answers, of_rationales.argmax(1) == rationales
    return VCRAccuracy(
        qa=_mean(qa),
        qar=_mean(qar),
        both=_mean(qa & qar),
        qa_loss=F.cross_entropy(of_answers, answers).item(),
        qar_loss=F.cross_entropy(of_rationales, rationales).item(),
    )


@dataclass(frozen=True)
class Recall:
    """Shares of queries with a match among the first K, by K.

    Arguments:
        text: of images, with any of their texts (text retrieval, TR).
        image: of texts, with their image (image retrieval, IR).
    """

    text: Mapping[int, float]
    image: Mapping[int, float]

    @property
    def mean(self) -> float:
        """The mean over both ways of the mean over K."""
        return (fmean(self.text.values()) + fmean(self.image.values())) / 2


def recall(scores: Tensor, images: Tensor, *, at: Sequence[int] = (1, 5, 10), published: bool = False) -> Recall:
    """Recall at K of retrieval in both directions; of equal scores the first counts as better.

    Arguments:
        scores: of every text with every image, `(T, I)`.
        images: the image of each text, `(T,)`; every image has a text.
        at: the K.
        published: count image retrieval as UNITER's `itm_eval.py` does, which adds texts among the first K of the list
            whose image is among their first `max(at)`, and may pass 1.

    Raises:
        ShapeError, DataError: scores or images that do not fit; an image without a text.
        ConfigurationError: no K, or one that is no whole number of 1 or more.
    """
    if not at or not all(is_whole(k) and k >= 1 for k in at):
        raise ConfigurationError(f"expected at as whole numbers of 1 or more, got {at!r}")
    if scores.ndim != 2 or not scores.numel() or images.shape != scores.shape[:1]:
        raise ShapeError(
            f"expected scores (T, I) and the image of each text (T,), got {tuple(scores.shape)} and {tuple(images.shape)}"
        )
    _check_finite("scores", scores)
    texts, pictures = (torch.arange(n, device=scores.device) for n in scores.shape)
    matches = images[:, None] == pictures
    if not matches.any(1).all() or not matches.any(0).all():
        lost, bare = texts[~matches.any(1)].tolist(), pictures[~matches.any(0)].tolist()
        raise DataError(
            f"expected an image of scores for each text and a text for each image, got none for texts {lost[:5]} and "
            f"images {bare[:5]}; leave them out"
        )
    image_ranks = _rank(scores, matches)
    text_ranks = _rank(scores.t(), matches.t())
    image = {k: _mean(image_ranks < k) for k in at}
    if published:
        hit = image_ranks < max(at)
        image = {k: found + (hit & (texts < k)).sum().item() / len(texts) for k, found in image.items()}
    return Recall(text={k: _mean(text_ranks < k) for k in at}, image=image)


def _rank(scores: Tensor, matches: Tensor) -> Tensor:
    """The rank of each row's best match, from 0; of equal scores the first is the better."""
    best = scores.masked_fill(~matches, -math.inf).amax(1, keepdim=True)
    tied = scores == best
    first = (tied & matches).int().argmax(1, keepdim=True)
    before = tied & (torch.arange(scores.shape[1], device=scores.device) < first)
    return (scores > best).sum(1) + before.sum(1)


def region_accuracy(found: Tensor, meant: Tensor, *, published: bool = False) -> float:
    """The share of expressions whose chosen region overlaps the right one by more than half of their union.

    Arguments:
        found, meant: boxes x, y, width, height, `(N, 4)`, in one unit; in pixels where `published`.
        published: by `overlaps(…, published=True)`.

    Raises:
        ShapeError, DataError: as `overlaps`; no box.
    """
    rows = overlaps(found, meant, published=published)
    if not len(rows):
        raise DataError("expected an expression or more to be right about, got none; is the split empty?")
    return _mean(rows > 0.5)


def overlaps(found: Tensor, meant: Tensor, *, published: bool = False) -> Tensor:
    """The intersection of two boxes over their union, `(N,)`; 0 where both are empty.

    Arguments:
        found, meant: boxes x, y, width, height, `(N, 4)`.
        published: an intersection up to one pixel wide or high counts as none, as in UNITER's `data/re.py`.

    Raises:
        ShapeError, DataError: boxes of other shapes, of negative size, or not finite.
    """
    if found.shape != meant.shape or found.ndim != 2 or found.shape[1] != 4:
        raise ShapeError(
            f"expected two times boxes (N, 4), got {tuple(found.shape)} and {tuple(meant.shape)}; give x, y, width, height"
        )
    for name, boxes in (("found", found), ("meant", meant)):
        _check_finite(name, boxes)
        if (boxes[:, 2:] < 0).any():
            rows = (boxes[:, 2:] < 0).any(1).nonzero()[:, 0].tolist()
            raise DataError(
                f"expected boxes {name} of width and height 0 or more, got less in rows {rows[:10]}; give x, y, w, h"
            )
    found, meant = found.double(), meant.double()
    ends = torch.minimum(found[:, :2] + found[:, 2:], meant[:, :2] + meant[:, 2:])
    sides = (ends - torch.maximum(found[:, :2], meant[:, :2])).clamp(min=0)
    if published:
        sides = torch.where((sides > 1).all(1, keepdim=True), sides, 0)
    shared = sides.prod(1)
    union = found[:, 2:].prod(1) + meant[:, 2:].prod(1) - shared
    return torch.where(union > 0, shared / torch.where(union > 0, union, 1), 0)


def _choices(name: str, targets: Tensor, rows: int) -> Tensor:
    if targets.shape not in ((rows,), (rows, 1)):
        raise ShapeError(f"expected {name} of shape (N,) = {(rows,)}, or (N, 1), got {tuple(targets.shape)}")
    if targets.is_floating_point() or ((targets < 0) | (targets >= CHOICES)).any():
        raise DataError(
            f"expected {name} as the right choice, 0 to 3, got {sorted(set(targets.flatten().tolist()))[:10]}"
        )
    return targets.reshape(rows).long()


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        rows = (~values.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()
        raise DataError(f"expected finite {name}, got others in rows {rows[:10]}; is the model's training broken?")


def _mean(flags: Tensor) -> float:
    return flags.double().mean().item()
