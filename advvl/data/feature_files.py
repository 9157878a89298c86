"""Files of region features by the names of images, each read on demand.

| path | images |
|---|---|
| a folder, and those within | `NAME.npz` with `features` and `boxes`, or `NAME.npy` of features and `NAME.boxes.npy` |
| a file `….tsv` | the lines of LXMERT's region files, see `advvl.data.lxmert.regions` |

Boxes are (R, 4), x1, y1, x2, y2, in pixels if `size` (width, height) is present, otherwise relative to the image. An
npz file may also hold `soft_labels` and `scores`, and may use the names of UNITER's extraction: `norm_bb`, `conf`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from advvl.checks import path_of
from advvl.data.lxmert.regions import RegionFile, open_regions
from advvl.data.uniter.records import LARGEST_IMAGE, unpack_npy, unpack_npz
from advvl.errors import DataError

_KEYS: Final = ("features", "boxes", "size", "soft_labels", "scores", "norm_bb", "conf")
_BOXES: Final = ".boxes.npy"
_HEADER: Final = 1 << 16  # bytes before an array's numbers, more than any header takes


@dataclass(frozen=True, eq=False)
class FeatureFolder(Mapping[str, Mapping[str, Any]]):
    """The images of a folder, by the paths of their files in it without the ending; made by `open_features`."""

    folder: Path
    files: Mapping[str, Path] = field(repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """Read an image.

        Raises:
            KeyError: there is no such image.
            DataError: a file that cannot be read, or lacks an array.
        """
        path = self.files[name]
        try:
            if path.suffix == ".npy":
                return {"features": _loaded(path), "boxes": _loaded(path.with_name(path.stem + _BOXES))}
            with open(path, "rb") as stream:
                found = unpack_npz(stream, _KEYS)
        except (OSError, DataError) as error:
            raise DataError(f"{path}: expected arrays of numbers, got {error}; extract the image again") from error
        if "norm_bb" in found:
            if found["norm_bb"].ndim != 2 or found["norm_bb"].shape[1] < 4:
                raise DataError(
                    f"{path}: expected norm_bb (R, 6), got {found['norm_bb'].shape}; extract the image again"
                )
            found.setdefault("boxes", found.pop("norm_bb")[:, :4])
        if "conf" in found:
            found.setdefault("scores", found.pop("conf").reshape(-1))
        return found


@dataclass(frozen=True, eq=False)
class FeatureLines(Mapping[str, Mapping[str, Any]]):
    """The images of one of LXMERT's region files, by their ids; made by `open_features`."""

    lines: RegionFile

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """Read an image; its scores are the detector's of the objects.

        Raises:
            KeyError: there is no such image.
            DataError: its line is malformed.
        """
        found = self.lines[name]
        return {"features": found.features, "boxes": found.positions(), "scores": found.object_scores}


def _loaded(path: Path) -> NDArray[Any]:
    if (size := path.stat().st_size) > LARGEST_IMAGE + _HEADER:
        raise DataError(f"expected at most {LARGEST_IMAGE} bytes of an array, got {size}; is it an image's?")
    return unpack_npy(path.name, path.read_bytes())


def open_features(path: str | os.PathLike[str]) -> Mapping[str, Mapping[str, Any]]:
    """Open a folder or a file of region features, to pass as `images=` to the sources of `advvl.data.uniter.own`.

    Raises:
        DataError: the path does not exist, has no image, or has two images of one name.
    """
    place = path_of(path)
    if place.suffix == ".tsv":
        return FeatureLines(open_regions(place, num_boxes=None))
    if not place.is_dir():
        raise DataError(
            f"expected a folder of npz or npy files, or a .tsv file, at {str(place)!r}, got none; check the path"
        )
    files: dict[str, Path] = {}
    for file in sorted(place.rglob("*.np[yz]")):
        if file.name.endswith(_BOXES):
            continue
        name = file.relative_to(place).with_suffix("").as_posix()
        if name in files:
            raise DataError(
                f"expected one file of the image {name!r}, got {str(files[name])!r} and {str(file)!r}; move one"
            )
        files[name] = file
    if not files:
        raise DataError(f"expected npz or npy files in {str(place)!r}, got none; check the path")
    return FeatureFolder(place, files)
