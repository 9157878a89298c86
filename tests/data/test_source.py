"""Examples that lie in memory."""

from __future__ import annotations

import pytest
import torch

from advvl.data.source import TensorSource
from advvl.errors import DataError

SOURCE = TensorSource({"x": torch.arange(12.0).view(4, 3), "y": torch.tensor([5, 6, 7, 8])})


def test_a_batch_has_the_rows_that_are_asked_for_in_their_order() -> None:
    assert len(SOURCE) == 4
    batch = SOURCE.batch([3, 0, 3], torch.Generator())
    assert list(batch) == ["x", "y"]
    assert batch["y"].tolist() == [8, 5, 8]
    assert torch.equal(batch["x"], SOURCE.tensors["x"][[3, 0, 3]])


@pytest.mark.parametrize("indices", [[], [4], [-1]])
def test_indices_of_no_example_are_refused(indices: list[int]) -> None:
    with pytest.raises(DataError, match=r"expected one or more indices in 0\.\.3, got"):
        SOURCE.batch(indices)


@pytest.mark.parametrize(
    ("tensors", "got"),
    [({}, r"\{\}"), ({"x": torch.zeros(2), "y": torch.zeros(3)}, r"\{'x': 2, 'y': 3\}")],
    ids=["none", "of different lengths"],
)
def test_tensors_that_are_no_table_are_refused(tensors: dict[str, torch.Tensor], got: str) -> None:
    with pytest.raises(DataError, match=f"tensors of the same length, got {got}"):
        TensorSource(tensors)
