"""Hard negatives of both sides: example 2i is pair i with other images, 2i + 1 the same pair with other texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.uniter_shards import seeded, shard

from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs
from advvl.errors import ConfigurationError, DataError
from advvl.tasks.uniter.mining import BothSides, TwoSides


def test_examples_in_twos_are_one_pair_with_other_images_and_with_other_texts(tmp_path: Path) -> None:
    pairs = Pairs([shard(tmp_path)])
    both = TwoSides(pairs, 5)
    assert len(both) == 2 * len(pairs.examples)
    for index in (0, 1, 6, 7):
        alone = HardNegativeSource(pairs, ("images", "texts")[index % 2], 5)
        found, expected = both.batch([index], seeded()), alone.batch([index // 2], seeded())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(DataError, match="BothSides"):
        both.batch([0, 1], seeded())


def test_an_update_has_both_sides_of_each_of_its_pairs() -> None:
    parts = BothSides(20, 6).parts(1, seed=3)
    assert [part[0] % 2 for part in parts] == [0, 1] * 3
    assert [part[0] // 2 for part in parts[::2]] == [part[0] // 2 for part in parts[1::2]]
    seen = [part[0] for update in range(3) for part in BothSides(20, 6).parts(update, seed=3)]
    assert len(set(seen)) == 18
    with pytest.raises(ConfigurationError, match="even"):
        BothSides(20, 5)
