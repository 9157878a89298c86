"""Mixing: one source an update, drawn by ratio, each with its own order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from advvl.data import mixing
from advvl.data.mixing import MixedSampler, MixedSource
from advvl.data.sampling import TokenBuckets
from advvl.data.source import TensorSource
from advvl.errors import ConfigurationError, DataError

SIZES = {"a": 40, "b": 25, "c": 31}
RATIOS = {"a": 3, "b": 1, "c": 2}
SAMPLERS = {name: TokenBuckets(1 + torch.arange(n) % 7, 20, micro_batches=2, bucket=16) for name, n in SIZES.items()}


def sampler() -> MixedSampler:
    return MixedSampler(SAMPLERS, RATIOS)


def task_of(example: int) -> str:
    return "a" if example < 40 else "b" if example < 65 else "c"


def test_a_mixed_source_numbers_its_sources_on_and_batches_one_of_them() -> None:
    sources = {name: TensorSource({name: torch.arange(n)}) for name, n in SIZES.items()}
    mixed = MixedSource(sources)
    generator = torch.Generator()
    assert len(mixed) == 96
    assert mixed.batch([39, 0], generator)["a"].tolist() == [39, 0]
    assert mixed.batch([40, 64], generator)["b"].tolist() == [0, 24]
    assert mixed.batch([65, 95], generator)["c"].tolist() == [0, 30]
    with pytest.raises(DataError, match="expected examples of one source"):
        mixed.batch([39, 40], generator)
    with pytest.raises(DataError, match=r"indices in 0\.\.95"):
        mixed.batch([96], generator)


def test_all_parts_of_an_update_are_of_one_task_drawn_by_its_ratio() -> None:
    mixed = sampler()
    drawn = Counter()
    for update in range(3000):
        parts = mixed.parts(update, 5)
        (task,) = {task_of(example) for part in parts for example in part}
        assert len(parts) == 2
        drawn[task] += 1
    assert all(abs(drawn[name] / 3000 - ratio / 6) < 0.03 for name, ratio in RATIOS.items())


def test_each_task_goes_through_its_own_updates_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over the border of a block."""
    monkeypatch.setattr(mixing, "_BLOCK", 7)
    mixed = sampler()
    seen: dict[str, list[list[list[int]]]] = {name: [] for name in SIZES}
    for update in range(60):
        parts = mixed.parts(update, 5)
        seen[task_of(parts[0][0])].append(parts)
    starts = {"a": 0, "b": 40, "c": 65}
    for number, name in enumerate(SIZES):
        seed = mixing.derive_seed(5, "task", number)
        expected = [SAMPLERS[name].parts(update, seed) for update in range(len(seen[name]))]
        assert [[[i - starts[name] for i in part] for part in parts] for parts in seen[name]] == expected
    assert sampler().parts(59, 5) == mixed.parts(59, 5)  # without those before
    assert sampler().parts(0, 6) != mixed.parts(0, 5)


def test_examples_and_updates_are_those_of_all_tasks() -> None:
    mixed = sampler()
    seeds = {name: mixing.derive_seed(5, "task", number) for number, name in enumerate(SIZES)}
    assert mixed.examples == 96
    assert mixed.updates(2, 5) == sum(SAMPLERS[name].updates(2, seed) for name, seed in seeds.items())


@pytest.mark.parametrize("ratios", [{"a": 1, "b": 1}, {**RATIOS, "d": 1}, {**RATIOS, "a": 0}, {**RATIOS, "a": 0.5}])
def test_ratios_that_do_not_fit_are_refused(ratios: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a ratio for each|expected a whole number"):
        MixedSampler(SAMPLERS, ratios)


def test_nothing_to_mix_is_refused() -> None:
    with pytest.raises(DataError, match="one source or more"):
        MixedSource({})
    with pytest.raises(ConfigurationError, match="one sampler or more"):
        MixedSampler({}, {})
