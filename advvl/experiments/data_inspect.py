"""`advvl data inspect`: counts, lengths and fields of UNITER's databases, and what is wrong with their records."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.checks import path_of, shown
from advvl.data.uniter.image_db import ImageDb, RegionLimits, open_images
from advvl.data.uniter.text_db import TextDb, open_texts
from advvl.data.uniter.word_pieces import text_lengths
from advvl.data.whereabouts import within
from advvl.errors import DataError
from advvl.experiments.progress import counted

_SHOWN: Final = 10  # faults
_COMPRESSED: Final = "_compressed"
_LIMITS: Final = re.compile(r"feat_(?:numbb(\d+)|th([\d.]+)_max(\d+)_min(\d+))|all")


def inspect(given: argparse.Namespace) -> None:
    """Print what the databases in a folder hold.

    Raises:
        DataError: no database there, or records that cannot be used, after these are printed.
    """
    folder = path_of(given.folder)
    if (folder / "meta.json").exists():
        faults = _texts(folder, list(_images_in(path_of(given.images))) if given.images else [])
    else:
        faults = [fault for images in _images_in(folder) for fault in _images(images)]
    for fault in faults[:_SHOWN]:
        print(f"wrong: {fault}")
    if faults:
        raise DataError(f"expected records without faults in {str(folder)!r}, got {len(faults)}; convert them again")


def _texts(folder: Path, databases: Sequence[ImageDb]) -> list[str]:
    """Print what a database of texts holds; return its faults."""
    texts = open_texts(folder, lengths="" if (folder / "id2len.json").exists() else "qar")
    named = (folder / "txt2img.json").exists()
    fields: Counter[str] = Counter()
    used: Counter[str] = Counter()
    first = ""
    record: dict[str, Any] = {}
    faults = []
    for key in tqdm(texts.lengths, desc="texts", disable=None):
        try:
            found = _checked(texts, key)
            fields.update(list(found))
            first, record = (key, found) if not record else (first, record)
            names = texts.images[key] if named else ()
            for name in (names,) if isinstance(names, str) else names:
                used[name] += 1
                if databases and not any(name in images for images in databases):
                    raise DataError(
                        f"{texts.where(key)}: expected the image {name!r} in a database, got none; convert it"
                    )
        except DataError as error:
            faults.append(str(error))
    meta, lengths = texts.meta, list(texts.lengths.values())
    print(f"{folder}: {counted(len(texts), 'text')}")
    print(f"  tokenizer   {meta.tokenizer}; [CLS] {meta.cls}, [SEP] {meta.sep}, [MASK] {meta.mask}, words {meta.words}")
    print(f"  word pieces {_spread(lengths)}")
    print(f"  fields      {', '.join(f'{name} ({count})' for name, count in sorted(fields.items()))}")
    if used:
        print(f"  images      {len(used)}, texts of each {_spread(list(used.values()))}")
    print(f"  record      {first!r}")
    for name, value in record.items():
        print(f"    {name}: {shown(value)}")
    return faults


def _checked(texts: TextDb, key: str) -> dict[str, Any]:
    """A record, after checks of its word pieces."""
    record = texts[key]
    with within(texts.where(key)):
        lengths = text_lengths(record)
        if texts.lengths[key] not in lengths.values():
            raise DataError(
                f"expected {texts.lengths[key]} word pieces, as the JSON file says, got {lengths}; convert it again"
            )
        highest = max(record["input_ids"])
        if highest >= texts.meta.words[1]:
            raise DataError(
                f"expected ids below {texts.meta.words[1]}, got {highest}; is meta.json another tokenizer's?"
            )
    return record


def _images_in(folder: Path) -> Iterator[ImageDb]:
    """The databases of images in a folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found = {name: _LIMITS.fullmatch(name.removesuffix(_COMPRESSED)) for name in names}
    if not any(found.values()):
        raise DataError(
            f"expected a database of texts or of images in {str(folder)!r}, got {names or 'none'}; check the path"
        )
    for name, match in found.items():
        if match is not None:
            fixed, sure, most, fewest = match.groups()
            limits = (
                RegionLimits()
                if sure is None
                else RegionLimits(conf_th=float(sure), max_bb=int(most), min_bb=int(fewest))
            )
            limits = limits if fixed is None else RegionLimits(num_bb=int(fixed))
            yield open_images(folder, limits, compressed=name.endswith(_COMPRESSED))


def _images(images: ImageDb) -> list[str]:
    """Print what a database of images holds; return its faults."""
    counts, faults, labels, scores = [], [], 0, 0
    for name in tqdm(images.names, desc="images", disable=None):
        try:
            found = images.read(name, labels=True)
        except DataError as error:
            faults.append(str(error))
        else:
            counts.append(len(found))
            labels += found.labels is not None
            scores += found.scores is not None
    print(f"{images.folder}: {counted(len(images), 'image')}")
    print(f"  regions     {_spread(counts)}")
    print(f"  features    {images.feature_dim}")
    print(f"  soft labels of {labels} images, scores of {scores}")
    return faults


def _spread(numbers: Sequence[int]) -> str:
    """The range and the median of some numbers."""
    return f"{min(numbers)} to {max(numbers)}, median {median(numbers):g}" if numbers else "none"
