"""Records from users, read and checked one by one.

A list, a tuple, a generator and a file of JSON lines are read once and kept. Anything else with a length and indices,
such as a `Dataset` of Hugging Face datasets, is read and checked once, and its images are read again for each batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from advvl.checks import is_whole, path_of, shown
from advvl.data.json_lines import as_object, numbered_lines
from advvl.data.uniter.own_tables import Again, Fields, Indexed, OwnImages, OwnTexts, RegionReader, plain
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import TextMeta, text_lengths
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError

Parse = Callable[[Mapping[str, Any], Sequence[Regions]], Sequence[Fields]]
"""Makes the examples of a record and of the regions of its images."""


def read_records(
    records: Any,
    meta: TextMeta,
    parse: Parse,
    reader: RegionReader,
    *,
    keys: Sequence[str] = ("image",),
    max_length: int | None,
    skip_bad: bool,
) -> tuple[OwnTexts, OwnImages]:
    """Read records, and check them.

    Arguments:
        records: dicts, or the path of a file of JSON lines.
        parse: makes the examples of a record.
        keys: of a record's image or two images.
        max_length: None: any.
        skip_bad: leave out and list the records that cannot be used.

    Raises:
        DataError: a record that cannot be used, unless it is skipped, with its number, its key and what to do.
        ConfigurationError: a longest text below 1, a `skip_bad` that is no bool.
    """
    if max_length is not None and (not is_whole(max_length) or max_length < 1):
        raise ConfigurationError(f"expected max_length as 1 or more, or None, got {shown(max_length)}")
    if not isinstance(skip_bad, bool):
        raise ConfigurationError(f"expected skip_bad to be True or False, got {shown(skip_bad)}")
    path = str(path_of(records)) if isinstance(records, str | os.PathLike) else None
    prefix = "record " if path is None else f"{path}, line "
    kept = _are_kept(records) if reader.images is None else isinstance(reader.images, dict)
    texts = OwnTexts(path or "records", meta, {}, {}, {}, skipped := [])
    images: dict[str, Regions] = {}
    counts: dict[str, int] = {}
    places: dict[str, tuple[int, str]] = {}
    widths: tuple[int, int] | None = None
    for number, given in _numbered(records):
        try:
            with within(f"{prefix}{number}"):
                record = _mapping(given)
                seen = {key: _seen(record, key, number, reader, images) for key in keys}
                same = widths
                for _, regions in seen.values():
                    same = _same_widths(regions, same)
                examples = parse(record, [regions for _, regions in seen.values()])
                lengths = [_length(fields, max_length) for fields in examples]
                new = _keys(record, number, len(examples), texts.records)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            continue
        widths = same
        for key, (name, regions) in seen.items():
            counts[name], places[name] = len(regions), (number, key)
            if kept:
                images[name] = regions
        names = tuple(name for name, _ in seen.values())
        for key, fields, length in zip(new, examples, lengths, strict=True):
            texts.records[key], texts.lengths[key] = fields, length
            texts.images[key] = names[0] if len(names) == 1 else (names[0], names[1])
    again = reader if reader.images is not None else Again(records, places, reader)
    load = images.__getitem__ if kept else again
    return texts, OwnImages(texts.folder, widths[0] if widths else 0, counts, load)


def _numbered(records: Any) -> Iterator[tuple[int, Any]]:
    """Yield records, or lines of a file, and their numbers."""
    if isinstance(records, str | os.PathLike):
        yield from numbered_lines(records)
    elif isinstance(records, Indexed) and not isinstance(records, Mapping):
        yield from ((number, records[number]) for number in range(len(records)))
    elif isinstance(records, Iterable) and not isinstance(records, Mapping):
        yield from enumerate(records)
    else:
        raise DataError(f"expected records in a list, a generator, or a Dataset, got {shown(records)}; give dicts")


def _mapping(record: Any) -> Mapping[str, Any]:
    found = as_object(record) if isinstance(record, bytes) else record
    if not isinstance(found, Mapping):
        raise DataError(f"expected a dict, got {shown(found)}; give each record its keys")
    return found


def _are_kept(records: Any) -> bool:
    """Return True for records that are read once and kept."""
    return isinstance(records, list | tuple | str | os.PathLike) or not isinstance(records, Indexed)


def _seen(
    record: Mapping[str, Any], key: str, number: int, reader: RegionReader, images: Mapping[str, Regions]
) -> tuple[str, Regions]:
    """The name of a record's image, and its regions."""
    entry = reader.entry(record, key)
    if reader.images is not None:
        known = images.get(entry) if isinstance(entry, str) else None
        return entry, reader(entry) if known is None else known
    with within(key) if key != "image" else nullcontext():
        return str(number) if key == "image" else f"{number}.{key}", reader(entry)


def _keys(record: Mapping[str, Any], number: int, count: int, before: Mapping[str, Any]) -> list[str]:
    """The keys of a record's examples: its own, or its number."""
    own = plain(record.get("id"))
    if own is not None and not (isinstance(own, str) and own) and not is_whole(own):
        raise DataError(f"id: expected a text or a whole number, got {shown(own)}; correct it")
    name = str(number if own is None else own)
    keys = [name] if count == 1 else [f"{name}.{place}" for place in range(count)]
    if any(key in before for key in keys):
        raise DataError(f"id: expected one that no record before has, got {name!r}; give all records an id, or none")
    return keys


def _same_widths(regions: Regions, before: tuple[int, int] | None) -> tuple[int, int]:
    """The numbers of features and of classes of a region, the same as before."""
    found = regions.features.shape[1], 0 if regions.labels is None else regions.labels.shape[1]
    if before not in (None, found):
        raise DataError(
            f"expected {before[0]} features and {before[1]} classes of each region, as in records before, got {found[0]} "
            f"and {found[1]}; extract all images alike"
        )
    return found


def _length(fields: Fields, most: int | None) -> int:
    words = max(text_lengths(fields).values())
    if most is not None and words > most:
        raise DataError(f"expected at most max_length={most} word pieces, got {words}; shorten the text, or raise it")
    return words
