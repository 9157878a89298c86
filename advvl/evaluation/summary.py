"""The summary of an experiment: every method under every condition, with intervals and differences to a baseline.

With several seeds a method's number is the mean over seeds with its t-interval, and a difference is paired by seed. With
one seed there is no scatter of training to see: the interval is then Wilson's over test examples, and the difference is
paired by example, with Agresti and Min's interval. `Summary.over` says which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from advvl.errors import DataError
from advvl.evaluation.statistics import (
    Interval,
    accuracy_interval,
    difference_interval,
    mean_interval,
    paired_interval,
    paired_p_value,
)


@dataclass(frozen=True, order=True)
class Condition:
    """The condition of a score: no perturbation (the whole test set), or the worst within a radius of a modality.

    A radius of 0 with a modality is the clean score of the very examples that were attacked.
    """

    modality: str = ""
    radius: float = 0.0

    def __str__(self) -> str:
        return f"{self.modality} {self.radius:g}" if self.modality else "clean"


@dataclass(frozen=True, eq=False)
class RunResult:
    """The results of one method from one seed.

    Arguments:
        scores: under each condition, every example's score, `(N,)` in [0, 1]; the examples are the same for all runs.
        seconds_per_update: mean wall-clock time of a training update; None if it was not measured.
    """

    method: str
    seed: int
    scores: Mapping[Condition, Tensor]
    seconds_per_update: float | None = None

    @classmethod
    def of(
        cls,
        method: str,
        seed: int,
        *,
        clean: Sequence[float],
        attacked: Mapping[str, Mapping[float, Sequence[float]]],
        seconds_per_update: float | None = None,
    ) -> RunResult:
        """Make a result from scores as they are kept in a file.

        Arguments:
            clean: of every test example.
            attacked: modality to radius to the worst scores of the first so many of them.
        """
        whole = torch.tensor(clean, dtype=torch.float64)
        scores = {Condition(): whole}
        for modality, by_radius in attacked.items():
            for radius, worst in sorted(by_radius.items()):
                scores.setdefault(Condition(modality, 0.0), whole[: len(worst)])
                scores[Condition(modality, radius)] = torch.tensor(worst, dtype=torch.float64)
        return cls(method, seed, scores, seconds_per_update)


@dataclass(frozen=True)
class MethodSummary:
    """One method: its accuracies, their differences to the baseline's, and its time per update, with intervals.

    Arguments:
        p_value: of the paired t-test beside each difference over seeds, not corrected for their number; None where all
            seeds differ by the same. Empty over examples.
    """

    method: str
    accuracy: Mapping[Condition, Interval]
    difference: Mapping[Condition, Interval]
    seconds_per_update: Interval | None
    p_value: Mapping[Condition, float | None]


@dataclass(frozen=True)
class Summary:
    """All methods under all conditions; made by `summarise`.

    Arguments:
        examples: how many test examples each condition's scores are of, for every method and seed.
    """

    rows: tuple[MethodSummary, ...]
    conditions: tuple[Condition, ...]
    examples: Mapping[Condition, int]
    seeds: tuple[int, ...]
    baseline: str
    confidence: float
    over: Literal["seeds", "examples"]


def summarise(results: Sequence[RunResult], *, baseline: str, confidence: float = 0.95) -> Summary:
    """Summarise the results of every method and seed, in the order in which methods first occur.

    Raises:
        DataError: no result; a baseline that is none of the methods; methods of other seeds, conditions or numbers of
            examples than the first, or two results for one seed.
    """
    runs = _by_method(results)
    if baseline not in runs:
        raise DataError(f"expected the baseline among the methods {sorted(runs)}, got {baseline!r}")
    first = results[0]
    seeds = tuple(sorted(runs[baseline]))
    over: Literal["seeds", "examples"] = "examples" if len(seeds) == 1 else "seeds"
    rows = []
    for method, by_seed in runs.items():
        accuracy, difference, p_value = {}, {}, {}
        for condition in first.scores:
            scores, base = (
                [found[seed].scores[condition].tolist() for seed in seeds] for found in (by_seed, runs[baseline])
            )
            accuracy[condition] = accuracy_interval(scores, confidence=confidence)
            if method != baseline:
                difference[condition] = _difference(scores, base, confidence)
                if over == "seeds":
                    p_value[condition] = paired_p_value(*([fmean(seed) for seed in of] for of in (scores, base)))
        times = [time for seed in seeds if (time := by_seed[seed].seconds_per_update) is not None]
        rows.append(MethodSummary(method, accuracy, difference, _time(times, confidence), p_value))
    examples = {condition: len(scores) for condition, scores in first.scores.items()}
    return Summary(tuple(rows), tuple(first.scores), examples, seeds, baseline, confidence, over)


def _by_method(results: Sequence[RunResult]) -> dict[str, dict[int, RunResult]]:
    if not results:
        raise DataError("expected one result or more to report, got none")
    first = {condition: len(scores) for condition, scores in results[0].scores.items()}
    runs: dict[str, dict[int, RunResult]] = {}
    for run in results:
        found = {condition: len(scores) for condition, scores in run.scores.items()}
        if found != first:
            raise DataError(
                f"expected the conditions and numbers of examples of the first result, {_named(first)}, "
                f"got {_named(found)} from {run.method!r}, seed {run.seed}"
            )
        if run.seed in runs.setdefault(run.method, {}):
            raise DataError(f"expected one result of {run.method!r} for each seed, got two for seed {run.seed}")
        runs[run.method][run.seed] = run
    seeds = {method: sorted(by_seed) for method, by_seed in runs.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        raise DataError(f"expected every method to have the same seeds, got {seeds}; run the missing ones")
    return runs


def _named(examples: Mapping[Condition, int]) -> str:
    return ", ".join(f"{condition} ({count})" for condition, count in examples.items())


def _difference(scores: Sequence[Sequence[float]], base: Sequence[Sequence[float]], confidence: float) -> Interval:
    if len(scores) == 1:
        return paired_interval(scores[0], base[0], confidence=confidence)
    means, base_means = ([fmean(seed) for seed in of] for of in (scores, base))
    return difference_interval(means, base_means, confidence=confidence, within=(-1.0, 1.0))


def _time(times: Sequence[float], confidence: float) -> Interval | None:
    if len(times) > 1:
        return mean_interval(times, confidence=confidence)
    return Interval(times[0], math.nan, math.nan, confidence, 1, "single") if times else None
