"""Batches of updates: those of their numbers, in whatever order they are asked for, and whoever makes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from advvl.errors import DataError
from advvl.fit.loading import Batches, Updates

ORDER = [0, 1, 5, 6, 0, 1]


class Drawing:
    """Batches that say their examples, a number drawn, and the process that made them; not of the example `broken`."""

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 40

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        if self.broken in indices:
            raise DataError("expected a row, got none; leave it out")
        drawn = torch.rand(2, generator=generator)
        return {"rows": torch.tensor(indices), "drawn": drawn, "task": "a", "process": os.getpid()}


def updates(**options: Any) -> Updates:
    usual = {"source": Drawing(), "sampler": None, "batch_size": 6, "seed": 3, "parts": 3, "mine": [0, 2]}
    return Updates(**{**usual, **options})


def test_parts_have_every_nth_example_and_generators_of_one_state() -> None:
    divided = updates().divided(1)
    batches = updates()[1]
    assert [batch["rows"].tolist() for batch in batches] == [divided[0], divided[2]]
    assert sorted(sum(divided, [])) == sorted({*divided[0], *divided[1], *divided[2]})  # noqa: RUF017
    assert torch.equal(batches[0]["drawn"], batches[1]["drawn"])
    assert not torch.equal(updates()[0][0]["drawn"], batches[0]["drawn"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_made_ahead_are_those_of_their_number_in_any_order(workers: int) -> None:
    ahead = Batches(updates(), 9, workers)
    for number in ORDER:
        for found, expected in zip(ahead.of(number), updates()[number], strict=True):
            assert found["process"] != os.getpid()
            assert (found["rows"].tolist(), found["task"]) == (expected["rows"].tolist(), "a")
            assert torch.equal(found["drawn"], expected["drawn"])


@pytest.mark.slow
def test_an_error_of_a_source_is_the_same_error_from_a_worker() -> None:
    of_seven = updates(source=Drawing(7), mine=[0, 1, 2])
    broken = next(number for number in range(6) if any(7 in part for part in of_seven.divided(number)))
    ahead = Batches(of_seven, 9, 1)
    with pytest.raises(DataError, match=r"^expected a row, got none; leave it out$"):
        [ahead.of(number) for number in range(broken + 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_for_a_gpu_are_pinned() -> None:
    (first, _) = Batches(updates(), 9, 1, pinned=True).of(0)
    assert first["rows"].is_pinned()
    assert first["task"] == "a"
