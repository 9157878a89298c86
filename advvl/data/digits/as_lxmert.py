"""The digits corpus in LXMERT's own formats: region files, question files, answer tables, and a tokenizer.

A scene's regions are its 3 to 6 digits, not the 36 regions of a detector: the files say so in their `num_boxes`, and
are opened with `num_boxes=None`. Missing regions are then masked, not filled by repetition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from advvl.data.digits.corpus import DigitsCorpus
from advvl.data.digits.scenes import SIDE
from advvl.data.digits.sources import QuestionSource
from advvl.data.lxmert.answers import AnswerTable, write_answers
from advvl.data.lxmert.lines import Regions
from advvl.data.lxmert.questions import VisualQuestion, write_questions
from advvl.data.lxmert.regions import write_regions
from advvl.data.wordpiece import save_tokenizer

PARTS: Final = ("train", "validation", "test")
TABLE: Final = ("trainval_ans2label.json", "trainval_label2ans.json")
TOKENIZER: Final = "tokenizer.json"

_CELL: Final = 8  # pixels: the side of a scan
_SCENE: Final = SIDE * _CELL


def write_digits(corpus: DigitsCorpus, directory: Path) -> None:
    """Write `{part}_obj.tsv` and `{part}.json` for each part, the answer table and the tokenizer."""
    for part in PARTS:
        source: QuestionSource = getattr(corpus, part)
        write_regions(directory / f"{part}_obj.tsv", _images(part, source))
        write_questions(directory / f"{part}.json", list(_questions(part, source, corpus.answers)))
    numbers, listed = TABLE
    write_answers(directory / numbers, directory / listed, AnswerTable(corpus.answers))
    save_tokenizer(corpus.tokenizer, directory / TOKENIZER)


def _images(part: str, source: QuestionSource) -> Iterator[Regions]:
    for number, scene in enumerate(source.scenes):
        count = len(scene)
        corners = source.images.boxes[number, :count, :4]
        yield Regions(
            image_id=_image_id(part, number),
            height=_SCENE,
            width=_SCENE,
            object_ids=torch.tensor(scene.digits),
            object_scores=torch.ones(count),
            attribute_ids=torch.zeros(count, dtype=torch.long),  # a digit has none
            attribute_scores=torch.zeros(count),
            boxes=(corners * _SCENE).round(),
            features=source.images.features[number, :count],
        )


def _questions(part: str, source: QuestionSource, answers: Sequence[str]) -> Iterator[VisualQuestion]:
    for number, (question, target) in enumerate(zip(source.questions, source.targets.tolist(), strict=True)):
        yield VisualQuestion(
            question_id=number,
            image_id=_image_id(part, question.scene),
            sentence=question.text,
            label={answer: score for answer, score in zip(answers, target, strict=True) if score},
            question_type=question.family,
        )


def _image_id(part: str, scene: int) -> str:
    return f"digits-{part}-{scene}"
