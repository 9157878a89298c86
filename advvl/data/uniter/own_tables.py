"""Texts and images from users, in place of UNITER's databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from advvl.checks import check_functions, shown
from advvl.data.boxes import checked_regions, numbers
from advvl.data.uniter.regions import Regions, regions_of
from advvl.data.uniter.word_pieces import TextMeta
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError

Fields = dict[str, Any]
"""An example, as a record of a database has it."""


@dataclass(frozen=True, eq=False)
class OwnTexts:
    """The texts of records, in place of an `advvl.data.uniter.text_db.TextDb`.

    Arguments:
        folder: the file that they were read from, or "records".
        rows: the table of images that referring expressions are looked up in.
    """

    folder: str
    meta: TextMeta
    records: dict[str, Fields] = field(repr=False)
    lengths: dict[str, int] = field(repr=False)
    images: dict[str, str | tuple[str, str]] = field(repr=False)
    skipped: Sequence[str] = ()
    rows: Sequence[Any] = field(default=(), repr=False)

    def __getitem__(self, key: str, /) -> Fields:
        return self.records[key]

    def where(self, key: str) -> str:
        """Return the place of a record, for messages."""
        return f"{self.folder}, {key!r}"

    def table(self, name: str) -> list[Any]:
        """Return the table of images; there is no other."""
        return list(self.rows) if name == "images" else []


@dataclass(frozen=True, eq=False)
class OwnImages:
    """The images of records, in place of an `advvl.data.uniter.image_db.ImageDb`.

    Arguments:
        counts: regions by image.
        load: reads an image by its name.
    """

    folder: str
    feature_dim: int
    counts: Mapping[str, int] = field(repr=False)
    load: Callable[[str], Regions] = field(repr=False)

    def count(self, name: str) -> int:
        """Return the number of an image's regions.

        Raises:
            DataError: there is no such image.
        """
        if name not in self.counts:
            raise DataError(f"expected an image of {self.folder}, got {name!r}; was its record skipped?")
        return self.counts[name]

    def read(self, name: str, *, labels: bool = False) -> Regions:
        """Return an image's regions."""
        del labels  # a record can only be read as a whole
        return self.load(name)

    def where(self, name: str) -> str:
        """Return the name of an image, for messages."""
        return f"image {name!r}"


@runtime_checkable
class Table(Protocol):
    """A database of images, as `advvl.data.uniter.image_db.open_images` opens it."""

    def read(self, name: str, *, labels: bool = False) -> Regions:
        """Return an image's regions."""


@runtime_checkable
class Indexed(Protocol):
    """Holds values by key or by number, as a mapping, a list or a `Dataset` does."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class RegionReader:
    """Reads the regions of an image that a record has, or names.

    Arguments:
        images: by name; None: the record holds its image itself.
        make: makes regions from the value for an image, such as a picture; None: a mapping holds `features` and `boxes`
            and, if known, `size` and `soft_labels`.
        labels: `soft_labels` are needed.
    """

    images: Mapping[str, Any] | Table | None = None
    make: Callable[[Any], Regions] | None = None
    labels: bool = False

    def __post_init__(self) -> None:
        check_functions(regions=self.make)
        images = self.images
        by_name = isinstance(images, Indexed | Table) and not isinstance(images, list | tuple | str)
        if images is not None and not by_name:
            raise ConfigurationError(f"expected images as a mapping by name, or a database, got {shown(images)}")

    def entry(self, record: Mapping[str, Any], key: str) -> Any:
        """Return the value for an image in a record; the record itself for a single image without `images` and `make`."""
        return record if key == "image" and self.images is None and self.make is None else needed(record, key)

    def __call__(self, entry: Any) -> Regions:
        if self.images is not None:
            return self._named(entry, self.images)
        return self._regions(entry)

    def _named(self, name: Any, images: Mapping[str, Any] | Table) -> Regions:
        if not isinstance(name, str) or not name:
            raise DataError(f"image: expected its name in images as a text, got {shown(name)}; correct it")
        if isinstance(images, Table):
            return images.read(name, labels=self.labels)
        try:
            found = images[name]
        except KeyError as error:
            raise DataError(f"image: expected a name that images has, got {name!r}; add it, or leave it out") from error
        with within(f"image {name!r}"):
            return self._regions(found)

    def _regions(self, entry: Any) -> Regions:
        if self.make is not None:
            regions = self.make(entry)
            if not isinstance(regions, Regions):
                raise ConfigurationError(f"expected Regions from the function regions, got {shown(regions)}")
            return regions
        if not isinstance(entry, Mapping):
            raise DataError(f"expected an image with features and boxes, got {shown(entry)}; give images= of names")
        features, boxes = checked_regions(needed(entry, "features"), needed(entry, "boxes"), entry.get("size"))
        labels = None
        if self.labels:
            labels = numbers("soft_labels", needed(entry, "soft_labels"))
            if labels.ndim != 2 or labels.shape[1] < 2 or labels.min() < 0 or labels.max() > 1:
                raise DataError(
                    f"soft_labels: expected (R, C) in [0, 1], column 0 of the background, got {tuple(labels.shape)}; "
                    "give each region a distribution"
                )
        return regions_of(features, boxes, labels)


@dataclass(frozen=True, eq=False)
class Again:
    """Reads the image of a record again, by its name.

    Arguments:
        places: the number of the record, and its key of the image.
    """

    records: Any
    places: Mapping[str, tuple[int, str]]
    reader: RegionReader

    def __call__(self, name: str) -> Regions:
        number, key = self.places[name]
        return self.reader(self.reader.entry(self.records[number], key))


@dataclass(frozen=True, eq=False)
class Renamed:
    """Reads images whose names are the numbers of `names`."""

    names: Sequence[str]
    load: Callable[[str], Regions]

    def __call__(self, number: str) -> Regions:
        return self.load(self.names[int(number)])


def needed(record: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key.

    Raises:
        DataError: there is none.
    """
    if record.get(key) is None:
        found = ", ".join(repr(name) for name, value in record.items() if value is not None)
        raise DataError(f"expected the key {key!r}, got {found or 'none'}; add it, or leave the record out")
    return record[key]


def plain(value: Any) -> Any:
    """Return an array as lists and numbers of Python's, and anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
