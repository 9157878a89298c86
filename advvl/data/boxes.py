"""Region features and boxes from users: arrays of any kind, boxes in pixels or relative to the image."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advvl.checks import shown
from advvl.errors import DataError

TOLERANCE: Final = 1e-3
"""The fraction of an image by which a box may reach beyond it; it is then cut."""


def checked_regions(features: Any, boxes: Any, size: Any = None) -> tuple[Tensor, Tensor]:
    """Check the regions of an image.

    Arguments:
        features: (R, F), a tensor, an array or nested lists.
        boxes: (R, 4), x1, y1, x2, y2, in pixels if `size` is given, otherwise relative to the image's width and height.
        size: the image's width and height in pixels, or None.

    Returns:
        The features (R, F), and the boxes (R, 4) relative to the image, both float32.

    Raises:
        DataError: no region, arrays of other shapes, non-finite numbers, boxes that are reversed, outside the image, or
            relative to it although a size is given.
    """
    features, boxes = numbers("features", features), numbers("boxes", boxes)
    if features.ndim != 2 or not features.numel() or boxes.shape != (len(features), 4):
        raise DataError(
            f"expected features (R, F) and boxes (R, 4) of one region or more, got {tuple(features.shape)} and "
            f"{tuple(boxes.shape)}; give each region a row"
        )
    return features, in_parts(boxes, size)


def in_parts(boxes: Tensor, size: Any = None) -> Tensor:
    """Return corners (R, 4) relative to the image's width and height, given so or in pixels with the image's size.

    Raises:
        DataError: see `checked_regions`.
    """
    crossed = (boxes[:, :2] > boxes[:, 2:]).any(1)
    if crossed.any():
        raise DataError(
            f"expected boxes with x1 <= x2 and y1 <= y2, got {boxes[crossed][0].tolist()}; give corners, not widths and "
            "heights"
        )
    if size is not None:
        boxes = boxes / _pixels(boxes, size)
    if boxes.min() < -TOLERANCE or boxes.max() > 1 + TOLERANCE:
        raise DataError(
            f"expected boxes x1, y1, x2, y2 inside the image, got {boxes.min():.3g} to {boxes.max():.3g} of its size; "
            "give size=(width, height) for pixels"
        )
    return boxes.clamp(0, 1)


def numbers(name: str, value: Any) -> Tensor:
    """Return numbers that are given as a tensor, an array or nested lists, in single precision.

    Raises:
        DataError: anything else, or numbers that are not finite.
    """
    try:
        found = _plain(value) if isinstance(value, Tensor) else torch.from_numpy(_array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"expected {name} as an array of numbers, got {type(value).__name__}: {error}") from error
    if not math.isfinite(float(found.sum())) and not found.isfinite().all():
        raise DataError(f"expected finite {name}, got some that are not; extract them again")
    return found


def _plain(value: Tensor) -> Tensor:
    """The numbers of a tensor in memory, without a graph."""
    if value.is_complex() or value.is_nested or value.is_meta or value.layout != torch.strided:
        raise TypeError("one that is complex, nested, sparse or without numbers")
    return value.detach().to("cpu", torch.float32)


def _array(value: Any) -> NDArray[np.float32]:
    if np.iscomplexobj(value):
        raise TypeError("complex numbers")
    with np.errstate(over="ignore"):  # a number too large for single precision is found to be infinite
        found = np.asarray(value, dtype=np.float32)
    return found if found.flags.writeable else found.copy()


def _pixels(boxes: Tensor, size: Any) -> Tensor:
    try:
        sides = torch.from_numpy(_array(size))
    except (TypeError, ValueError):
        sides = torch.zeros(0)
    if sides.shape != (2,) or not sides.isfinite().all() or sides.min() <= 0:
        raise DataError(
            f"expected size as (width, height) in pixels, got {shown(size)}; leave it out if it is not known"
        )
    if boxes.max() <= 1 < sides.min():
        raise DataError(
            f"expected boxes in pixels with size={shown(size)}, got all in [0, 1] already; leave size out, or give pixels"
        )
    return sides.repeat(2)
