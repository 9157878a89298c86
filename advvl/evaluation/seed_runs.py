"""The results of an experiment over seeds, read back from its `results.json`: curves of accuracy with intervals.

Legend: S seeds, R radii.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from advvl.checks import is_number, is_whole, shown
from advvl.errors import DataError
from advvl.evaluation.page_tables import flat
from advvl.evaluation.statistics import (
    Interval,
    difference_interval,
    mean_interval,
    paired_p_value,
    proportion_interval,
)
from advvl.files import parse_json

CLEAN: Final = "clean"
"""The kind of the accuracy of all examples without perturbation, a curve without radii."""

_MOST: Final = 2**53
"""Up to here whole numbers are floats."""


@dataclass(frozen=True)
class SeedCurve:
    """The accuracy of a method within L2 balls of R radii of one modality, from each of S seeds.

    Arguments:
        kind: of the balls, such as "image (L2)"; or `CLEAN`.
        radii: ascending, above 0.
        accuracies: by seed, at radius 0 and at each of the radii, R + 1 of them, in [0, 1].
        examples: that were attacked.
    """

    kind: str
    radii: tuple[float, ...]
    accuracies: Mapping[int, tuple[float, ...]]
    examples: int

    @property
    def marks(self) -> tuple[str, ...]:
        """The radii in words."""
        return tuple(f"{radius:g}" for radius in self.radii)

    def intervals(self, *, confidence: float = 0.95) -> tuple[Interval, ...]:
        """The t-interval of the mean over seeds at radius 0 and at each of the radii; of one seed Wilson's over examples.

        Raises:
            ConfigurationError: a confidence outside (0, 1).
        """
        found = zip(*self.accuracies.values(), strict=True)
        if len(self.accuracies) > 1:
            return tuple(mean_interval(seeds, confidence=confidence, within=(0.0, 1.0)) for seeds in found)
        return tuple(proportion_interval(one * self.examples, self.examples, confidence=confidence) for (one,) in found)

    def less(self, other: SeedCurve, *, confidence: float = 0.95) -> tuple[Interval, ...] | None:
        """The t-intervals of the differences to another method, paired by seed; None without two seeds in common.

        Arguments:
            other: a curve with the same radii.
        """
        pairs = self._pairs(other)
        if pairs is None:
            return None
        return tuple(difference_interval(*pair, confidence=confidence, within=(-1.0, 1.0)) for pair in pairs)

    def p_values(self, other: SeedCurve) -> tuple[float | None, ...] | None:
        """The p-values of paired t-tests beside the intervals of `less`, each None where every seed differs by the same."""
        pairs = self._pairs(other)
        return None if pairs is None else tuple(paired_p_value(*pair) for pair in pairs)

    def _pairs(self, other: SeedCurve) -> list[tuple[tuple[float, ...], tuple[float, ...]]] | None:
        """The accuracies of the seeds in common, at radius 0 and at each of the radii; None of fewer than two."""
        common = [seed for seed in self.accuracies if seed in other.accuracies]
        if len(common) < 2:
            return None
        mine, theirs = (zip(*(one.accuracies[seed] for seed in common), strict=True) for one in (self, other))
        return list(zip(mine, theirs, strict=True))


@dataclass(frozen=True, eq=False)
class SeedRuns:
    """The methods of an experiment, each trained from several seeds.

    Arguments:
        label: what kind of run it was.
        baseline: the method that the others are compared with.
        curves: by kind of perturbation, `CLEAN` first, and by method.
        configuration: what was trained on what data, and how it was attacked; plain JSON.
        chance: accuracy of the best constant answer; None: not known.
        data: the fingerprint of the test examples; None: not known, of results written before there was one.
        versions: of the packages that trained and attacked; None: not known, likewise.
    """

    label: str
    baseline: str
    curves: Mapping[str, Mapping[str, SeedCurve]]
    configuration: Mapping[str, Any]
    chance: float | None = None
    data: str | None = None
    versions: Mapping[str, str] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SeedRuns:
        """Read the `results.json` of an experiment.

        Raises:
            DataError: another file.
        """
        try:
            return cls._of(parse_json(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(
                f"expected the results of an experiment in {str(path)!r}, got {error!r}; give its results.json"
            ) from error

    @classmethod
    def _of(cls, found: Any) -> SeedRuns:
        conditions = [(one["modality"] or CLEAN, float(one["radius"])) for one in found["methods"][0]["conditions"]]
        curves = {}
        for modality in dict.fromkeys(modality for modality, _ in conditions):
            radii = tuple(radius for name, radius in conditions if name == modality)
            ascending = all(a < b < math.inf for a, b in pairwise(radii))
            if radii[0] or not ascending or (len(radii) == 1) != (modality == CLEAN):
                raise ValueError(f"radii {radii} of {modality}")
            kind = CLEAN if modality == CLEAN else f"{modality} (L2)"
            names = [CLEAN] if modality == CLEAN else [f"{modality} {radius:g}" for radius in radii]
            curves[kind] = _curves(found["runs"], names, kind, radii[1:])
        if len(curves) < 2 or any(found["baseline"] not in methods for methods in curves.values()):
            raise ValueError("no attack, or no baseline")
        chance = found.get("chance")
        if chance is not None and not (is_number(chance) and 0 <= chance <= 1):
            raise ValueError(f"chance {shown(chance)}")
        data = found.get("data_fingerprint")
        if data is not None and not isinstance(data, str):
            raise ValueError(f"data_fingerprint {shown(data)}")
        versions = found.get("versions")
        if versions is not None and not all(isinstance(text, str) for one in versions.items() for text in one):
            raise ValueError(f"versions {shown(versions)}")
        label, baseline, configuration = str(found["label"]), str(found["baseline"]), dict(found["configuration"])
        return cls(label, baseline, curves, configuration, chance, data, versions)


def _curves(runs: Any, names: list[str], kind: str, radii: tuple[float, ...]) -> dict[str, SeedCurve]:
    """The curve of each method, from the accuracies of its runs under conditions of these names.

    Raises:
        ValueError: accuracies that are none; runs of one method on different examples, or two from one seed.
        TypeError: a method's name that is no text.
    """
    curves: dict[str, SeedCurve] = {}
    for run in runs:
        values = tuple(float(run["accuracy"][name]) for name in names)
        counts = {run["examples"][name] for name in names}
        examples = counts.pop()
        whole = not counts and is_whole(examples) and 1 <= examples <= _MOST
        if not whole or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"accuracies {values} of {shown(examples)} examples")
        method, seed = run["method"], run["seed"]
        if not isinstance(method, str):
            raise TypeError(f"method {shown(method)}")
        known = curves.get(method, SeedCurve(kind, radii, {}, examples))
        if seed in known.accuracies or known.examples != examples:
            raise ValueError(f"seed {seed} of {method!r} twice, or of other examples")
        curves[method] = replace(known, accuracies={**known.accuracies, seed: values})
    return curves


def check_same_test(runs: Mapping[str, SeedRuns]) -> None:
    """Check that experiments differ in their methods and seeds alone.

    Raises:
        DataError: they are of other settings or data, or attacked other examples or other radii.
    """
    if not runs:
        return
    (name, first), *others = runs.items()
    for other, one in others:
        mine, theirs = (_test(each) for each in (first, one))
        differ = [entry for entry in {**mine, **theirs} if mine.get(entry) != theirs.get(entry)]
        if differ:
            got = [of.get(differ[0], "none") for of in (mine, theirs)]
            more = f" (and {len(differ) - 1} other differences)" if len(differ) > 1 else ""
            raise DataError(
                f"expected results of the same settings and data to show together, got {differ[0]} {got[0]} of {name!r} "
                f"and {got[1]} of {other!r}{more}; write a page for each"
            )


def _test(one: SeedRuns) -> dict[str, str]:
    """The settings of an experiment, and what was attacked, in words."""
    tests = {f"radii of {kind}": next(iter(methods.values())).marks for kind, methods in one.curves.items()}
    counts = {
        f"examples of {kind}": sorted({curve.examples for curve in methods.values()})
        for kind, methods in one.curves.items()
    }
    known = {"chance": one.chance, "test data": one.data or "not known", "versions": one.versions or "not known"}
    return dict(flat({**one.configuration, **tests, **counts, **known}))
