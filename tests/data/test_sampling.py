"""Token buckets: full, never over the budget, every example once an epoch, and the same ones from the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advvl.data import sampling
from advvl.data.sampling import TokenBuckets
from advvl.errors import ConfigurationError, DataError

BUDGET = 10240


def lengths(count: int, low: int = 20, high: int = 160, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(seed))


def loads(sampler: TokenBuckets, epoch: int = 0) -> list[int]:
    """Padded tokens of each micro-batch of an epoch."""
    return [len(rows) * int(sampler.lengths[rows].max()) for rows in sampler.epoch(epoch, 1)]


def test_micro_batches_fill_nine_tenths_of_their_budget_and_the_published_ones_little_more_than_half() -> None:
    uniform = lengths(50_000)
    ours, theirs = loads(TokenBuckets(uniform, BUDGET)), loads(TokenBuckets(uniform, BUDGET, filling="uniter"))
    assert max(*ours, *theirs) <= BUDGET
    assert sum(ours) / len(ours) > 0.95 * BUDGET
    assert 0.55 * BUDGET < sum(theirs) / len(theirs) < 0.59 * BUDGET
    real = sum(int(uniform[rows].sum()) for rows in TokenBuckets(uniform, BUDGET).epoch(0, 1))
    assert real > 0.98 * sum(ours)  # little of it is padding


def published(order: list[int], long: list[int], *, tokens: int, bucket: int, multiple: int) -> list[list[int]]:
    """Batches as the published sampler cuts them from an order, in which it drops what is left of a bucket."""
    batches = []
    for start in range(0, len(order), bucket):
        ids = sorted(order[start : start + bucket], key=lambda i: long[i], reverse=True)
        longest, batch = 0, []
        for first in range(0, len(ids), multiple):
            chunk = ids[first : first + multiple]
            longest = max(longest, max(long[i] for i in chunk))
            if longest * (len(batch) + multiple) > tokens:
                batches.append(batch)
                batch = list(chunk)
            else:
                batch.extend(chunk)
    return batches


@pytest.mark.parametrize(("count", "bucket", "multiple"), [(1000, 128, 8), (997, 100, 8), (64, 8192, 1), (200, 50, 3)])
def test_the_published_filling_is_the_published_samplers(
    count: int, bucket: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = lengths(count, high=60)
    order = torch.randperm(count).tolist()
    monkeypatch.setattr(
        sampling.torch, "randperm", lambda n, generator: torch.tensor(order if n == count else range(n))
    )
    sampler = TokenBuckets(long, 500, bucket=bucket, multiple=multiple, filling="uniter")
    expected = published(order, long.tolist(), tokens=500, bucket=bucket, multiple=multiple)
    assert [rows.tolist() for rows in sampler.epoch(0, 0)] == expected
    assert len(expected) > 3


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80),
    st.integers(50, 200),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_every_example_comes_once_an_epoch_and_no_micro_batch_is_over_budget(
    drawn: list[int], tokens: int, bucket: int, multiple: int, epoch: int
) -> None:
    sampler = TokenBuckets(torch.tensor(drawn), tokens, bucket=bucket, multiple=multiple)
    batches = [rows.tolist() for rows in sampler.epoch(epoch, 5)]
    assert sorted(row for rows in batches for row in rows) == list(range(len(drawn)))
    assert all(rows and max(drawn[row] for row in rows) * len(rows) <= tokens for rows in batches)


def test_the_number_of_rows_is_a_multiple_where_the_budget_allows() -> None:
    sampler = TokenBuckets(lengths(5000), BUDGET)
    sizes = [len(rows) for rows in sampler.epoch(0, 1)]
    assert sum(size % 8 != 0 for size in sizes) <= 1  # what was left at the end
    long = TokenBuckets(torch.full((50,), 30), 100)
    assert [len(rows) for rows in long.epoch(0, 1)].count(3) == 16  # not one of 8 fits


def test_updates_go_through_the_epochs_one_after_another() -> None:
    """An update may end one epoch and begin the next: nothing is left out, whatever their number."""
    one, three = (TokenBuckets(lengths(300), 1000, micro_batches=n, bucket=64) for n in (1, 3))
    count = len(one.epoch(0, 7))
    assert count % 3 != 0 or len(one.epoch(1, 7)) % 3 != 0
    stream = [one.parts(number, 7)[0] for number in range(3 * 40)]
    assert stream[:count] == [rows.tolist() for rows in one.epoch(0, 7)]
    assert sorted(sum(stream[count : count + len(one.epoch(1, 7))], [])) == list(range(300))  # noqa: RUF017
    assert [part for number in range(40) for part in three.parts(number, 7)] == stream
    assert one.updates(1, 7) == count
    assert three.updates(1, 7) == -(-count // 3)
    assert three.updates(2, 7) == -(-(count + len(one.epoch(1, 7))) // 3)


def test_an_update_follows_from_its_number_and_the_seed_alone() -> None:
    def sampler() -> TokenBuckets:
        return TokenBuckets(lengths(500), 1000, micro_batches=2, bucket=100)

    forward = [sampler.parts(number, 3) for sampler in [sampler()] for number in range(90)]
    assert [sampler().parts(number, 3) for number in (89, 5, 40)] == [forward[number] for number in (89, 5, 40)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert sampler().parts(0, 4) != forward[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert sampler().parts(0, 3) == forward[0]


def test_lengths_vary_from_update_to_update_and_orders_from_epoch_to_epoch() -> None:
    sampler = TokenBuckets(lengths(2000), 1000, bucket=500)
    longest = [int(sampler.lengths[rows].max()) for rows in sampler.epoch(0, 1)]
    assert longest != sorted(longest, reverse=True)
    assert [rows.tolist() for rows in sampler.epoch(0, 1)] != [rows.tolist() for rows in sampler.epoch(1, 1)]


def test_an_example_over_the_budget_is_refused_by_name_or_skipped_and_listed() -> None:
    long = torch.tensor([30, 101, 40, 200])
    with pytest.raises(DataError, match=r"at most 100 tokens, got 2 longer ones, the first 1 of 101"):
        TokenBuckets(long, 100)
    with pytest.raises(DataError, match=r"the first b of 101"):
        TokenBuckets(long, 100, names="abcd".__getitem__)
    sampler = TokenBuckets(long, 100, too_long="skip")
    assert sampler.skipped == (1, 3)
    assert sorted(np.concatenate(sampler.epoch(0, 1))) == [0, 2]
    with pytest.raises(DataError, match="at most 20 tokens, got 4 longer ones"):
        TokenBuckets(long, 20, too_long="skip")
    with pytest.raises(DataError, match="at most 12 tokens"):  # as published, where eight of them have to fit
        TokenBuckets(long, 100, filling="uniter")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"tokens": 0}, "tokens"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"bucket": 1.5}, "bucket"),
        ({"multiple": True}, "multiple"),
        ({"filling": "villa"}, "filling"),
        ({"too_long": "cut"}, "too_long"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {named}"):
        TokenBuckets(**{"lengths": lengths(9), "tokens": 1000, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(0, dtype=torch.long), torch.ones(3), torch.ones(2, 2, dtype=torch.long), torch.tensor([3, 0]), [3]],
)
def test_lengths_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"expected lengths \(N,\) of 1 or more"):
        TokenBuckets(wrong, 1000)


def test_too_few_examples_for_one_published_micro_batch_are_refused() -> None:
    few = TokenBuckets(torch.full((12,), 5), 5120, filling="uniter")
    with pytest.raises(DataError, match="expected examples that fill a micro-batch of 5120 tokens, got 12 that do not"):
        few.parts(0, 1)
