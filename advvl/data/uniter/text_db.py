"""UNITER's databases of texts, `<name>.db`: a folder with an LMDB of records and JSON files about them.

| file | content |
|---|---|
| `data.mdb` | by example: `input_ids` (word pieces without special tokens), `img_fname`, and the task's own fields |
| `meta.json` | the ids of the special tokens, the range of the words', the tokeniser's name |
| `id2len.json` | the number of word pieces by example, in the order of the data set; VCR has `id2len_qa`, `id2len_qar` |
| `txt2img.json` | the image, or the two images, of an example; not for referring expressions |
| `img2txts.json` | the examples of an image |

Referring expressions have `refs.json`, `annotations.json`, `categories.json` and `images.json` as well.

Source: the published code of Chen et al., "UNITER", ECCV 2020.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from advvl.checks import path_of, shown
from advvl.data.uniter.json_files import read_counts, read_json
from advvl.data.uniter.lmdb_files import LmdbFile, open_lmdb
from advvl.data.uniter.records import unpack_text
from advvl.data.uniter.word_pieces import TextMeta, check_known
from advvl.data.whereabouts import within
from advvl.errors import DataError

Lengths = Literal["", "qa", "qar"]
TABLES: Final = ("refs", "annotations", "categories", "images")
"""The files of referring expressions, without `.json`."""

Images = str | tuple[str, str]


@dataclass(frozen=True, eq=False)
class TextDb:
    """The texts of one database, read one by one; made by `open_texts`.

    Arguments:
        lengths: word pieces without special tokens, of the examples that are not too long, in the data set's order.
        left_out: the examples that are too long.
        vocabulary: number of words of the model that reads the texts; None: any number.
        skipped: reasons why other examples were left out; empty here.
    """

    folder: Path
    meta: TextMeta
    lengths: Mapping[str, int] = field(repr=False)
    left_out: tuple[str, ...] = field(repr=False)
    file: LmdbFile = field(repr=False)
    vocabulary: int | None = None
    skipped: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __contains__(self, key: object) -> bool:
        return key in self.lengths

    def __getitem__(self, key: str) -> dict[str, Any]:
        """Read an example's record.

        Raises:
            DataError: the database has none, it does not decode, or it has a word piece that the model does not know.
        """
        view = self.file.require(key)
        with within(self.where(key)):
            record = unpack_text(view)
            if self.vocabulary is not None:
                check_known(record, self.vocabulary)
            return record

    def where(self, key: str) -> str:
        """The place of a record, for messages."""
        return f"{self.folder}, record {key!r}"

    @cached_property
    def images(self) -> Mapping[str, Images]:
        """The image of an example, or its two images.

        Raises:
            DataError: the file is missing or malformed, or lacks an example.
        """
        path = self.folder / "txt2img.json"
        found = read_json(path, dict, "the image of each example")
        images = {key: images_of(found.get(key)) for key in self.lengths}
        wrong = next((key for key, names in images.items() if names is None), None)
        if wrong is not None:
            raise DataError(
                f"{path}: expected one image or two of {wrong!r}, got {shown(found.get(wrong))}; is it whole?"
            )
        return {key: names for key, names in images.items() if names is not None}

    @cached_property
    def texts(self) -> Mapping[str, tuple[str, ...]]:
        """The examples of an image, those that are not too long."""
        path = self.folder / "img2txts.json"
        found = read_json(path, dict, "the examples of each image")
        wrong = next((name for name, keys in found.items() if not _are_names(keys)), None)
        if wrong is not None:
            raise DataError(f"{path}: expected names of examples of {wrong!r}, got {shown(found[wrong])}; is it whole?")
        return {name: tuple(key for key in keys if key in self.lengths) for name, keys in found.items()}

    def table(self, name: str) -> list[Any]:
        """Read one of referring expressions' `TABLES`.

        Raises:
            DataError: it is missing or malformed.
        """
        found: list[Any] = read_json(self.folder / f"{name}.json", list, f"the list of {name}")
        return found


def open_texts(
    folder: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    lengths: Lengths = "",
    vocabulary: int | None = None,
) -> TextDb:
    """Open a database of texts.

    Arguments:
        max_length: of a text in word pieces without special tokens; UNITER trains on up to 60, on up to 220 of VCR; None:
            any.
        lengths: the one of VCR's two tasks whose lengths to use, "qa" or "qar"; "" for other data sets.
        vocabulary: number of words of the model that reads the texts: a record with a word beyond it is refused on
            reading; None: no check.

    Raises:
        DataError: a file that is missing, malformed or cut short; no text that is left.
    """
    folder = path_of(folder)
    path = folder / (f"id2len_{lengths}.json" if lengths else "id2len.json")
    found = read_counts(path, "the length of each example")
    kept = {key: n for key, n in found.items() if max_length is None or n <= max_length}
    if not kept:
        limit = "any number of" if max_length is None else f"at most {max_length}"
        raise DataError(
            f"expected a text of {limit} word pieces in {str(path)!r}, got {len(found)} longer ones; is the split empty?"
        )
    meta = TextMeta.read(folder / "meta.json")
    long = tuple(key for key in found if key not in kept)
    return TextDb(folder, meta, kept, long, open_lmdb(folder), vocabulary)


def images_of(names: Any) -> Images | None:
    """Return the name of one image, or of two; None for anything else."""
    if isinstance(names, str) and names:
        return names
    return (names[0], names[1]) if _are_names(names) and len(names) == 2 else None


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value)
