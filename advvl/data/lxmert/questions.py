"""LXMERT's question files: lists of VQA's and GQA's questions, and of NLVR2's sentences about two images, as JSON.

VQA: `{question_id, img_id, sent, label: {answer: score}, answer_type, question_type}`, the id a number; GQA the same
without the types, the id a text; NLVR2: `{uid, identifier, img0, img1, sent, label: 0 or 1}`. Test files lack the label.
Further fields are not read. Source: the published code of Tan & Bansal, "LXMERT", EMNLP 2019.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from advvl.checks import shown
from advvl.data.whereabouts import within
from advvl.errors import DataError
from advvl.files import parse_json, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class VisualQuestion:
    """A question about an image.

    Arguments:
        question_id: VQA's number or GQA's text.
        label: scores in [0, 1] of the right answers, in words; None where they are not known.
        answer_type, question_type: VQA's; None where the file has none.
    """

    question_id: int | str
    image_id: str
    sentence: str
    label: Mapping[str, float] | None = None
    answer_type: str | None = None
    question_type: str | None = None


@dataclass(frozen=True)
class Statement:
    """A sentence that is true (`label` 1) or false (0) of two images, or not known to be either (None).

    `identifier` is NLVR2's: split, set, pair of images and sentence, as in `dev-850-0-0`.
    """

    uid: str
    identifier: str
    image_ids: tuple[str, str]
    sentence: str
    label: int | None = None


def read_questions(path: str | os.PathLike[str]) -> list[VisualQuestion]:
    """Read VQA's or GQA's questions.

    Raises:
        DataError: a file that is missing or no such list, or a malformed or repeated question, with its number and field.
    """
    return _read_list(path, _question, lambda question: question.question_id, "question_id")


def read_statements(path: str | os.PathLike[str]) -> list[Statement]:
    """Read NLVR2's sentences.

    Raises:
        DataError: as `read_questions`.
    """
    return _read_list(path, _statement, lambda statement: statement.uid, "uid")


def write_questions(path: str | os.PathLike[str], questions: Sequence[VisualQuestion]) -> None:
    """Write questions as `read_questions` reads them, whole or not at all."""
    write_json(
        path,
        [
            _known(
                question_id=question.question_id,
                img_id=question.image_id,
                sent=question.sentence,
                label=None if question.label is None else dict(question.label),
                answer_type=question.answer_type,
                question_type=question.question_type,
            )
            for question in questions
        ],
    )


def write_statements(path: str | os.PathLike[str], statements: Sequence[Statement]) -> None:
    """Write sentences as `read_statements` reads them, whole or not at all."""
    write_json(
        path,
        [
            _known(
                uid=statement.uid,
                identifier=statement.identifier,
                img0=statement.image_ids[0],
                img1=statement.image_ids[1],
                sent=statement.sentence,
                label=statement.label,
            )
            for statement in statements
        ],
    )


def read_json(path: str | os.PathLike[str], kind: type[T], what: str) -> T:
    """Read a JSON file whose outermost value is of one kind.

    Raises:
        DataError: a file that is missing, is no JSON, or holds another kind of value.
    """
    try:
        found = parse_json(path)
    except OSError as error:
        raise DataError(f"expected {what} at {str(path)!r}, got {error}; check the path") from error
    except ValueError as error:  # of JSON, of UTF-8, of what stands twice
        raise DataError(f"expected {what} in JSON at {str(path)!r}, got {error}; is the file whole?") from error
    if not isinstance(found, kind):
        raise DataError(f"expected {what} at {str(path)!r}, got a JSON {type(found).__name__}; check which file it is")
    return found


def text_in(entry: Mapping[str, Any], name: str) -> str:
    """Return the field of an entry that must be a text that is not empty.

    Raises:
        DataError: it is none.
    """
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise wrong_field(name, "a text that is not empty", entry)
    return value


def wrong_field(name: str, wanted: str, entry: Mapping[str, Any]) -> DataError:
    """The error for an entry's field that is not what it must be."""
    found = shown(entry[name]) if name in entry else f"none among {', '.join(map(str, entry)) or 'no fields'}"
    return DataError(f"field {name!r}: expected {wanted}, got {found}; correct the entry, or check which file it is")


def _read_list(
    path: str | os.PathLike[str], make: Callable[[Mapping[str, Any]], T], key: Callable[[T], object], name: str
) -> list[T]:
    made: dict[object, T] = {}
    for number, entry in enumerate(read_json(path, list, "a list of questions")):
        with within(f"{path}, entry {number}"):
            if not isinstance(entry, dict):
                raise DataError(f"expected an object with named fields, got {shown(entry)}; check which file it is")
            item = make(entry)
            if key(item) in made:
                raise wrong_field(name, "one that no entry before has", entry)
            made[key(item)] = item
    if not made:
        raise DataError(f"{path}: expected one question or more, got none; check which file it is")
    return list(made.values())


def _question(entry: Mapping[str, Any]) -> VisualQuestion:
    number = entry.get("question_id")
    if isinstance(number, bool) or not isinstance(number, int | str) or number == "":
        raise wrong_field("question_id", "a whole number (VQA) or a text (GQA)", entry)
    label = entry.get("label")
    if label is not None:
        good = isinstance(label, dict) and all(_is_score(score) for score in label.values())
        if not good:
            raise wrong_field("label", "scores in [0, 1] by answer, or none at all", entry)
        label = {answer: float(score) for answer, score in label.items()}
    return VisualQuestion(
        question_id=number,
        image_id=text_in(entry, "img_id"),
        sentence=text_in(entry, "sent"),
        label=label,
        answer_type=text_in(entry, "answer_type") if "answer_type" in entry else None,
        question_type=text_in(entry, "question_type") if "question_type" in entry else None,
    )


def _statement(entry: Mapping[str, Any]) -> Statement:
    label = entry.get("label")
    if label is not None and (isinstance(label, bool) or label not in (0, 1)):
        raise wrong_field("label", "1 for a true sentence or 0 for a false one, or none at all", entry)
    return Statement(
        uid=text_in(entry, "uid"),
        identifier=text_in(entry, "identifier"),
        image_ids=(text_in(entry, "img0"), text_in(entry, "img1")),
        sentence=text_in(entry, "sent"),
        label=None if label is None else int(label),
    )


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _known(**entry: Any) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}
