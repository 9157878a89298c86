"""The examples that attacks cost a model, and how people look at them: with a heat map of where a perturbation hit.

Legend: W words, G regions.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advvl.errors import DataError
from advvl.evaluation.measurement import Measurement

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """An example that an attack cost a model, as a person looks at it.

    Arguments:
        words: the question or caption, cut into words or tokens.
        word_heat: length of the perturbation of each word, W numbers of 0 or more; empty: not perturbed.
        picture: bytes of a PNG or JPEG, or an array `(H, W)` or `(H, W, 3)` of uint8, or of floats in [0, 1]; None: a
            blank scene on which the regions are drawn.
        regions: left, top, right and bottom of each region as shares of the picture's width and height.
        region_heat: length of the perturbation of each region, G numbers of 0 or more; empty: not perturbed.
        before, after, truth: the model's answer without and with the perturbation, and the right one.
        taken: the perturbation of heat and `after` lowers the score, as `Hit` says; None: where the two answers differ. The
            page says so where it does not.

    Raises:
        DataError: a heat per word or region of another number than these, negative or not finite; regions outside [0, 1].
    """

    words: Sequence[str] = ()
    word_heat: Sequence[float] = ()
    picture: Any = None
    regions: Sequence[Box] = ()
    region_heat: Sequence[float] = ()
    before: str
    after: str
    truth: str = ""
    taken: bool | None = None

    def __post_init__(self) -> None:
        for name, heat, of in (("word", self.word_heat, self.words), ("region", self.region_heat, self.regions)):
            if len(heat) and len(heat) != len(of):
                raise DataError(f"expected a heat for each of {len(of)} {name}s, got {len(heat)}; give one per {name}")
            if not all(math.isfinite(value) and value >= 0 for value in heat):
                raise DataError(f"expected finite heats of 0 or more of {name}s, got {list(heat)}; give their norms")
        for box in self.regions:
            if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
                raise DataError(f"expected left, top, right, bottom in [0, 1], got {tuple(box)}; divide by the size")


@dataclass(frozen=True)
class Damage:
    """An example that an attack cost a model.

    Arguments:
        model: its name.
        example: its place among the N.
        budget, attack: places of those that left the lowest score; of equal ones the first. An example with soft scores may
            have lost some of its score within a smaller budget.
        clean, worst: its scores.
        norms: modality to the length of the perturbation.
    """

    model: str
    example: int
    budget: int
    attack: int
    clean: float
    worst: float
    norms: Mapping[str, float]


def damages(name: str, measurement: Measurement) -> tuple[Damage, ...]:
    """List the examples that attacks cost a model, those first that fell furthest, within the first budget, by the least."""
    found = []
    scores = measurement.scores.nan_to_num(nan=math.inf)
    lowest, attacks = scores.min(dim=1)
    for example in (lowest < measurement.clean).any(dim=0).nonzero().flatten().tolist():
        r = int(lowest[:, example].argmin())  # the first of the lowest
        a, clean = int(attacks[r, example]), float(measurement.clean[example])
        norms = {modality: float(rows[r, a, example]) for modality, rows in measurement.norms.items()}
        found.append(Damage(name, example, r, a, clean, float(lowest[r, example]), norms))
    return tuple(
        sorted(found, key=lambda one: (one.worst - one.clean, one.budget, *_known(one.norms.values()), one.example))
    )


def grid(rows: int, columns: int) -> tuple[Box, ...]:
    """The regions of a picture cut into rows and columns, such as the patches of a vision transformer, row by row."""
    return tuple(
        (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r in range(rows) for c in range(columns)
    )


def position_norms(delta: Tensor) -> Tensor:
    """The L2 norm of a perturbation at each position, fp64 on the CPU, over features or, of pixels, over channels.

    Arguments:
        delta: `(B, T, D)` at positions, `(B, C, H, W)` of pixels, or `(B, D)`.

    Returns:
        `(B, T)`, `(B, H, W)`, or `(B, 1)`.
    """
    wide = delta.detach().double().cpu()
    if wide.ndim != 4:
        wide = wide.reshape(len(wide), -1, wide.shape[-1])
    found: Tensor = torch.linalg.vector_norm(wide, dim=1 if wide.ndim == 4 else 2)
    return found


def picture_bytes(picture: Any) -> tuple[str, bytes]:
    """The media type and the bytes of a picture that is given as `Example` says.

    Raises:
        DataError: neither bytes of a PNG or JPEG nor an array of a picture.
    """
    if isinstance(picture, bytes):
        for kind, start in (("image/png", b"\x89PNG\r\n\x1a\n"), ("image/jpeg", b"\xff\xd8\xff")):
            if picture.startswith(start):
                return kind, picture
        raise DataError(f"expected the bytes of a PNG or JPEG, got {picture[:8]!r}; give an array otherwise")
    pixels = np.asarray(picture.detach().cpu() if isinstance(picture, Tensor) else picture)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
        raise DataError(f"expected a picture (H, W) or (H, W, 3), got {pixels.shape}; move its channels last")
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails too
            raise DataError(f"expected floats in [0, 1], got {pixels.min()} to {pixels.max()}; undo the normalisation")
        pixels = np.round(255 * pixels)
    elif pixels.dtype != np.uint8:
        raise DataError(f"expected a picture of uint8 or of floats in [0, 1], got {pixels.dtype}; convert it")
    return "image/png", _png(pixels.astype(np.uint8))


def _png(pixels: Any) -> bytes:
    """An 8-bit PNG of grey or colour; its format is four numbers and compressed rows (ISO/IEC 15948)."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: rows as they are, without a filter

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _known(values: Iterable[float]) -> list[float]:
    """Numbers to sort by, the unknown ones last."""
    return [math.inf if math.isnan(value) else value for value in values]
