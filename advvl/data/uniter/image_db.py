"""UNITER's databases of images: a folder with one LMDB or several, and JSON files with the numbers of regions.

| entry | content |
|---|---|
| `feat_th0.2_max100_min10[_compressed]/` | regions that the detector was sure of: at most 100, at least 10 |
| `nbb_th0.2_max100_min10.json` | the number of these by image |
| `feat_numbb36[_compressed]/` | a fixed number of regions of every image, or boxes that people drew, at most so many |
| `all[_compressed]/` | all regions that the detector gave, which are cut when they are read |

A record holds `features` (n, F), `norm_bb` (n, 6), `conf` (n, 1) and `soft_labels` (n, C) in half precision, in order
of decreasing confidence; see `advvl.data.uniter.records` for the encodings.

Source: the published code of Chen et al., "UNITER", ECCV 2020.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from advvl.checks import at_least, check_each, is_number, path_of, shown
from advvl.data.uniter.json_files import read_counts
from advvl.data.uniter.lmdb_files import LmdbFile, open_lmdb
from advvl.data.uniter.records import npz_rows, packed_rows, unpack_arrays, unpack_npz
from advvl.data.uniter.regions import Regions, with_areas
from advvl.data.whereabouts import within
from advvl.errors import DataError

KEYS: Final = "__keys__"
"""The record that lists the names of all others."""

COMPRESSED: Final = "_compressed"


@dataclass(frozen=True, kw_only=True)
class RegionLimits:
    """The number of regions of an image.

    Arguments:
        conf_th, max_bb, min_bb: the regions with a confidence above `conf_th`, but at most `max_bb` and at least
            `min_bb`.
        num_bb: a fixed number, or the largest number of human-drawn boxes; None: by the other three.

    Raises:
        ConfigurationError: a number of another type or out of its range.
    """

    conf_th: float = 0.2
    max_bb: int = 100
    min_bb: int = 10
    num_bb: int | None = None

    def __post_init__(self) -> None:
        check_each(self, ("conf_th",), lambda value: is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        at_least(1, self, "max_bb", "min_bb", *(() if self.num_bb is None else ("num_bb",)))

    @property
    def suffix(self) -> str:
        """The end of the names of a folder and its JSON file, as published."""
        if self.num_bb is not None:
            return f"numbb{self.num_bb}"
        return f"th{self.conf_th}_max{self.max_bb}_min{self.min_bb}"

    def count(self, scores: NDArray[Any]) -> int:
        """The number of regions to keep, for scores (n, 1) in descending order."""
        return min(len(scores), self.max_bb, max(self.min_bb, int((scores > self.conf_th).sum())))


@dataclass(frozen=True, eq=False)
class ImageDb:
    """The images of one database, each read on demand; made by `open_images`.

    Arguments:
        feature_dim: F, of every image.
        counts: regions by image; None: each record says it.
        cut: records hold more regions than `limits` allow.
    """

    folder: Path
    limits: RegionLimits
    compressed: bool
    counts: Mapping[str, int] | None = field(repr=False)
    file: LmdbFile = field(repr=False)
    feature_dim: int
    cut: bool = False
    _counted: dict[str, int] = field(default_factory=dict, repr=False)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name != KEYS and self.file.get(name) is not None

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all images.

        Raises:
            DataError: a list of names that is none.
        """
        if self.counts is not None:
            return tuple(self.counts)
        view = self.file.get(KEYS)
        if view is None:
            return tuple(self.file)
        try:
            found = json.loads(bytes(view))
        except ValueError as error:
            raise DataError(f"{self.where(KEYS)}: expected a JSON list, got {error}; copy it again") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise DataError(f"{self.where(KEYS)}: expected names of images, got {shown(found)}; copy it again")
        return tuple(found)

    def where(self, name: str) -> str:
        """The place of a record, for messages."""
        return f"{self.folder}, record {name!r}"

    def count(self, name: str) -> int:
        """Return the number of regions of an image; where only its record has it, that is read.

        Raises:
            DataError: there is no such image.
        """
        if self.counts is not None:
            if name not in self.counts:
                raise DataError(
                    f"expected the image {name!r} in {str(self.folder)!r}, got none; is it another split's, or left out?"
                )
            return self.counts[name]
        if name not in self._counted:
            self._counted[name] = self._count(name)
        return self._counted[name]

    def _count(self, name: str) -> int:
        view = self.file.require(name)
        with within(self.where(name)):
            if self.cut:
                return self.limits.count(self._unpack(view, ("conf",))["conf"])
            return npz_rows(view) if self.compressed else packed_rows(view)

    def read(self, name: str, *, labels: bool = False) -> Regions:
        """Read an image's regions, in single precision.

        Arguments:
            labels: read the distributions over classes and the detector's scores too.

        Raises:
            DataError: there is no such image; a record that does not decode, of another number of regions than the JSON
                file says or of another width than the others; see `Regions`.
        """
        view = self.file.require(name)
        with within(self.where(name)):
            arrays = self._unpack(view, ("features", "norm_bb"), ("soft_labels", "conf") if labels else ())
            boxes, scores = arrays["norm_bb"], arrays.get("conf")
            if boxes.ndim != 2 or boxes.shape[1] != 6:
                raise DataError(f"expected norm_bb (n, 6), got {boxes.shape}; write it again")
            regions = Regions(
                _tensor(arrays["features"]),
                torch.from_numpy(with_areas(boxes)),
                _tensor(arrays["soft_labels"]) if "soft_labels" in arrays else None,
                None if scores is None else _tensor(scores).reshape(-1),
            )
            if regions.features.shape[1] != self.feature_dim:
                raise DataError(
                    f"expected {self.feature_dim} features of each region, as in other records, got "
                    f"{regions.features.shape[1]}; extract it as the others"
                )
            if self.cut:
                regions = regions.first(self.count(name))
            if self.counts is not None and len(regions) != self.counts.get(name):
                raise DataError(
                    f"expected {self.counts.get(name)} regions, as nbb_{self.limits.suffix}.json says, got {len(regions)}; "
                    "are both of one conversion?"
                )
        return regions

    def _unpack(self, view: memoryview, needed: tuple[str, ...], more: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
        """The arrays of the needed names, and those of `more` that the record has."""
        arrays = (unpack_npz if self.compressed else unpack_arrays)(view, (*needed, *more))
        missing = [name for name in needed if name not in arrays or not arrays[name].ndim]
        if missing:
            raise DataError(
                f"expected the arrays {', '.join(needed)}, got none of {', '.join(missing)}; write it again"
            )
        return arrays


def open_images(
    folder: str | os.PathLike[str], limits: RegionLimits | None = None, *, compressed: bool | None = None
) -> ImageDb:
    """Open a database of images.

    Arguments:
        folder: the one that holds those of all limits.
        limits: None: `RegionLimits()`, those that UNITER was trained with.
        compressed: which encoding; None: the one that is there, and of both the uncompressed.

    Raises:
        DataError: no such database, a file that is missing, malformed or cut short, a database without an image.
    """
    folder, limits = path_of(folder), limits or RegionLimits()
    endings = [COMPRESSED if one else "" for one in ((False, True) if compressed is None else (compressed,))]
    names = [f"feat_{limits.suffix}{ending}" for ending in endings]
    if limits.num_bb is None:
        names += [f"all{ending}" for ending in endings]
    there = next((name for name in names if (folder / name).is_dir()), None)
    if there is None:
        found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else None
        raise DataError(
            f"expected one of {', '.join(names)} in {str(folder)!r}, got {found or 'none'}; give the limits of one"
        )
    counts = None
    if there.startswith("feat_th"):
        counts = read_counts(folder / f"nbb_{limits.suffix}.json", "the number of regions of each image")
    file = open_lmdb(folder / there)
    first = next((name for name in file if name != KEYS), None)
    if first is None:
        raise DataError(f"expected one image or more in {str(folder / there)!r}, got none; is the split empty?")
    squeezed = there.endswith(COMPRESSED)
    with within(f"{folder / there}, record {first!r}"):
        features = (unpack_npz if squeezed else unpack_arrays)(file.require(first), ("features",)).get("features")
        if features is None or features.ndim != 2:
            raise DataError("expected an array of features (n, F), got none; is it a database of images?")
    return ImageDb(folder / there, limits, squeezed, counts, file, features.shape[1], there.startswith("all"))


def _tensor(array: NDArray[Any]) -> Tensor:
    """The numbers in single precision; torch casts from half precision more quickly than numpy."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).to(torch.float32)
