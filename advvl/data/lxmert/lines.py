"""One image's regions, and the line that LXMERT's region files have for it.

Ten tab-separated columns; ids, scores, boxes and features are base64 of raw little-endian buffers. Source: the published
code of Tan & Bansal, "LXMERT", EMNLP 2019.

Legend: n regions, F features.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from advvl.checks import is_whole, shown
from advvl.errors import DataError

COLUMNS: Final = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)
HEAD: Final = len(COLUMNS) - 1
"""The columns before the features."""

TOLERANCE: Final = 1e-5
"""The fraction of an image by which a box may reach beyond it, for rounding in single precision only."""

SCALAR: Final = 4
"""Bytes of a feature."""

_MOST_DIGITS: Final = 9
"""Digits of a whole number: those of an image a million pixels wide, and of more regions than a line can hold."""

_NEVER_IN_AN_ID: Final = '\t\r\n"'


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one image, as a detector found them.

    Arguments:
        height, width: of the image, in pixels.
        object_ids, attribute_ids: (n,) int64, without a background class; `object_scores`, `attribute_scores` (n,) float32.
        boxes: (n, 4) float32, x1, y1, x2, y2 in pixels.
        features: (n, F) float32.

    Raises:
        DataError: names the column that has another shape or type, a number that is not finite, a negative class, or a box
            that is outside or reversed.
    """

    image_id: str
    height: int
    width: int
    object_ids: Tensor
    object_scores: Tensor
    attribute_ids: Tensor
    attribute_scores: Tensor
    boxes: Tensor
    features: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.image_id, str) or not self.image_id or set(self.image_id) & set(_NEVER_IN_AN_ID):
            raise DataError(
                f"column img_id: expected a text without tabs, line ends and quotes, got {shown(self.image_id)}; "
                "rename the image"
            )
        for column, size in (("img_h", self.height), ("img_w", self.width)):
            if not is_whole(size) or size < 1:
                raise DataError(
                    f"column {column}: expected a number of pixels of 1 or more, got {shown(size)}; correct the line"
                )
        names = ("object_ids", "object_scores", "attribute_ids", "attribute_scores", "boxes", "features")
        if wrong := [
            name for name in names if not isinstance(getattr(self, name), Tensor) or not getattr(self, name).ndim
        ]:
            raise DataError(f"expected tensors with a row per region, got others as {', '.join(wrong)}; convert them")
        count = len(self.boxes)
        columns = (
            ("objects_id", self.object_ids, torch.int64, (count,)),
            ("objects_conf", self.object_scores, torch.float32, (count,)),
            ("attrs_id", self.attribute_ids, torch.int64, (count,)),
            ("attrs_conf", self.attribute_scores, torch.float32, (count,)),
            ("boxes", self.boxes, torch.float32, (count, 4)),
            ("features", self.features, torch.float32, (count, self.features.shape[-1])),
        )
        for column, tensor, dtype, shape in columns:
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.numel():
                raise DataError(
                    f"column {column}: expected {dtype} of shape {shape}, one row per region and one region or more, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}; give every region its row"
                )
            if not tensor.isfinite().all():
                raise DataError(f"column {column}: expected finite numbers, got others; extract this image again")
            if dtype == torch.int64 and tensor.min() < 0:
                raise DataError(
                    f"column {column}: expected classes from 0, got {int(tensor.min())}; leave the background class out"
                )
        parts = self.positions()
        if ((parts < -TOLERANCE) | (parts > 1 + TOLERANCE)).any():
            row = int(((parts < -TOLERANCE) | (parts > 1 + TOLERANCE)).any(dim=1).nonzero()[0])
            raise DataError(
                f"column boxes: expected x1, y1, x2, y2 in pixels within {self.width} x {self.height} (img_w, img_h), "
                f"got {self.boxes[row].tolist()} in region {row}; check the image's size"
            )
        crossed = (self.boxes[:, :2] > self.boxes[:, 2:]).any(dim=1)
        if crossed.any():
            row = int(crossed.nonzero()[0])
            raise DataError(
                f"column boxes: expected x1 <= x2 and y1 <= y2, got {self.boxes[row].tolist()} in region {row}; give "
                "corners, not widths and heights"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def positions(self) -> Tensor:
        """The boxes in parts of the image's width and height, as LXMERT takes them, (n, 4) float32."""
        return self.boxes / torch.tensor([self.width, self.height, self.width, self.height], dtype=torch.float32)


def format_line(image: Regions) -> bytes:
    """The line of an image, its line end included."""
    columns = (
        image.image_id.encode(),
        str(image.height).encode(),
        str(image.width).encode(),
        _packed(image.object_ids, "<i8"),
        _packed(image.object_scores, "<f4"),
        _packed(image.attribute_ids, "<i8"),
        _packed(image.attribute_scores, "<f4"),
        str(len(image)).encode(),
        _packed(image.boxes, "<f4"),
        _packed(image.features, "<f4"),
    )
    return b"\t".join(columns) + b"\n"


def parse_line(line: bytes, feature_dim: int | None = None) -> Regions:
    """The image of a line without its line end, with `feature_dim` features per region, or as many as it holds.

    Raises:
        DataError: names the column, what was expected in it, and what it holds.
    """
    columns = line.split(b"\t")
    if len(columns) != len(COLUMNS):
        raise wrong_number_of_columns(len(columns))
    return _image(columns, _numbers(columns[HEAD], "features", "<f4", _count(columns), feature_dim))


def parse_head(columns: Sequence[bytes]) -> tuple[str, int]:
    """Return the image and the number of regions in a line's columns before the features, all of them checked.

    Raises:
        DataError: as `parse_line`.
    """
    count = _count(columns)
    _numbers(columns[3], "objects_id", "<i8", count, 1)  # as many as it says, before anything is made for each
    return _image(columns, torch.zeros(count, 1)).image_id, count


def encoded_length(count: int, feature_dim: int) -> int:
    """The number of characters that the features of so many regions take."""
    return -(-count * feature_dim * SCALAR // 3) * 4


def wrong_number_of_columns(found: int) -> DataError:
    """The error for a line of `found` columns."""
    return DataError(
        f"expected {len(COLUMNS)} tab-separated columns, {', '.join(COLUMNS)}, got {found}; is the line cut short, or the "
        "file of another format?"
    )


def _image(columns: Sequence[bytes], features: Tensor) -> Regions:
    count = len(features)
    return Regions(
        image_id=_text(columns[0], "img_id"),
        height=_whole(columns[1], "img_h"),
        width=_whole(columns[2], "img_w"),
        object_ids=_numbers(columns[3], "objects_id", "<i8", count, 1).flatten(),
        object_scores=_numbers(columns[4], "objects_conf", "<f4", count, 1).flatten(),
        attribute_ids=_numbers(columns[5], "attrs_id", "<i8", count, 1).flatten(),
        attribute_scores=_numbers(columns[6], "attrs_conf", "<f4", count, 1).flatten(),
        boxes=_numbers(columns[8], "boxes", "<f4", count, 4),
        features=features,
    )


def _count(columns: Sequence[bytes]) -> int:
    count = _whole(columns[7], "num_boxes")
    if count < 1:
        raise DataError(f"column num_boxes: expected 1 or more, got {count}; leave images without regions out")
    return count


def _text(field: bytes, column: str) -> str:
    try:
        return field.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"column {column}: expected UTF-8, got {field[:40]!r}; is the file damaged?") from error


def _whole(field: bytes, column: str) -> int:
    if not field.isdigit() or len(field) > _MOST_DIGITS:
        raise DataError(
            f"column {column}: expected a whole number of at most {_MOST_DIGITS} digits, got {field[:40]!r}; are the "
            "columns in their order?"
        )
    return int(field)


def _numbers(field: bytes, column: str, dtype: str, count: int, each: int | None = None) -> Tensor:
    """Decode the buffer of a column to (count, each); `each` follows from the length, if not given."""
    try:
        data = base64.b64decode(field, validate=True)
    except binascii.Error as error:
        raise DataError(
            f"column {column}: expected base64, got {len(field)} characters that are not ({error}); is the line cut short?"
        ) from error
    size = count * np.dtype(dtype).itemsize
    if (len(data) != size * each) if each is not None else (not data or len(data) % size):
        wanted = f"{size * each} bytes" if each is not None else f"a multiple of {size} bytes"
        raise DataError(
            f"column {column}: expected {wanted}, {count} regions times {each or 'F'} numbers {dtype}, got {len(data)}; "
            "is the line cut short, or from another extraction?"
        )
    native = np.frombuffer(data, dtype=dtype).astype(
        np.dtype(dtype).newbyteorder("=")
    )  # a copy, which may be written to
    return torch.from_numpy(native).view(count, -1)


def _packed(tensor: Tensor, dtype: str) -> bytes:
    return base64.b64encode(tensor.numpy().astype(dtype).tobytes())
