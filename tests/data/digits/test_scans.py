"""Scans: where they come from, and that no two parts of a split share one."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from advvl.data.digits.draws import below, pick, shuffled, stream
from advvl.data.digits.scans import load_digit_images, split_images
from advvl.errors import ConfigurationError, MissingExtraError

SCANS = load_digit_images()


def test_scans_are_grey_levels_in_sixteenths() -> None:
    assert SCANS.features.shape == (1797, 64)
    assert SCANS.features.dtype == np.float32
    levels = SCANS.features * 16
    assert np.array_equal(levels, np.round(levels))
    assert SCANS.features.min() == 0.0
    assert SCANS.features.max() == 1.0
    assert np.bincount(SCANS.classes).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("sizes", [(300, 400), (10, 10), (11, 1700)], ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_split_is_a_partition_and_every_part_holds_every_digit(sizes: tuple[int, int], seed: int) -> None:
    split = split_images(SCANS.classes, train=sizes[0], validation=sizes[1], seed=seed)
    assert (len(split.train), len(split.validation)) == sizes
    together = np.concatenate([split.train, split.validation, split.test])
    assert np.array_equal(np.sort(together), np.arange(1797))
    for part in (split.train, split.validation, split.test):
        assert len(np.unique(SCANS.classes[part])) == 10


def test_training_scans_are_even_over_the_digits_and_differ_between_seeds() -> None:
    first, second = (split_images(SCANS.classes, train=300, validation=400, seed=seed).train for seed in (0, 1))
    assert np.bincount(SCANS.classes[first]).tolist() == [30] * 10
    assert len(np.intersect1d(first, second)) < 150


@pytest.mark.parametrize(
    ("train", "validation"), [(9, 400), (300, 9), (300, 1492)], ids=["train", "validation", "test"]
)
def test_a_part_without_some_digit_is_refused(train: int, validation: int) -> None:
    with pytest.raises(ConfigurationError, match="hold all 10 digits"):
        split_images(SCANS.classes, train=train, validation=validation, seed=0)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'advvl\[data\]'"):
        load_digit_images()


def test_draws_are_fixed_for_ever() -> None:
    rng = stream(3, 1)
    assert [below(rng, 10) for _ in range(8)] == [1, 6, 5, 9, 7, 5, 1, 2]
    assert shuffled(rng, "abcde") == ["b", "e", "c", "a", "d"]
    assert {pick(rng, "ab") for _ in range(50)} == {"a", "b"}


def test_streams_of_other_keys_and_seeds_are_other_streams() -> None:
    keys = [(), (0,), (1,), (1, 0), (1, 1), (0, 1)]
    assert len({stream(seed, *key).random() for seed in range(3) for key in keys}) == 18
