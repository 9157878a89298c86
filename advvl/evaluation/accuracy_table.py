"""Accuracies of methods over seeds as a Markdown table, under conditions of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from advvl.evaluation.statistics import Interval, difference_interval, mean_interval, proportion_interval


def accuracy_table(
    conditions: Sequence[str], accuracies: Mapping[str, Sequence[Sequence[float]]], *, examples: int
) -> str:
    """Return the mean accuracies in per cent, then the differences to the first method, with 95 % intervals.

    Intervals are t-intervals over the seeds, and differences are paired by seed. One seed gives Wilson's intervals and no
    differences.

    Arguments:
        conditions: the heads of the columns.
        accuracies: from a method to its accuracies in [0, 1], by seed and condition.
        examples: that one seed's accuracy is of.
    """
    methods = {name: list(zip(*seeds, strict=True)) for name, seeds in accuracies.items()}
    lines = ["Accuracy in per cent [95 % interval].", "", *_head("method", conditions)]
    lines += [
        _line([name, *(_accuracy(seeds, examples).percent() for seeds in columns)]) for name, columns in methods.items()
    ]
    first, *others = methods
    if others and all(len(seeds) > 1 for seeds in methods[first]):
        lines += ["", f"Difference to {first} in points [95 % interval], paired by seed.", ""]
        lines += _head("method", conditions)
        for name in others:
            pairs = zip(methods[name], methods[first], strict=True)
            found = [difference_interval(ours, base, within=(-1.0, 1.0)) for ours, base in pairs]
            lines.append(_line([name, *(one.percent(signed=True) for one in found)]))
    return "\n".join(lines)


def _accuracy(seeds: Sequence[float], examples: int) -> Interval:
    if len(seeds) > 1:
        return mean_interval(seeds, within=(0.0, 1.0))
    return proportion_interval(seeds[0] * examples, examples)


def _head(first: str, conditions: Sequence[str]) -> list[str]:
    return [_line([first, *conditions]), _line(["---"] * (1 + len(conditions)))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
