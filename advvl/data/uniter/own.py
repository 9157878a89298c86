"""Your own texts and images as sources of batches, one function per task of UNITER.

    source = vqa_source(records, tokenizer, answers=frequent_answers(records))
    fit(model, source, sampler=TokenBuckets(source.examples.lengths, 10240), …)

A record is a dict. Records come as a list, a generator, a `Dataset` of datasets, or the path of a file of JSON lines; a
message about one has its number, from 0, or its line. `source.examples.key(n)` is the `id` of example n's record, or without
one its number or line; of several texts of an image, with ".0", ".1", … after it. Every record has an image:

| key | value |
|---|---|
| `features` | (R, F), of the image's R regions |
| `boxes` | (R, 4), x1, y1, x2, y2 in pixels with `size`, else in parts of the image's width and height |
| `size` | the image's width and height in pixels; may be left out |
| `soft_labels` | (R, C), each region's distribution over classes, column 0 of the background; of MRC alone |

With `images=`, a record has the key `image` instead, a name, and `images` maps names to mappings with these keys, or is
a database opened by `advvl.data.uniter.image_db.open_images`. With `regions=`, a function from a picture to `Regions`,
the value under `image` is a picture.

All functions have the arguments

    records: dicts.
    tokenizer: of tokenizers or transformers, with BERT's special tokens or RoBERTa's.
    images, regions: as above.
    max_length: word pieces of an example's text; None: any.
    skip_bad: leave out the records that cannot be used, and list them in `source.examples.skipped`.

and raise a DataError for a record that cannot be used, with its number, its key and a remedy, and if no record is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from advvl.checks import shown
from advvl.data.lxmert.answers import AnswerTable, Unknown
from advvl.data.uniter.corruption import Task
from advvl.data.uniter.datasets.answers import VE_LABELS, AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import Layout, PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import ReferringSource
from advvl.data.uniter.datasets.retrieval import Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import CHOICES, ChoiceEvaluationSource, ChoiceSource, Split
from advvl.data.uniter.own_fields import Words, box_of, number, scored
from advvl.data.uniter.own_records import read_records
from advvl.data.uniter.own_tables import Fields, OwnImages, OwnTexts, RegionReader, Renamed, Table, needed, plain
from advvl.data.uniter.regions import Regions
from advvl.data.uniter.word_pieces import text_lengths
from advvl.data.vqa import answer_scores, check_table
from advvl.data.whereabouts import within
from advvl.errors import ConfigurationError, DataError

Images = Mapping[str, Any] | Table | None
MakeRegions = Callable[[Any], Regions] | None

MAX_LENGTH: Final = 60
"""The longest text that UNITER is trained on, in word pieces without special tokens."""

VCR_MAX_LENGTH: Final = 220
"""The longest question of VCR with its choices, likewise."""


def vqa_source(
    records: Any,
    tokenizer: Any,
    *,
    answers: AnswerTable,
    unknown: Unknown = "refuse",
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> AnswerSource:
    """Make a source of questions for `advvl.tasks.uniter.vqa.UniterForVQA`.

    A record has `text` and, where they are known, `answers`: the right one, those that ten people gave, or scores in [0, 1]
    by answer.

    Arguments:
        answers: numbers them, such as `advvl.data.vqa.frequent_answers(records)`.
        unknown: a right answer that the table lacks is an error, or is left out.
    """
    check_table(answers)

    def parse(record: Mapping[str, Any], _: Sequence[Regions]) -> list[Fields]:
        given = plain(record.get("answers"))
        if given is None and record.get("answer") is not None:
            raise DataError("expected the field answers, got answer; rename it")
        with within("answers"):
            scores = answers.targets([answer_scores(given)], unknown=unknown)[0]
        return [{"input_ids": words.one(record, "text"), "target": None if given is None else scored(scores)}]

    words, reader = Words(tokenizer), RegionReader(images, regions)
    shard = Shard(*read_records(records, words.meta, parse, reader, max_length=max_length, skip_bad=skip_bad))
    return AnswerSource([shard], len(answers))


def ve_source(
    records: Any,
    tokenizer: Any,
    *,
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> AnswerSource:
    """Make a source of sentences for `advvl.tasks.uniter.ve.UniterForVE`.

    A record has `text` and, where it is known, `label`: "contradiction", "entailment" or "neutral", or the share of people
    who chose each.
    """

    def parse(record: Mapping[str, Any], _: Sequence[Regions]) -> list[Fields]:
        given = record.get("label")
        if given is not None and not isinstance(given, str | Mapping):
            raise DataError(f"label: expected one of {', '.join(VE_LABELS)}, or shares, got {shown(given)}; correct it")
        with within("label"):
            scores = AnswerTable(VE_LABELS).targets([answer_scores(given)])[0]
        return [{"input_ids": words.one(record, "text"), "target": None if given is None else scored(scores)}]

    words, reader = Words(tokenizer), RegionReader(images, regions)
    shard = Shard(*read_records(records, words.meta, parse, reader, max_length=max_length, skip_bad=skip_bad))
    return AnswerSource([shard], len(VE_LABELS))


def nlvr2_source(
    records: Any,
    tokenizer: Any,
    *,
    layout: Layout = "paired",
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> PairSource:
    """Make a source of sentences about two images for `advvl.tasks.uniter.nlvr2.UniterForNLVR2`.

    A record has `text`, its images under `left` and `right`, and where it is known `target`, true or false.

    Arguments:
        layout: "paired" or "triplet", by the model's variant.
    """

    def parse(record: Mapping[str, Any], _: Sequence[Regions]) -> list[Fields]:
        return [{"input_ids": words.one(record, "text"), "target": number(record, "target", 2)}]

    words, reader, keys = Words(tokenizer), RegionReader(images, regions), ("left", "right")
    shard = Shard(
        *read_records(records, words.meta, parse, reader, keys=keys, max_length=max_length, skip_bad=skip_bad)
    )
    return PairSource([shard], layout)


def vcr_source(
    records: Any,
    tokenizer: Any,
    *,
    rationales: bool = True,
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = VCR_MAX_LENGTH,
    skip_bad: bool = False,
) -> ChoiceSource:
    """Make a source of questions with four choices to train `advvl.tasks.uniter.vcr.UniterForVCR`.

    A record has `question`, four `answers`, and `answer`, the number of the right one from 0; with `rationales` four of
    these too, and `rationale`, the number of the right one.

    Arguments:
        rationales: ask for the rationale of each right answer as well, as a second half of the examples.
    """
    words, reader = Words(tokenizer), RegionReader(images, regions)
    texts, found = _read_choices(
        records, words, reader, rationales, known=True, max_length=max_length, skip_bad=skip_bad
    )
    second = [_of_length("qar", replace(texts, skipped=()), found)] if rationales else []
    return ChoiceSource([_of_length("qa", texts, found)], second)


def vcr_evaluation_source(
    records: Any,
    tokenizer: Any,
    *,
    split: Split = "val",
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = VCR_MAX_LENGTH,
    skip_bad: bool = False,
) -> ChoiceEvaluationSource:
    """Make a source of the same records as `vcr_source` has, with all choices of a question to score.

    Arguments:
        split: "val" has rationales of the right answer alone, "test" of all, for records without `answer`.
    """
    words, reader, known = Words(tokenizer), RegionReader(images, regions), split == "val"
    read = _read_choices(records, words, reader, True, known=known, max_length=max_length, skip_bad=skip_bad)
    return ChoiceEvaluationSource([_of_length("qar", *read)], split)


def retrieval_source(
    records: Any,
    tokenizer: Any,
    *,
    negatives: int = 1,
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> RetrievalSource:
    """Make a source of groups for `advvl.tasks.uniter.retrieval.UniterForRetrieval`.

    A record has `text`: a text of its image, or a list of several. `HardNegativeSource(source.pairs, …)` has the same pairs.

    Arguments:
        negatives: in a group, the number of other images of a text, and that of other texts of an image.
    """
    words, reader = Words(tokenizer), RegionReader(images, regions)
    shard = Shard(*read_records(records, words.meta, words.captions, reader, max_length=max_length, skip_bad=skip_bad))
    return RetrievalSource(Pairs([shard]), negatives)


def referring_source(
    records: Any,
    tokenizer: Any,
    *,
    targets: bool = True,
    boxes: bool = False,
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> ReferringSource:
    """Make a source of referring expressions for `advvl.tasks.uniter.referring.UniterForReferringExpressions`.

    A record has `text` and `target`, the index from 0 of the region referred to.

    Arguments:
        targets: include the region referred to.
        boxes: include boxes relative to the image, to score regions by their overlap with the right one. That is `box`
            of the record, x1, y1, x2, y2 in pixels if `size` is given, otherwise relative to the image; or the box of
            `target`.
    """

    def parse(record: Mapping[str, Any], found: Sequence[Regions]) -> list[Fields]:
        target = number(record, "target", len(found[0]))
        if targets:
            needed(record, "target")
        box = box_of(record, found[0], target) if boxes else None
        return [{"input_ids": words.one(record, "text"), "ann_id": target, "bbox": box}]

    words, reader = Words(tokenizer), RegionReader(images, regions)
    texts, found = read_records(records, words.meta, parse, reader, max_length=max_length, skip_bad=skip_bad)
    numbers = {str(name): place for place, name in enumerate(dict.fromkeys(texts.images.values()))}
    for key, fields in texts.records.items():
        fields["image_id"] = numbers[str(texts.images[key])]
    counts = {str(place): found.count(name) for name, place in numbers.items()}
    rows = [
        {"id": place, "width": 1, "height": 1, "ann_ids": list(range(counts[str(place)]))} for place in numbers.values()
    ]
    seen = replace(found, counts=counts, load=Renamed(list(numbers), found.load))
    return ReferringSource([Shard(replace(texts, rows=rows), seen)], "{}", targets, boxes)


def caption_sources(
    records: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[Task] = ("mlm", "itm", "mrfr"),
    images: Images = None,
    regions: MakeRegions = None,
    max_length: int | None = MAX_LENGTH,
    skip_bad: bool = False,
) -> dict[str, PretrainingSource]:
    """Make a source of each task of `advvl.tasks.uniter.pretraining.UniterForPretraining`, for `advvl.data.mixing`.

    A record has `text`: a caption of its image, or a list of several. The wrong images of "itm" are those of other records.

    Arguments:
        tasks: of "mlm", "itm", "mrfr", "mrc" and "mrc-kl"; the last two need `soft_labels`.

    Raises:
        ConfigurationError: another task, or none.
    """
    words, reader = Words(tokenizer), RegionReader(images, regions, labels=bool({"mrc", "mrc-kl"} & set(tasks)))
    if not tasks:
        raise ConfigurationError("expected one task or more of pre-training, got none; name some")
    shard = Shard(*read_records(records, words.meta, words.captions, reader, max_length=max_length, skip_bad=skip_bad))
    return {task: PretrainingSource([shard], task) for task in tasks}


def _read_choices(
    records: Any, words: Words, reader: RegionReader, rationales: bool, *, known: bool, **options: Any
) -> tuple[OwnTexts, OwnImages]:
    """Read VCR's records, with rationales or not, and with the numbers of the right choices or not."""

    def parse(record: Mapping[str, Any], _: Sequence[Regions]) -> list[Fields]:
        fields: Fields = {"input_ids": words.one(record, "question")}
        for name, key, right, of_right in _CHOICES[: 1 + rationales]:
            fields[name] = words.each(record, key, CHOICES)
            if known:
                needed(record, of_right)
                fields[right] = number(record, of_right, CHOICES)
        return [fields]

    return read_records(records, words.meta, parse, reader, **options)


def _of_length(task: Literal["qa", "qar"], texts: OwnTexts, images: OwnImages) -> Shard:
    """VCR's records with the lengths of one of its two tasks."""
    lengths = {key: text_lengths(fields)[f"id2len_{task}"] for key, fields in texts.records.items()}
    return Shard(replace(texts, lengths=lengths), images)


_CHOICES: Final = (
    ("input_ids_as", "answers", "qa_target", "answer"),
    ("input_ids_rs", "rationales", "qar_target", "rationale"),
)
"""The names of a database and of a record, of choices and of the right one."""
