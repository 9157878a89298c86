"""New databases of images, written one image at a time; see `advvl.data.uniter.image_db` for their contents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from advvl.checks import path_of, shown
from advvl.data.uniter.image_db import COMPRESSED, KEYS, RegionLimits
from advvl.data.uniter.json_files import as_json, read_json
from advvl.data.uniter.lmdb_files import LmdbWriter, refuse_existing, writing_lmdb
from advvl.data.uniter.records import pack_arrays, pack_npz
from advvl.data.uniter.regions import Regions, with_areas
from advvl.data.whereabouts import within
from advvl.errors import DataError
from advvl.files import write_bytes

_LARGEST_HALF: Final = torch.finfo(torch.float16).max


class ImageDbWriter:
    """A new database of images, to which they are added one by one; made by `write_images`."""

    def __init__(self, file: LmdbWriter, limits: RegionLimits, *, compressed: bool, half: bool) -> None:
        self._file, self._limits, self._half = file, limits, half
        self._pack = pack_npz if compressed else pack_arrays
        self.counts: dict[str, int] = {}
        self._widths: tuple[int, int | None] | None = None

    def add(
        self,
        name: str,
        features: ArrayLike,
        boxes: ArrayLike,
        *,
        scores: ArrayLike | None = None,
        labels: ArrayLike | None = None,
    ) -> int:
        """Add an image, and return the number of its regions that were kept: the most confident ones if there are scores.

        Arguments:
            name: such as "coco_train2014_000000458752.npz".
            features: (n, F).
            boxes: (n, 4), x1, y1, x2, y2 over the image's width and height; or (n, 6) with width and height.
            scores: (n,), the detector's confidence; None: the first regions are kept.
            labels: (n, C), distributions over classes, column 0 for the background.

        Raises:
            DataError: a name that is there; more regions than a fixed number; features or labels of another width than
                those of the images before; labels outside [0, 1]; see `Regions`.
        """
        with within(f"{self._file.folder}, record {shown(name)}"):
            if name == KEYS:
                raise DataError("expected another name, got that of the list of names; rename the image")
            regions = Regions(
                _array("features", features),
                torch.from_numpy(with_areas(_array("boxes", boxes).numpy())),
                None if labels is None else _array("labels", labels),
                None if scores is None else _array("scores", scores).reshape(-1),
            )
            if regions.labels is not None and not 0 <= float(regions.labels.min()) <= float(regions.labels.max()) <= 1:
                raise DataError("expected labels in [0, 1], got some outside; give each region a distribution")
            widths = self._as_before(regions)
            arrays = self._kept(regions)
            self._file.put(name, self._pack(arrays))
        self._widths = widths
        self.counts[name] = len(arrays["features"])
        return self.counts[name]

    def _as_before(self, regions: Regions) -> tuple[int, int | None]:
        """The numbers of features and of classes, the same as of the images before; of classes None until some has them."""
        features, classes = regions.features.shape[1], None if regions.labels is None else regions.labels.shape[1]
        before = self._widths or (features, classes)
        if features != before[0]:
            raise DataError(f"expected {before[0]} features, as of the images before, got {features}")
        if None not in (classes, before[1]) and classes != before[1]:
            raise DataError(f"expected {before[1]} classes in labels, as of the images before, got {classes}")
        return features, before[1] if classes is None else classes

    def _kept(self, regions: Regions) -> dict[str, NDArray[Any]]:
        limits, scores = self._limits, regions.scores
        if limits.num_bb is not None:
            if len(regions) > limits.num_bb:
                raise DataError(f"expected at most num_bb = {limits.num_bb} regions, got {len(regions)}; cut them")
            order, count = torch.arange(len(regions)), len(regions)
        elif scores is None:
            order, count = torch.arange(len(regions)), min(len(regions), limits.max_bb)
        else:
            order = scores.argsort(descending=True, stable=True)
            count = limits.count(scores.numpy())
        arrays = {"features": regions.features, "norm_bb": regions.boxes[:, :6]}
        arrays |= {} if scores is None else {"conf": scores[:, None]}
        arrays |= {} if regions.labels is None else {"soft_labels": regions.labels}
        kept = {name: rows[order[:count]] for name, rows in arrays.items()}
        if self._half and float(kept["features"].abs().max()) > _LARGEST_HALF:
            raise DataError(
                f"expected features of at most {_LARGEST_HALF:.0f}, got larger ones; give half=False, --full-precision"
            )
        return {name: rows.numpy().astype(np.float16 if self._half else np.float32) for name, rows in kept.items()}

    def close(self) -> None:
        """Write the list of names."""
        if not self.counts:
            raise DataError(f"expected one image or more to write to {str(self._file.folder)!r}, got none")
        self._file.put(KEYS, as_json(list(self.counts)))


@contextmanager
def write_images(
    folder: str | os.PathLike[str], limits: RegionLimits | None = None, *, compressed: bool = False, half: bool = True
) -> Iterator[ImageDbWriter]:
    """Write a new database of images, whole once the block has ended well, and otherwise not at all.

        with write_images("coco_train2014") as images:
            images.add("picture-1.npz", features, boxes)

    Arguments:
        folder: may hold databases of other limits, or of the other encoding.
        limits: None: `RegionLimits()`, those that UNITER was trained with.
        compressed: as npz files, which take about six times as long to read.
        half: store half precision, as published; no number may be above 65504.

    Raises:
        DataError: no image was added.
        OutputDirectoryError: there is such a database, or another number of regions for the same limits; another process
            writes it; the file system refuses.
    """
    folder, limits = path_of(folder), limits or RegionLimits()
    place = folder / f"feat_{limits.suffix}{COMPRESSED if compressed else ''}"
    counts = folder / f"nbb_{limits.suffix}.json"
    with writing_lmdb(place) as file:
        writer = ImageDbWriter(file, limits, compressed=compressed, half=half)
        yield writer
        writer.close()
        if limits.num_bb is None:
            twin = place.with_name(f"feat_{limits.suffix}{'' if compressed else COMPRESSED}")
            _write_counts(counts, writer.counts, shared=twin.exists())


def _write_counts(path: Path, counts: Mapping[str, int], *, shared: bool) -> None:
    """Write the numbers of regions, which the database of the other encoding, if there is one, has to share."""
    if shared and path.exists():
        if read_json(path, dict, "the number of regions of each image") == counts:
            return
        refuse_existing(path)
    write_bytes(path, as_json(dict(counts)))  # without a database it is left over from a killed writer


def _array(name: str, value: ArrayLike) -> Tensor:
    try:
        if np.iscomplexobj(value):
            raise TypeError("complex numbers")
        return torch.as_tensor(np.asarray(value, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise DataError(f"expected {name} as an array of numbers, got {error}") from error
