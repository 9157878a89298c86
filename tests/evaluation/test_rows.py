"""Rows of a batch: every field that has them is cut, and none by a guess."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
import torch
from support.compare import same

from advvl.errors import DataError
from advvl.evaluation.rows import take_rows

X = torch.arange(12.0).view(4, 3)


def test_tensors_lists_and_what_lies_deeper_are_cut_and_all_else_stays() -> None:
    batch = {"x": X, "inner": {"words": list("abcd"), "pairs": tuple(X)}, "task": "vqa", "scale": 2.0, "none": None}
    found = take_rows(batch, torch.tensor([3, 1]))
    expected = {
        "x": X[[3, 1]],
        "inner": {"words": ["d", "b"], "pairs": (X[3], X[1])},
        "task": "vqa",
        "scale": 2.0,
        "none": None,
    }
    same(found, expected)


def test_a_field_that_is_named_belongs_to_all_examples() -> None:
    batch = {"x": X, "prior": torch.ones(4), "position_ids": torch.arange(2)[None]}
    found = partial(take_rows, whole=("prior", "position_ids"))(batch, torch.tensor([2]))
    same(found, {"x": X[[2]], "prior": torch.ones(4), "position_ids": torch.arange(2)[None]})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        pytest.param({"position_ids": torch.arange(2)[None]}, r"\{'x': 4, 'position_ids': 1\}", id="another length"),
        pytest.param({"scale": torch.tensor(2.0)}, r"\{'x': 4, 'scale': -1\}", id="no axis"),
        pytest.param({"inner": {"list": [X, X]}}, r"\{'x': 4, 'inner.list': 2\}", id="a list of something else"),
    ],
)
def test_a_field_of_another_length_is_refused_by_its_name(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        take_rows({"x": X} | extra, torch.tensor([0]))


def test_a_field_of_a_mapping_may_belong_to_all_examples() -> None:
    batch = {
        "text": {"ids": torch.arange(6).view(3, 2), "position_ids": torch.arange(2)[None]},
        "labels": torch.arange(3),
    }
    found = take_rows(batch, torch.tensor([2]), whole=("text.position_ids",))
    assert found["text"]["ids"].tolist() == [[4, 5]]
    assert found["text"]["position_ids"].shape == (1, 2)
    with pytest.raises(DataError, match=r"'text\.position_ids': 1"):
        take_rows(batch, torch.tensor([2]))


@pytest.mark.parametrize("whole", [("position_ids",), "labels", ("label",)])
def test_a_name_that_no_field_has_is_refused(whole: Collection[str]) -> None:
    batch = {"text": {"position_ids": torch.arange(2)[None]}, "labels": torch.arange(3)}
    with pytest.raises(DataError, match=r"expected whole to name fields of the batch, got \[.*'text\.position_ids'"):
        take_rows(batch, torch.tensor([2]), whole=whole)
