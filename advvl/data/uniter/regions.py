"""The regions of one image, as UNITER takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.errors import DataError

TOLERANCE = 1e-2
"""The part of an image by which a box may reach beyond it: annotated boxes do, and half precision rounds."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one image.

    Arguments:
        features: (n, F) float.
        boxes: (n, 7) float: x1, y1, x2, y2, width, height and area, over the image's.
        labels: (n, C) float, each region's distribution over classes, column 0 for the background; None: not read.
        scores: (n,) float, how sure the detector was; None: not read, or not known.

    Raises:
        DataError: no region, arrays of other shapes, numbers that are not finite, a box outside the image.
    """

    features: Tensor
    boxes: Tensor
    labels: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not len(self.features):
            raise DataError(
                f"expected features (n, F) of one region or more, got {tuple(self.features.shape)}; leave the image out"
            )
        if self.boxes.shape != (len(self.features), 7):
            raise DataError(
                f"expected 7 numbers of each of {len(self.features)} boxes, got {tuple(self.boxes.shape)}; write them again"
            )
        for name in ("labels", "scores"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self.features):
                raise DataError(f"expected {name} of {len(self.features)} regions, got {len(rows)}; write them again")
        for name in ("features", "boxes", "labels", "scores"):
            if (numbers := getattr(self, name)) is not None and not _finite(numbers):
                raise DataError(f"expected finite {name}, got others; extract this image again")
        corners = self.boxes[:, :4]
        low, high = corners.aminmax()
        backwards = (corners[:, :2] > corners[:, 2:]).any()
        if low < -TOLERANCE or high > 1 + TOLERANCE or backwards:
            outside = (corners < -TOLERANCE) | (corners > 1 + TOLERANCE)
            wrong = outside.any(1) | (corners[:, :2] > corners[:, 2:]).any(1)
            raise DataError(
                "expected boxes x1 <= x2, y1 <= y2 over the image's width and height, got "
                f"{corners[wrong][0].tolist()} in region {int(wrong.nonzero()[0])}; divide pixels by the image's size"
            )

    def __len__(self) -> int:
        return len(self.features)

    def first(self, count: int) -> Regions:
        """Return the first `count` regions."""
        return Regions(*(None if rows is None else rows[:count] for rows in self._arrays()))  # type: ignore[arg-type]

    def followed_by(self, other: Regions) -> Regions:
        """Return these regions and then the other's; labels and scores where both have them.

        Raises:
            DataError: features of another width.
        """
        if self.features.shape[1] != other.features.shape[1]:
            raise DataError(
                f"expected {self.features.shape[1]} features of each region, got {other.features.shape[1]}; "
                "take databases of one extraction"
            )
        both = zip(self._arrays(), other._arrays(), strict=True)
        joined = (None if one is None or two is None else torch.cat([one, two]) for one, two in both)
        return Regions(*joined)  # type: ignore[arg-type]

    def _arrays(self) -> tuple[Tensor | None, ...]:
        return self.features, self.boxes, self.labels, self.scores


def with_areas(boxes: Tensor) -> Tensor:
    """UNITER's seven numbers of boxes (n, 7), of corners (n, 4), or of corners, widths and heights (n, 6).

    Raises:
        DataError: boxes of another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 6, 7):
        raise DataError(
            f"expected boxes (n, 4), x1, y1, x2, y2, or (n, 6) with width and height, got {tuple(boxes.shape)}"
        )
    sizes = boxes[:, 4:6] if boxes.shape[1] > 4 else boxes[:, 2:4] - boxes[:, :2]
    return torch.cat([boxes[:, :4], sizes, sizes.prod(1, keepdim=True)], 1)


def _finite(numbers: Tensor) -> bool:
    """Return True if all are finite; a sum is quicker to make than a mask, and is finite only if all are."""
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())
