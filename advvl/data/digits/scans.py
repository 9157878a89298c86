"""Handwritten digits: scikit-learn's bundled scans, and their split into images that no two parts share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from advvl.data.digits.draws import stream
from advvl.errors import ConfigurationError, missing_extra

CLASSES = 10
PIXELS = 64
GREY_LEVELS = 16


@dataclass(frozen=True)
class DigitImages:
    """Scans of digits: `features` (N, 64) float32 in [0, 1], one grey level per pixel; `classes` (N,) int64 in 0..9."""

    features: NDArray[np.float32]
    classes: NDArray[np.int64]


@dataclass(frozen=True)
class ImageSplit:
    """Rows of `DigitImages`, disjoint between the three parts; each part holds every digit."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def load_digit_images() -> DigitImages:
    """Load the 1,797 8x8 scans that come with scikit-learn (UCI "Optical Recognition of Handwritten Digits"); no download.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "data") from error
    pixels, classes = load_digits(return_X_y=True)
    return DigitImages((pixels / GREY_LEVELS).astype(np.float32), classes.astype(np.int64))


def split_images(classes: NDArray[np.int64], *, train: int, validation: int, seed: int) -> ImageSplit:
    """Split images at random, but evenly over the digits: `train` images, `validation` images, and the rest for test.

    Arguments:
        classes: `(N,)`, the digit of each image.
        train, validation: numbers of images.

    Raises:
        ConfigurationError: a part would lack a digit.
    """
    order = np.argsort(stream(seed, 0).random(len(classes)), kind="stable")
    rank = np.empty(len(classes), dtype=np.int64)  # how many images of the same digit come before this one
    for digit in range(CLASSES):
        members = order[classes[order] == digit]
        rank[members] = np.arange(len(members))
    order = order[np.argsort(rank[order], kind="stable")]
    parts = {
        "train": order[:train],
        "validation": order[train : train + validation],
        "test": order[train + validation :],
    }
    for name, part in parts.items():
        held = len(np.unique(classes[part]))
        if held < CLASSES:
            raise ConfigurationError(
                f"expected every part of {len(classes)} images to hold all {CLASSES} digits, got {held} in {name} "
                f"for train_images={train}, validation_images={validation}; leave it more"
            )
    return ImageSplit(**parts)
