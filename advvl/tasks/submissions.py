"""Predictions in the formats of the tasks' evaluation servers; files are written atomically."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from advvl.errors import DataError
from advvl.files import write_json, write_text

VCR_COLUMNS = (
    *(f"answer_{i}" for i in range(4)),
    *(f"rationale_conditioned_on_a{j}_{i}" for j in range(4) for i in range(4)),
)
"""The columns of VCR's file after `annot_id`."""


def write_vqa_answers(path: str | os.PathLike[str], answers: Mapping[int | str, str]) -> Path:
    """Write answers by question id in the format of VQA's server: `[{"question_id": …, "answer": …}, …]`."""
    return write_json(path, [{"question_id": number, "answer": answer} for number, answer in answers.items()])


def write_nlvr2_judgements(path: str | os.PathLike[str], judgements: Mapping[str, bool]) -> Path:
    """Write judgements by identifier as NLVR2's script takes them: `test1-0-1-0,True` and so on, one per line."""
    return write_text(path, "".join(f"{identifier},{bool(right)}\n" for identifier, right in judgements.items()))


def write_vcr_scores(path: str | os.PathLike[str], scores: Mapping[str, Sequence[float]]) -> Path:
    """Write the 20 scores of each question as VCR's server takes them, questions in the order of their numbers.

    Arguments:
        scores: by identifier, such as `test-17`: of four answers, then of four rationales of each; a row of 20 of
            `logits[:, 1].reshape(N, 20)`, as a list.

    Raises:
        DataError: no question, another number of scores, scores that are not finite, an identifier without a number.
    """
    if not scores:
        raise DataError("expected scores of a question or more, got none; is the split empty?")
    lines = [",".join(("annot_id", *VCR_COLUMNS))]
    for identifier in sorted(scores, key=_number):
        row = [float(score) for score in scores[identifier]]
        if len(row) != len(VCR_COLUMNS) or not all(map(math.isfinite, row)):
            raise DataError(
                f"expected {len(VCR_COLUMNS)} finite scores of {identifier!r}, got {row}; give four answers' and then four "
                "rationales' of each"
            )
        lines.append(",".join((identifier, *map(repr, row))))
    return write_text(path, "\n".join(lines) + "\n")


def _number(identifier: object) -> int:
    found = re.search(r"\d+$", identifier) if isinstance(identifier, str) else None
    if found is None:
        raise DataError(f"expected an identifier that ends in a number, as test-17, got {identifier!r}; give VCR's own")
    return int(found.group())
