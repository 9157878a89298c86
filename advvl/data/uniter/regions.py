"""The regions of one image, as UNITER takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advvl.errors import DataError

TOLERANCE = 1e-2
"""The fraction of an image by which a box may reach beyond it, because annotated boxes do and half precision rounds."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one image.

    Arguments:
        features: (n, F) float.
        boxes: (n, 7) float: x1, y1, x2, y2, width, height and area, relative to the image.
        labels: (n, C) float, each region's distribution over classes, column 0 for the background; None: not read.
        scores: (n,) float, the detector's confidence; None: not read, or not known.

    Raises:
        DataError: no region, arrays of other shapes, numbers that are not finite, a box outside the image.
    """

    features: Tensor
    boxes: Tensor
    labels: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.features.shape[0] if self.features.ndim == 2 else 0
        if not count:
            raise DataError(
                f"expected features (n, F) of one region or more, got {tuple(self.features.shape)}; leave the image out"
            )
        if self.boxes.shape != (count, 7):
            raise DataError(
                f"expected 7 numbers of each of {count} boxes, got {tuple(self.boxes.shape)}; write them again"
            )
        _check_finite("features", self.features)
        _check_boxes(self.boxes.numpy())
        for name, axes in (("labels", 2), ("scores", 1)):
            if (rows := getattr(self, name)) is not None:
                if rows.ndim != axes or len(rows) != count or not rows.numel():
                    shape = f"({count}, C)" if axes == 2 else f"({count},)"
                    raise DataError(
                        f"expected {name} {shape} of {count} regions, got {tuple(rows.shape)}; write them again"
                    )
                _check_finite(name, rows)

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


def regions_of(features: Tensor, corners: Tensor, labels: Tensor | None = None) -> Regions:
    """Make regions from features (n, F) and corners x1, y1, x2, y2 (n, 4) relative to the image, both float32 on the CPU.

    Raises:
        DataError: see `Regions`.
    """
    return Regions(features, torch.from_numpy(with_areas(corners.numpy())), labels)


def with_areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """UNITER's seven numbers of boxes (n, 7), of corners (n, 4), or of corners, widths and heights (n, 6).

    Raises:
        DataError: boxes of another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] not in (4, 6, 7):
        raise DataError(f"expected boxes (n, 4), x1, y1, x2, y2, or (n, 6) with width and height, got {boxes.shape}")
    seven = np.empty((len(boxes), 7), np.float32)
    seven[:, :4] = boxes[:, :4]
    seven[:, 4:6] = boxes[:, 4:6] if boxes.shape[1] > 4 else boxes[:, 2:] - boxes[:, :2]
    seven[:, 6] = seven[:, 4] * seven[:, 5]
    return seven


def _check_finite(name: str, numbers: Tensor) -> None:
    # A sum takes less time than a mask, and is finite only if all are.
    if not math.isfinite(float(numbers.sum())) and not bool(numbers.isfinite().all()):
        raise DataError(f"expected finite {name}, got others; extract this image again")


def _check_boxes(boxes: NDArray[Any]) -> None:
    # In numpy, which takes less time than torch for as little as this.
    if not math.isfinite(boxes.sum()):
        raise DataError("expected finite boxes, got others; extract this image again")
    corners = boxes[:, :4]
    ordered = corners[:, :2] <= corners[:, 2:]
    if corners.min() < -TOLERANCE or corners.max() > 1 + TOLERANCE or not ordered.all():
        outside = ((corners < -TOLERANCE) | (corners > 1 + TOLERANCE)).any(1)
        wrong = int((outside | ~ordered.all(1)).argmax())
        raise DataError(
            "expected boxes x1 <= x2, y1 <= y2 over the image's width and height, got "
            f"{corners[wrong].tolist()} in region {wrong}; divide pixels by the image's size"
        )
