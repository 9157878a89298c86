"""Views of an accuracy-radius curve: a table, intervals, a data frame, a figure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from advvl.errors import missing_extra
from advvl.evaluation.figures import new_figure
from advvl.evaluation.statistics import Interval, accuracy_interval


class CurveViews(ABC):
    """The views that every curve has: scores of N examples, clean and at R radii."""

    radii: tuple[float, ...]
    clean: Tensor
    scores: Tensor

    @property
    @abstractmethod
    def title(self) -> str:
        """The kind of perturbation, such as "image (L2)"."""

    def intervals(self, *, confidence: float = 0.95) -> tuple[Interval, ...]:
        """Wilson's interval of the accuracy at radius 0 and at each of the radii, R + 1 of them, in [0, 1].

        Raises:
            ConfigurationError: a confidence outside (0, 1).
        """
        return tuple(accuracy_interval([row.tolist()], confidence=confidence) for row in (self.clean, *self.scores))

    def __str__(self) -> str:
        """A table of radius, accuracy and interval in per cent."""
        lines = [f"{self.title}, {len(self.clean)} examples", f"{'radius':>10} {'accuracy':>9}  95 % interval"]
        lines += [
            f"{radius:>10g} {100 * one.estimate:>8.1f} %  [{100 * one.low:.1f}, {100 * one.high:.1f}]"
            for radius, one in zip((0.0, *self.radii), self.intervals(), strict=True)
        ]
        return "\n".join(lines)

    def to_frame(self, *, confidence: float = 0.95) -> Any:
        """A pandas DataFrame with the columns radius, accuracy, low, high and examples.

        Raises:
            MissingExtraError: pandas, of the extra `report`, is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise missing_extra("pandas", "report") from error
        found = self.intervals(confidence=confidence)
        return pd.DataFrame(
            {
                "radius": [0.0, *self.radii],
                "accuracy": [one.estimate for one in found],
                "low": [one.low for one in found],
                "high": [one.high for one in found],
                "examples": [one.count for one in found],
            }
        )

    def plot(self, *, axes: Any = None, label: str | None = None, confidence: float = 0.95) -> Any:
        """Draw the curve with its band, radius to scale; return the matplotlib axes.

        Arguments:
            axes: to draw on; None: those of a new figure.
            label: of the line.

        Raises:
            MissingExtraError: matplotlib, of the extra `report`, is not installed.
        """
        axes = new_figure().subplots() if axes is None else axes
        found = self.intervals(confidence=confidence)
        bounded = [
            (radius, one) for radius, one in zip((0.0, *self.radii), found, strict=True) if math.isfinite(radius)
        ]
        radii = [radius for radius, _ in bounded]
        (line,) = axes.plot(radii, [100 * one.estimate for _, one in bounded], marker="o", label=label)
        low, high = ([100 * getattr(one, end) for _, one in bounded] for end in ("low", "high"))
        axes.fill_between(radii, low, high, color=line.get_color(), alpha=0.2)
        axes.set_xlabel(f"radius of {self.title}")
        axes.set_ylabel(f"worst-case accuracy, per cent [{100 * confidence:g} % interval]")
        axes.set_ylim(0, 100)
        return axes
