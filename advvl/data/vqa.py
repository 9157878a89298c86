"""Visual questions of your own: a text, the features and boxes of an image's regions, and the answers that people gave."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import is_number, shown
from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.targets import annotator_score
from advvl.errors import ConfigurationError, DataError

Answers = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class VQAExample:
    """A question about an image; arrays may be tensors, numpy's, or nested lists.

    Arguments:
        text: the question.
        features: of the image's R regions, `(R, F)`.
        boxes: their corners x1, y1, x2, y2, `(R, 4)`, in pixels with `size`, else over the image's width and height.
        answers: the right one, or those that ten people gave, or scores in [0, 1] by answer; None: not known.
        size: the image's width and height in pixels.

    Raises:
        DataError: no region, arrays of other shapes, numbers that are not finite, boxes that are reversed or lie outside
            the image, or are in parts of it although a size is given.
    """

    text: str
    features: Tensor
    boxes: Tensor
    answers: Answers | None = None
    size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DataError(f"expected a question as a text, got {type(self.text).__name__}")
        features, boxes = _numbers("features", self.features), _numbers("boxes", self.boxes)
        if features.ndim != 2 or not len(features) or boxes.shape != (len(features), 4):
            raise DataError(
                f"expected features (R, F) and boxes (R, 4) of one region or more, got {tuple(features.shape)} and "
                f"{tuple(boxes.shape)} of {self.text!r}"
            )
        crossed = (boxes[:, :2] > boxes[:, 2:]).any(1)
        if crossed.any():
            raise DataError(
                f"expected boxes with x1 <= x2 and y1 <= y2, got {boxes[crossed][0].tolist()} of {self.text!r}; give "
                "corners, not widths and heights"
            )
        if self.size is not None:
            boxes = _in_parts(boxes, self.size, self.text)
        if boxes.min() < -1e-3 or boxes.max() > 1 + 1e-3:
            raise DataError(
                f"expected boxes x1, y1, x2, y2 inside the image of {self.text!r}, got {boxes.min():.3g} to "
                f"{boxes.max():.3g} of its size; give size=(width, height) for pixels"
            )
        for name, value in {"features": features, "boxes": boxes.clamp(0, 1)}.items():
            object.__setattr__(self, name, value)

    @property
    def scores(self) -> Mapping[str, float]:
        """The score of each right answer; of ten people's answers VQA's, by how many gave it."""
        if self.answers is None:
            return {}
        if isinstance(self.answers, Mapping):
            return self.answers
        if isinstance(self.answers, str):
            return {self.answers: 1.0}
        if len(self.answers) != 10:
            raise DataError(
                f"expected one answer, ten people's, or scores by answer, got {len(self.answers)} answers to {self.text!r}"
            )
        return {answer: annotator_score(count) for answer, count in Counter(self.answers).items()}


def frequent_answers(examples: Iterable[VQAExample], *, least: int = 1) -> AnswerTable:
    """Return the table of the answers that are right in `least` examples or more, the most frequent first."""
    counts = Counter(answer for example in examples for answer in example.scores)
    kept = [answer for answer, count in counts.items() if count >= least]
    return AnswerTable(tuple(sorted(kept, key=lambda answer: (-counts[answer], answer))))


def targets(examples: Sequence[VQAExample], table: AnswerTable, unknown: Unknown) -> dict[str, Tensor]:
    """Return the field `targets`, soft scores (B, A); none where no example has answers.

    Raises:
        DataError: some have and some have not; an answer that the table lacks, unless it is to be left out.
    """
    known = [example.answers is not None for example in examples]
    if any(known) != all(known):
        raise DataError(f"expected answers to all questions of a batch or to none, got {sum(known)} of {len(known)}")
    return {"targets": table.targets([example.scores for example in examples], unknown=unknown)} if all(known) else {}


def padded_features(examples: Sequence[VQAExample]) -> Tensor:
    """Return the features of a batch `(B, R, F)`, zero where an image has fewer regions.

    Raises:
        DataError: features of different widths.
    """
    widths = sorted({example.features.shape[1] for example in examples})
    if len(widths) > 1:
        raise DataError(
            f"expected features of one width in a batch, got widths {widths}; extract all images with one detector"
        )
    return pad_sequence([example.features for example in examples], batch_first=True)


def check_table(table: object) -> None:
    """Raise ConfigurationError unless it is a table of answers."""
    if not isinstance(table, AnswerTable):
        raise ConfigurationError(
            f"expected answers as an AnswerTable, got {shown(table)}; make one by frequent_answers(examples) or "
            "AnswerTable(answers)"
        )


def _in_parts(boxes: Tensor, size: object, text: str) -> Tensor:
    """Boxes in parts of the image's width and height, from pixels."""
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_number(n) and 0 < n < math.inf for n in size):
        raise DataError(
            f"expected size as (width, height) in pixels, got {shown(size)}; leave it out if it is not known"
        )
    if boxes.max() <= 1 < min(size):
        raise DataError(
            f"expected boxes in pixels with size={tuple(size)!r}, got all in [0, 1] of {text!r}; leave size out, or give "
            "pixels"
        )
    return boxes / torch.tensor([*size, *size], dtype=boxes.dtype)


def _numbers(name: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value).to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"expected {name} as an array of numbers, got {type(value).__name__}: {error}") from error
    if not found.isfinite().all():
        raise DataError(f"expected finite {name}, got some that are not")
    return found
