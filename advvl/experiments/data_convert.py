"""`advvl data convert`: JSON lines and files of region features, written as UNITER's databases."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from advvl.checks import path_of
from advvl.data.boxes import checked_regions
from advvl.data.feature_files import open_features
from advvl.data.json_lines import as_object, numbered_lines
from advvl.data.lxmert.answers import AnswerTable
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.referring import DRAWN
from advvl.data.uniter.image_db import RegionLimits
from advvl.data.uniter.image_writer import ImageDbWriter, write_images
from advvl.data.uniter.json_files import read_counts
from advvl.data.uniter.lmdb_files import refuse_existing
from advvl.data.uniter.own import (
    MAX_LENGTH,
    VCR_MAX_LENGTH,
    caption_sources,
    nlvr2_source,
    referring_source,
    vcr_source,
    ve_source,
    vqa_source,
)
from advvl.data.uniter.own_tables import needed
from advvl.data.uniter.text_writer import TextDbWriter, write_texts
from advvl.data.uniter.word_pieces import TextMeta
from advvl.data.vqa import answer_scores, frequent_answers
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError
from advvl.experiments.progress import counted
from advvl.files import write_json

_PUBLISHED_BB: Final = 100  # regions of the published databases of referring expressions, at most

_RECENT: Final = 256  # images that are kept while records are read, which often name one several times in a row

_SOURCES: Final[Mapping[str, Callable[..., Any]]] = {
    "vqa": vqa_source,
    "ve": ve_source,
    "nlvr2": nlvr2_source,
    "vcr": vcr_source,
    "captions": lambda *given, **options: caption_sources(*given, tasks=("mlm",), **options)["mlm"],
    "referring": lambda *given, **options: referring_source(*given, boxes=True, **options),
}
TASKS: Final = tuple(_SOURCES)
"""The tasks whose records can be converted; retrieval has captions too."""


def convert(given: argparse.Namespace) -> None:
    """Write the databases that the options of `advvl data convert` ask for.

    Raises:
        ConfigurationError: options that do not go together.
        DataError: data that cannot be used.
        OutputDirectoryError: something that is there already, or a place that cannot be written.
    """
    _check(given)
    features = open_features(given.features)
    answers = _answers(given) if given.records is not None and given.task == "vqa" else None
    shard, skipped = (None, []) if given.records is None else _read(given, features, answers)
    numbers = {name: number for number, name in enumerate(features)} if given.task == "referring" else None
    said, written = [], None
    with ExitStack() as undo:
        with ExitStack() as databases:
            if given.image_db is not None:
                limits, half = RegionLimits(num_bb=_num_bb(given, shard)), not given.full_precision
                writer = databases.enter_context(
                    write_images(given.image_db, limits, compressed=given.compressed, half=half)
                )
                skipped += _write_images(writer, features, shard, numbers, skip_bad=given.skip_bad)
                written = writer.counts
                regions = sum(writer.counts.values())
                said.append(f"{given.image_db}: {counted(len(writer.counts), 'image')}, {counted(regions, 'region')}")
                said[-1] += "" if limits.num_bb is None else f"; read with --data.num_bb {limits.num_bb}"
            if given.text_db is not None and shard is not None:
                with write_texts(given.text_db, TextMeta.of(*_tokenizer(given.tokenizer))) as texts:
                    left_out = _write_texts(texts, shard, numbers, written, skip_bad=given.skip_bad)
                skipped += left_out
                undo.callback(shutil.rmtree, given.text_db)  # where the images cannot be written after all
                said.append(f"{given.text_db}: {counted(len(shard.texts.lengths) - len(left_out), 'text')}")
        undo.pop_all()
    if answers is not None:
        said.append(f"{given.answers}: {counted(len(answers), 'answer')}; train with --model.answers {len(answers)}")
        if not Path(given.answers).exists():
            write_json(given.answers, answers.numbers)
    print("\n".join([f"skipped: {reason}" for reason in skipped] + said + [f"skipped: {len(skipped)}"]))


def _check(given: argparse.Namespace) -> None:
    missing = [
        name
        for name, wanted in (
            ("--text-db or --image-db", given.text_db is None and given.image_db is None),
            ("RECORDS", given.records is None and given.text_db is not None),
            ("--task", given.records is not None and given.task is None),
            ("--tokenizer", given.records is not None and given.tokenizer is None),
            ("--answers", given.records is not None and given.task == "vqa" and given.answers is None),
        )
        if wanted
    ]
    if missing:
        raise ConfigurationError(f"expected {', '.join(missing)}, got none; see advvl data convert --help")
    if given.text_db is not None:
        refuse_existing(path_of(given.text_db))


def _read(
    given: argparse.Namespace, features: Mapping[str, Mapping[str, Any]], answers: AnswerTable | None
) -> tuple[Shard, list[str]]:
    """Read and check the records; return their shard, and reasons why some were left out."""
    longest = VCR_MAX_LENGTH if given.task == "vcr" else MAX_LENGTH
    options: dict[str, Any] = {} if answers is None else {"answers": answers}
    with tqdm(desc="images of records", disable=None) as bar:
        source = _SOURCES[given.task](
            given.records,
            _tokenizer(given.tokenizer)[0],
            images=Recent(features, bar),
            max_length=longest if given.max_length is None else given.max_length,
            skip_bad=given.skip_bad,
            **options,
        )
    examples = source.examples
    shard: Shard = examples.shards[-1]
    return shard, list(examples.skipped)


class Recent(Mapping[str, Mapping[str, Any]]):
    """Images by name, of which those read last are kept; counts on a bar how many were asked for."""

    def __init__(self, images: Mapping[str, Mapping[str, Any]], bar: tqdm[Any]) -> None:
        self._images, self._bar = images, bar
        self._read = lru_cache(_RECENT)(images.__getitem__)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        self._bar.update()
        return self._read(name)


def _images(shard: Shard, key: str) -> tuple[str, ...]:
    """The names of an example's images, as its record has them."""
    names = shard.texts.images[key]
    return (names,) if isinstance(names, str) else names


