"""Accuracy of answers in words: VQA, GQA, NLVR2.

Logits against soft targets are scored by `advvl.evaluation.objectives.score`; here an answer need not be in any table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from advvl.data.lxmert.questions import Statement, VisualQuestion
from advvl.errors import DataError


def vqa_accuracy(answers: Mapping[int | str, str], questions: Sequence[VisualQuestion]) -> float:
    """The mean score of answers by question id: the score in each question's label, 0 where it does not name the answer.

    Raises:
        DataError: no question, a question without a label, or answers to others than these questions.
    """
    _check_ids(answers, [question.question_id for question in questions])
    return _mean(_label(question).get(answers[question.question_id], 0.0) for question in questions)


def gqa_accuracy(answers: Mapping[int | str, str], questions: Sequence[VisualQuestion]) -> float:
    """The share of questions whose answer is the right one, word for word.

    Raises:
        DataError: as `vqa_accuracy`; a question with several right answers.
    """
    _check_ids(answers, [question.question_id for question in questions])
    return _mean(float(answers[question.question_id] == _only_answer(question)) for question in questions)


def nlvr2_accuracy(judgements: Mapping[str, bool], statements: Sequence[Statement] | Mapping[str, bool]) -> float:
    """The share of sentences judged correctly; judgements by identifier.

    Arguments:
        statements: the statements with their labels; or the label of each identifier.

    Raises:
        DataError: as `vqa_accuracy`.
    """
    return _mean(map(float, _right(judgements, statements)))


def nlvr2_consistency(judgements: Mapping[str, bool], statements: Sequence[Statement] | Mapping[str, bool]) -> float:
    """The share of sentences judged correctly for every pair of images that they were asked about; as `nlvr2_accuracy`.

    Suhr et al., "A Corpus for Reasoning about Natural Language Grounded in Photographs", ACL 2019: an identifier is
    split-set-pair-sentence, and identifiers that differ only in the pair share their sentence.

    Raises:
        DataError: as `vqa_accuracy`; an identifier of another form.
    """
    judged: defaultdict[tuple[str, ...], list[bool]] = defaultdict(list)
    for identifier, right in zip(_labels(statements), _right(judgements, statements), strict=True):
        parts = identifier.split("-")
        if len(parts) != 4:
            raise DataError(
                f"expected an identifier as split-set-pair-sentence, as dev-850-0-0, got {identifier!r}; "
                "give NLVR2's own"
            )
        judged[(*parts[:2], parts[3])].append(right)
    return _mean(float(all(rights)) for rights in judged.values())


def _right(judgements: Mapping[str, bool], statements: Sequence[Statement] | Mapping[str, bool]) -> list[bool]:
    labels = _labels(statements)
    _check_ids(judgements, list(labels))
    for identifier, label in labels.items():
        if label is None:
            raise DataError(f"expected a label of {identifier!r} to compare with, got none; is it a test split?")
    return [judgements[identifier] == bool(label) for identifier, label in labels.items()]


def _labels(statements: Sequence[Statement] | Mapping[str, bool]) -> Mapping[str, bool | int | None]:
    if isinstance(statements, Mapping):
        return statements
    labels = {statement.identifier: statement.label for statement in statements}
    if len(labels) < len(statements):
        raise DataError(
            f"expected {len(statements)} statements of different identifiers, got {len(labels)}; ask each once"
        )
    return labels


def _label(question: VisualQuestion) -> Mapping[str, float]:
    if question.label is None:
        raise DataError(
            f"expected a label of question {question.question_id!r} to compare with, got none; is it a test split?"
        )
    return question.label


def _only_answer(question: VisualQuestion) -> str:
    label = _label(question)
    if len(label) != 1:
        raise DataError(
            f"expected one right answer to GQA's question {question.question_id!r}, got {len(label)}; is it VQA's?"
        )
    return next(iter(label))


def _check_ids(given: Mapping[int | str, object] | Mapping[str, object], asked: Sequence[int | str]) -> None:
    missing, foreign = [name for name in asked if name not in given], set(given) - set(asked)
    if not asked or missing or foreign:
        found = f"{len(asked)} asked, {len(missing)} of them unanswered, {len(foreign)} answers to others"
        example = f", such as {[*missing, *foreign][0]!r}" if missing or foreign else ""
        raise DataError(f"expected an answer to every question asked and to no other, got {found}{example}")


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
