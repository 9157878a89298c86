"""Visual questions of your own: a text, the features and boxes of an image's regions, and the answers that people gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from advvl.checks import shown
from advvl.data.boxes import checked_regions
from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.targets import annotator_score
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError

Answers = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class VQAExample:
    """A question about an image; arrays may be tensors, numpy's, or nested lists.

    Arguments:
        text: the question.
        features: of the image's R regions, `(R, F)`.
        boxes: their corners x1, y1, x2, y2, `(R, 4)`, in pixels if `size` is given, otherwise relative to the image.
        answers: the right answer, the answers of ten people, or a mapping from answers to scores in [0, 1]; None: not
            known.
        size: the image's width and height in pixels.

    Raises:
        DataError: no region, arrays of other shapes, non-finite numbers, boxes that are reversed, outside the image, or
            relative to it although a size is given.
    """

    text: str
    features: Tensor
    boxes: Tensor
    answers: Answers | None = None
    size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DataError(f"expected a question as a text, got {type(self.text).__name__}")
        with within(f"the image of {self.text!r}"):
            features, boxes = checked_regions(self.features, self.boxes, self.size)
        for name, value in {"features": features, "boxes": boxes}.items():
            object.__setattr__(self, name, value)

    @property
    def scores(self) -> Mapping[str, float]:
        """The score of each right answer; of ten people's answers VQA's, by how many gave it."""
        with within(repr(self.text)):
            return answer_scores(self.answers)


def answer_scores(answers: Answers | None) -> Mapping[str, float]:
    """Return the score of each right answer: one alone has 1, of ten people's VQA's, by how many gave it.

    Raises:
        DataError: neither an answer, nor ten, nor scores by answer.
    """
    if answers is None:
        return {}
    if isinstance(answers, Mapping):  # a Dataset gives None for an answer that another of its records has
        return {answer: score for answer, score in answers.items() if score is not None}
    if isinstance(answers, str):
        return {answers: 1.0}
    if not isinstance(answers, Sequence) or len(answers) != 10 or not all(isinstance(one, str) for one in answers):
        count = f"{len(answers)} answers" if isinstance(answers, Sequence) else shown(answers)
        raise DataError(f"expected one answer, ten people's, or scores by answer, got {count}; correct answers")
    return {answer: annotator_score(count) for answer, count in Counter(answers).items()}


def frequent_answers(examples: Iterable[VQAExample | Mapping[str, Any]], *, least: int = 1) -> AnswerTable:
    """Return the table of the answers that are right in `least` examples or more, the most frequent first.

    Arguments:
        examples: or dicts with `answers`.
    """
    scores = (
        example.scores if isinstance(example, VQAExample) else answer_scores(example.get("answers"))
        for example in examples
    )
    counts = Counter(answer for scored in scores for answer in scored)
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
    check_widths(examples)
    return pad_sequence([example.features for example in examples], batch_first=True)


def check_widths(examples: Sequence[VQAExample]) -> None:
    """Raise DataError unless the regions of a batch have as many features."""
    widths = sorted({example.features.shape[1] for example in examples})
    if len(widths) > 1:
        raise DataError(
            f"expected features of one width in a batch, got widths {widths}; extract all images with one detector"
        )


def check_table(table: object) -> None:
    """Raise ConfigurationError unless it is a table of answers."""
    if not isinstance(table, AnswerTable):
        raise ConfigurationError(
            f"expected answers as an AnswerTable, got {shown(table)}; make one by frequent_answers(examples) or "
            "AnswerTable(answers)"
        )