def _num_bb(given: argparse.Namespace, shard: Shard | None) -> int | None:
    """The fixed number of regions; of referring expressions as published, or the most of an image if that is more."""
    if given.num_bb is not None or given.task != "referring":
        return None if given.num_bb is None else int(given.num_bb)
    return max(_PUBLISHED_BB, *(len(row["ann_ids"]) for row in shard.texts.table("images"))) if shard else _PUBLISHED_BB


def _write_images(
    writer: ImageDbWriter,
    features: Mapping[str, Mapping[str, Any]],
    shard: Shard | None,
    numbers: Mapping[str, int] | None,
    *,
    skip_bad: bool,
) -> list[str]:
    """Write the images that a shard names, or all, by their numbers if there are any; return reasons for those left out."""
    named = None if shard is None else {name for key in shard.texts.lengths for name in _images(shard, key)}
    skipped = []
    for name in tqdm([name for name in features if named is None or name in named], desc="images", disable=None):
        try:
            with within(f"image {name!r}"):
                found = features[name]
                rows, boxes = checked_regions(needed(found, "features"), needed(found, "boxes"), found.get("size"))
            writer.add(_key(name, numbers), rows, boxes, scores=found.get("scores"), labels=found.get("soft_labels"))
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    return skipped


def _write_texts(
    writer: TextDbWriter,
    shard: Shard,
    numbers: Mapping[str, int] | None,
    images: Container[str] | None,
    *,
    skip_bad: bool,
) -> list[str]:
    """Write the texts of a shard; with numbers of images, as referring expressions. Return reasons for those left out.

    Arguments:
        images: those that were written; None: all are there.
    """
    skipped = []
    for key in tqdm(shard.texts.lengths, desc="texts", disable=None):
        fields = {name: value for name, value in shard.texts[key].items() if value is not None}
        names = _images(shard, key)
        missing = [name for name in names if images is not None and _key(name, numbers) not in images]
        if missing:
            skipped.append(f"{shard.texts.where(key)}: its image {missing[0]!r} was left out")
            continue
        if numbers is not None:
            fields["image_id"] = numbers[names[0]]
        else:
            fields["img_fname"] = names[0] if len(names) == 1 else list(names)
        try:
            writer.add(key, fields)
        except DataError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
    if numbers is not None:
        writer.add_table("images", _table(shard, numbers))
    return skipped


def _key(name: str, numbers: Mapping[str, int] | None) -> str:
    """The name of an image in the database: its own, or that of its number in the published database of drawn boxes."""
    return name if numbers is None else DRAWN.format(numbers[name])


def _table(shard: Shard, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """The table of images of referring expressions, with the numbers that the database of images has as names."""
    rows = shard.texts.table("images")
    own = {shard.texts[key]["image_id"]: numbers[_images(shard, key)[0]] for key in shard.texts.lengths}
    return [{**row, "id": own[row["id"]]} for row in rows]


def _tokenizer(path: str) -> tuple[Any, str]:
    """The tokeniser of a tokenizer.json, or of a folder or name of transformers, and its name."""
    if path.endswith(".json"):
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # the only class that tokenizers raises
            raise DataError(f"expected a tokenizer.json at {path!r}, got {error}; check the path") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer, Path(path).resolve().parent.name
    import transformers  # takes seconds, which --help need not wait for

    try:
        return transformers.AutoTokenizer.from_pretrained(path), Path(path).resolve().name
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"expected a tokenizer of transformers, got {path!r}: {first}; give its folder") from error


def _answers(given: argparse.Namespace) -> AnswerTable:
    """The answers of the file, in the order of their numbers, or where there is none those of all records."""
    path = Path(given.answers)
    if not path.exists():
        return frequent_answers(_good_records(given.records))
    numbers = read_counts(path, "the number of each answer")
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise DataError(f"expected the numbers 0 to {len(numbers) - 1} in {str(path)!r}, each once, got others")
    return AnswerTable(tuple(sorted(numbers, key=numbers.__getitem__)))


def _good_records(path: str) -> Iterator[dict[str, Any]]:
    """The records whose answers can be read; what is wrong with others is said when they are read in full."""
    for _, line in numbered_lines(path):
        with suppress(DataError):
            record = as_object(line)
            answer_scores(record.get("answers"))
            yield record
