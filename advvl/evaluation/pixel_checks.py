"""Checks of pixel attacks: the batch and labels that they are given, and the images that they return.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from advvl.checks import shown
from advvl.errors import ConfigurationError, DataError
from advvl.perturbers.balls import L2, Ball
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.places import Place

_TOLERANCE = 1e-5  # of the radius and the box, for attacks that add x and δ in fp32
_WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def checked_pixels(batch: object, field: str, pixels: object) -> tuple[Tensor, Tensor]:
    """The pixels of a batch, as the model takes them and in [0, 1], both `(B, C, H, W)`.

    Arguments:
        field: of the batch, with the pixels.
        pixels: how the batch was normalised; None: it is in [0, 1] as it is.

    Raises:
        ConfigurationError: a normalisation that is none.
        DataError: a batch that is no mapping; pixels that are no floating-point numbers, or outside [0, 1].
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"expected a batch as a mapping from field to value, got {type(batch).__name__}")
    if not (pixels is None or isinstance(pixels, Normalised)):
        raise ConfigurationError(f"expected pixels as Normalised(mean, std), or None, got {shown(pixels)}")
    x = batch.get(field)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise DataError(
            f"expected pixels in {field!r} as floating-point numbers (B, C, H, W), got {_kind(x)}; "
            "see field=…, and divide whole numbers by 255"
        )
    if not x.isfinite().all():
        raise DataError(f"expected finite pixels in {field!r}, got some that are not; correct the images")
    clean = x if pixels is None else pixels.pixels(x)
    if x.numel() and not (clean.min() >= -_TOLERANCE and clean.max() <= 1 + _TOLERANCE):
        raise DataError(f"expected pixels in [0, 1], got {clean.min():g} to {clean.max():g}; give pixels=Normalised(…)")
    return x, clean


def checked_labels(labels: object, x: Tensor) -> Tensor:
    """The class ids `(B,)` of a batch with pixels `x`, on their device.

    Raises:
        DataError: anything but a whole number of 0 or more for each row.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in _WHOLE or labels.shape != x.shape[:1]:
        raise DataError(
            f"expected labels as {len(x)} class ids, a tensor of whole numbers (B,), got {_kind(labels)}; "
            "of scores (B, A) take argmax(dim=1)"
        )
    if len(labels) and int(labels.min()) < 0:
        raise DataError(f"expected labels of 0 or more, got {int(labels.min())}; leave out rows without an answer")
    return labels.to(x.device)


def check_answers(logits: Tensor, largest: int) -> None:
    """Raise DataError if the largest class id is beyond the answers that logits `(B, A)` have."""
    if largest >= logits.shape[-1]:
        raise DataError(
            f"expected labels below {logits.shape[-1]}, the answers of the model, got {largest}; number them from 0"
        )


def verified(found: list[Any], clean: Tensor, ball: Ball, attack: str) -> Tensor:
    """Measure the perturbation in pixels from the attacked images.

    Arguments:
        found: the attacked images of each part of the batch.
        clean: pixels in [0, 1] of all of it.
        attack: its name in quotation marks after a space, for messages; empty without one.

    Returns:
        The perturbation, with what is outside the ball or [0, 1] by rounding alone brought inside.

    Raises:
        ConfigurationError: images outside the ball or [0, 1].
        DataError: anything but finite images of the shape of `clean`.
    """
    if not all(isinstance(one, Tensor) for one in found) or torch.cat(found).shape != clean.shape:
        raise DataError(f"expected attacked images {tuple(clean.shape)}, got something else; see the attack{attack}")
    attacked = torch.cat(found).detach().to(clean)
    if not attacked.isfinite().all():
        raise DataError(f"expected finite attacked images, got some that are not; see the attack{attack}")
    place, radius = Place(clean), float(getattr(ball, "radius", torch.inf))
    norms = ball.norms(attacked - clean, place)
    # The rounding of x + δ grows with the number of pixels in an L2 norm, and never with the radius.
    pixels = clean[0].numel() if isinstance(ball, L2) else 1
    rounding = _TOLERANCE * radius + torch.finfo(clean.dtype).eps * pixels**0.5
    if not (norms <= radius + rounding).all():
        raise ConfigurationError(
            f"expected the attack{attack} within {ball}, got a norm of {norms.max():g}; give it that radius, or a budget "
            "in its own norm"
        )
    if attacked.min() < -_TOLERANCE or attacked.max() > 1 + _TOLERANCE:
        raise ConfigurationError(
            f"expected attacked pixels in [0, 1], got {attacked.min():g} to {attacked.max():g}; see the attack{attack}"
        )
    return ball.project(attacked - clean, Place(clean.clamp(0, 1)), box=(0.0, 1.0))


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
