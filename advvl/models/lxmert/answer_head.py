"""A task's answer head initialised from LXMERT's pre-training, which answered questions too (`--loadLXMERTQA`).

Pre-training has 9500 answers; a task has other answers in another order, so rows are matched by the texts of the
answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from advvl.errors import CheckpointError, ConfigurationError
from advvl.models.lxmert.checkpoint import LXMERT_NAMING, LXMERT_PRETRAINING_HEADS, lxmert_name
from advvl.models.state_files import load_state, read_state

_LAST = ("answer_head.logit_fc.3.weight", "answer_head.logit_fc.3.bias")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SPELLINGS: Final = {"grey": "gray"} | {word: str(number) for number, word in enumerate(_NUMBERS, start=1)}


@dataclass(frozen=True)
class AnswerReport:
    """The answers of a task that pre-training knew, and those that it did not.

    Arguments:
        matched: from a task's answer to the pre-training answer whose row it got.
        unmatched: the answers whose row is zero.
    """

    matched: Mapping[str, str]
    unmatched: tuple[str, ...]


def load_lxmert_answers(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    pretraining_answers: Sequence[str],
    answers: Sequence[str],
) -> AnswerReport:
    """Read a pre-training checkpoint into a model that answers, its answer head row by row; all of it or nothing.

    Arguments:
        model: `LxmertForVQA`, or transformers' `LxmertForQuestionAnswering`.
        pretraining_answers: in the order of the checkpoint's rows: each entry's "ans" in LXMERT's `all_ans.json`.
        answers: of the task, in the order of the model's rows: LXMERT's `trainval_label2ans.json`.

    Raises:
        CheckpointError: as `load_lxmert_checkpoint`; a checkpoint with another number of answers.
        ConfigurationError: a model with another number of answers, or with no head for them.
    """
    own = next((value for name, value in model.state_dict().items() if lxmert_name(name) == _LAST[0]), None)
    if own is None or len(own) != len(answers):
        raise ConfigurationError(
            f"expected a model with a row for each of the {len(answers)} answers, got a {type(model).__name__} with "
            f"{'no answer head' if own is None else len(own)}; set num_qa_labels in its configuration"
        )
    index = {answer: row for row, answer in enumerate(pretraining_answers)}
    found = {answer: plain for answer in answers if (plain := plain_answer(answer)) in index}
    rows = torch.tensor([index[found[answer]] if answer in found else -1 for answer in answers], dtype=torch.long)

    def remapped(name: str, value: Tensor) -> Tensor:
        if lxmert_name(name) not in _LAST:
            return value
        if len(value) != len(pretraining_answers):
            raise CheckpointError(
                f"expected a row of {name} in {str(path)!r} for each of the {len(pretraining_answers)} answers of "
                f"pre-training, got {len(value)}; give those that it was trained on, in order"
            )
        picked = value.new_zeros(len(answers), *value.shape[1:])
        picked[rows >= 0] = value[rows[rows >= 0]]
        return picked

    state = {name: remapped(name, value) for name, value in read_state(path).items()}
    load_state(model, state, LXMERT_NAMING, source=path, allow_unexpected=LXMERT_PRETRAINING_HEADS)
    return AnswerReport(found, tuple(answer for answer in answers if answer not in found))


def plain_answer(answer: str) -> str:
    """An answer as pre-training spells it: lower case, no full stop after it, no article before it, 2 for "two"."""
    words = answer.lower().strip().removesuffix(".").split()
    plain = " ".join(words[1:] if len(words) > 1 and words[0] in _ARTICLES else words)
    return _SPELLINGS.get(plain, plain)
