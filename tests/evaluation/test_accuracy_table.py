"""Accuracies under conditions of one's own as a table."""

from __future__ import annotations

from advvl.evaluation.accuracy_table import accuracy_table
from advvl.evaluation.statistics import difference_interval, mean_interval, proportion_interval


def test_means_over_seeds_are_followed_by_differences_paired_by_seed() -> None:
    runs = {"plain": [[0.5, 0.25], [0.75, 0.5]], "ours": [[0.75, 0.25], [0.875, 0.75]]}
    table = accuracy_table(["clean", "noise"], runs, examples=8)
    clean = mean_interval([0.5, 0.75], within=(0, 1)).percent()
    assert f"| plain | {clean} | " in table
    assert "Difference to plain in points" in table
    gain = difference_interval([0.25, 0.75], [0.25, 0.5], within=(-1, 1)).percent(signed=True)
    assert table.splitlines()[-1].endswith(f" | {gain} |")


def test_one_seed_has_an_interval_over_examples_and_no_differences() -> None:
    table = accuracy_table(["clean"], {"plain": [[0.5]], "ours": [[0.75]]}, examples=8)
    assert f"| ours | {proportion_interval(6, 8).percent()} |" in table
    assert "Difference" not in table
