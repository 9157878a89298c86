"""New databases of texts, written one example at a time; see `advvl.data.uniter.text_db` for what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from advvl.checks import shown
from advvl.data.uniter.json_files import as_json
from advvl.data.uniter.lmdb_files import LmdbWriter, writing_lmdb
from advvl.data.uniter.records import pack_text
from advvl.data.uniter.text_db import TABLES, images_of
from advvl.data.uniter.word_pieces import TextMeta, text_lengths
from advvl.data.whereabouts import within
from advvl.errors import DataError


class TextDbWriter:
    """A new database of texts, to which examples are added; made by `write_texts`."""

    def __init__(self, file: LmdbWriter, meta: TextMeta) -> None:
        self._file, self._meta = file, meta
        self._lengths: dict[str, dict[str, int]] = {}
        self._images: dict[str, Sequence[str] | str] = {}
        self._texts: dict[str, list[str]] = {}
        self._tables: dict[str, list[Any]] = {}

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Add an example.

        Arguments:
            record: plain values; `input_ids` is needed, `img_fname` names one image or two, and the rest is the task's:
                `target`, VCR's `input_ids_as` and `input_ids_rs`, referring expressions' `ann_id` and so on.

        Raises:
            DataError: a key that is there, a record without word pieces or that msgpack does not take, images that are no
                names.
        """
        with within(f"{self._file.folder}, record {shown(key)}"):
            lengths = text_lengths(record)
            names = record.get("img_fname")
            if names is not None and images_of(names) is None:
                raise DataError(f"expected img_fname as the name of one image or two, got {shown(names)}; correct it")
            self._file.put(key, pack_text(record))
        for name, length in lengths.items():
            self._lengths.setdefault(name, {})[key] = length
        if names is not None:
            self._images[key] = names
            for image in (names,) if isinstance(names, str) else names:
                self._texts.setdefault(image, []).append(key)

    def add_table(self, name: str, rows: Sequence[Any]) -> None:
        """Add one of referring expressions' `TABLES`."""
        if name not in TABLES:
            raise DataError(f"expected a table of {', '.join(TABLES)}, got {name!r}")
        self._tables[name] = list(rows)

    def close(self) -> None:
        """Write the JSON files."""
        if not self._lengths:
            raise DataError(f"expected one example or more to write to {str(self._file.folder)!r}, got none")
        files = {"meta.json": self._meta.as_json()}
        files |= {f"{name}.json": as_json(lengths) for name, lengths in self._lengths.items()}
        if self._images:
            files |= {"txt2img.json": as_json(self._images), "img2txts.json": as_json(self._texts)}
        files |= {f"{name}.json": as_json(rows) for name, rows in self._tables.items()}
        for name, content in files.items():
            self._file.add_file(name, content)


@contextmanager
def write_texts(folder: str | os.PathLike[str], meta: TextMeta) -> Iterator[TextDbWriter]:
    """Write a new database of texts, whole once the block has ended well, and otherwise not at all.

        with write_texts("captions.db", TextMeta.of(tokenizer, "bert-base-cased")) as texts:
            texts.add("caption-1", {"input_ids": [138, 4355], "img_fname": "picture-1.npz"})

    Raises:
        DataError: no example was added.
        OutputDirectoryError: there is something at `folder`; another process writes it; the file system refuses.
    """
    with writing_lmdb(folder) as file:
        writer = TextDbWriter(file, meta)
        yield writer
        writer.close()
