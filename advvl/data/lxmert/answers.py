"""LXMERT's answers: the table that numbers a task's answers, and the list that its pre-training knew.

`trainval_ans2label.json` maps each answer to its number, `trainval_label2ans.json` lists the answers in that order:
VQA's 3129, GQA's 1842. UNITER's `ans2label.json` has the same VQA answers under other numbers: use a checkpoint with
the table that it was trained with, since no check can detect the wrong one. `all_ans.json` lists the 9500 answers of
LXMERT's pre-training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from torch import Tensor

from advvl.checks import shown
from advvl.data.lxmert.questions import read_json, text_in, wrong_field
from advvl.data.targets import soft_targets
from advvl.data.whereabouts import within
from advvl.errors import DataError
from advvl.files import write_json

NUM_ANSWERS: Final[Mapping[str, int]] = {"vqa": 3129, "gqa": 1842}
NUM_PRETRAINING_ANSWERS: Final = 9500

Unknown = Literal["refuse", "leave out"]


@dataclass(frozen=True)
class AnswerTable:
    """A task's answers, each at its number.

    Raises:
        DataError: no answer, or one that occurs twice.
    """

    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.answers, list | tuple) or not all(isinstance(answer, str) for answer in self.answers):
            raise DataError(f"expected the answers as a tuple of texts, got {shown(self.answers)}")
        if not self.answers or len(self.numbers) < len(self.answers):
            twice = next((answer for answer in self.answers if self.answers.count(answer) > 1), None)
            found = "none" if twice is None else f"{twice!r} more than once"
            raise DataError(f"expected one answer or more, each once, got {found}; check the table")

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """The number of each answer."""
        return {answer: number for number, answer in enumerate(self.answers)}

    def targets(self, labels: Sequence[Mapping[str, float]], *, unknown: Unknown = "refuse") -> Tensor:
        """Soft targets (B, A) float32: the score of each answer, 0 where it has none.

        Arguments:
            unknown: an answer that the table lacks is an error or, as in GQA, left out.

        Raises:
            DataError: names that answer, or a score outside [0, 1].
        """
        if unknown == "refuse":
            for label in labels:
                self.check(label)
        known = [
            [(self.numbers[answer], label[answer]) for answer in label if answer in self.numbers] for label in labels
        ]
        return soft_targets(
            [{"labels": [n for n, _ in row], "scores": [score for _, score in row]} for row in known], len(self)
        )

    def check(self, label: Mapping[str, float]) -> None:
        """Raise DataError where a label names an answer that the table lacks."""
        for answer in label:
            if answer not in self.numbers:
                raise DataError(
                    f"expected an answer of the table's {len(self)}, got {answer!r}; "
                    'take the table of this task, for GQA with unknown="leave out"'
                )


@dataclass(frozen=True)
class PretrainingAnswer:
    """An answer of LXMERT's pre-training, and the data sets that it occurs in."""

    answer: str
    data_sets: tuple[str, ...]


def read_answers(
    ans2label: str | os.PathLike[str], label2ans: str | os.PathLike[str], *, size: int | None = None
) -> AnswerTable:
    """Read a table from both of its files, which have to agree.

    Arguments:
        size: how many answers there must be, as in `NUM_ANSWERS`; None: any number.

    Raises:
        DataError: a file that is missing or malformed, files that disagree, an answer or a number that occurs twice or is
            missing, or another number of answers.
    """
    listed = read_json(label2ans, list, "the list of answers")
    for number, answer in enumerate(listed):
        if not isinstance(answer, str):
            raise DataError(
                f"{label2ans}, entry {number}: expected an answer, got {shown(answer)}; check which file it is"
            )
    numbered = read_json(ans2label, dict, "the numbers of answers")
    for answer, number in numbered.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(listed):
            raise DataError(
                f"{ans2label}: expected a whole number in 0..{len(listed) - 1} for {answer!r}, as {label2ans} has "
                f"{len(listed)} answers, got {shown(number)}; are the files of one task?"
            )
        if listed[number] != answer:
            raise DataError(
                f"expected {answer!r} under {number}, as {ans2label} says, got {listed[number]!r} in {label2ans}; are both "
                "files of LXMERT's? UNITER numbers the same answers otherwise"
            )
    if len(numbered) != len(listed):
        raise DataError(
            f"expected as many answers in {ans2label} as in {label2ans}, {len(listed)}, got {len(numbered)}; are the files "
            "of one task, and every answer there once?"
        )
    if size not in (None, len(listed)):
        raise DataError(f"expected {size} answers in {label2ans}, got {len(listed)}; is the table of another task?")
    return AnswerTable(tuple(listed))


def write_answers(ans2label: str | os.PathLike[str], label2ans: str | os.PathLike[str], table: AnswerTable) -> None:
    """Write both files of a table, each whole or not at all."""
    write_json(ans2label, table.numbers)
    write_json(label2ans, list(table.answers))


def read_pretraining_answers(
    path: str | os.PathLike[str], *, size: int | None = NUM_PRETRAINING_ANSWERS
) -> tuple[PretrainingAnswer, ...]:
    """Read `all_ans.json`: the answers that the columns of a pre-trained answer head stand for, in their order.

    Raises:
        DataError: a file that is missing or malformed, an answer that occurs twice, or another number of them than `size`.
    """
    found: dict[str, PretrainingAnswer] = {}
    for number, entry in enumerate(read_json(path, list, "the list of pre-training's answers")):
        with within(f"{path}, entry {number}"):
            if not isinstance(entry, dict):
                raise DataError(f"expected an object with named fields, got {shown(entry)}; check which file it is")
            answer, sets = text_in(entry, "ans"), entry.get("dsets")
            if not isinstance(sets, list) or not all(isinstance(name, str) for name in sets):
                raise wrong_field("dsets", "a list of data sets", entry)
            if answer in found:
                raise wrong_field("ans", "one that no entry before has", entry)
            found[answer] = PretrainingAnswer(answer, tuple(sets))
    if size not in (None, len(found)):
        raise DataError(f"expected {size} answers in {path}, got {len(found)}; is the file whole?")
    return tuple(found.values())


def write_pretraining_answers(path: str | os.PathLike[str], answers: Sequence[PretrainingAnswer]) -> None:
    """Write answers as `read_pretraining_answers` reads them, whole or not at all."""
    write_json(path, [{"ans": answer.answer, "dsets": list(answer.data_sets)} for answer in answers])
