"""A person's own records: the batches that databases of the same content give, whatever holds the records."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pages import blocks
from support.uniter_shards import (
    IMAGES,
    LIMITS,
    captions,
    pair_records,
    referring_records,
    referring_shard,
    seeded,
    shard,
    vcr_records,
    vcr_shard,
)
from transformers import BertTokenizer, RobertaTokenizer

from advvl.data.lxmert.answers import AnswerTable
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import ReferringSource
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import ChoiceEvaluationSource, ChoiceSource
from advvl.data.uniter.image_db import open_images
from advvl.data.uniter.own import (
    caption_sources,
    nlvr2_source,
    referring_source,
    retrieval_source,
    vcr_evaluation_source,
    vcr_source,
    ve_source,
    vqa_source,
)
from advvl.data.uniter.regions import Regions, regions_of
from advvl.data.uniter.word_pieces import TextMeta
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import ConfigurationError, DataError

PAGE = Path(__file__).parents[3] / "docs" / "own-data.md"
ANSWERS = AnswerTable(("red", "green", "blue"))
TASKS = ("mlm", "itm", "mrfr", "mrc", "mrc-kl")


class Numbers:
    """A tokeniser of texts such as "7 12", with the ids of the databases' special tokens."""

    def get_vocab(self) -> dict[str, int]:
        special = {1: "[CLS]", 2: "[SEP]", 3: "[MASK]", 5: "[UNK]"}
        return {special.get(number, str(number)): number for number in range(97)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(map(int, text.split()))


def said(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def image(name: str) -> dict[str, Any]:
    """An image of the databases, as a person has it."""
    found = {key: values.astype("f4") for key, values in IMAGES[name].items()}
    return {"features": found["features"], "boxes": found["norm_bb"][:, :4], "soft_labels": found["soft_labels"]}


def own_captions(**more: Any) -> list[dict[str, Any]]:
    return [
        {"text": said(one["input_ids"]), "image": one["img_fname"], **{k: f(n) for k, f in more.items()}}
        for n, one in enumerate(captions().values())
    ]


def own_pairs() -> list[dict[str, Any]]:
    return [
        {"text": said(one["input_ids"]), **dict(zip(("left", "right"), one["img_fname"], strict=True)), "target": n % 2}
        for n, one in enumerate(pair_records().values())
    ]


def own_questions() -> list[dict[str, Any]]:
    return [
        {
            "question": said(one["input_ids"]),
            "answers": list(map(said, one["input_ids_as"])),
            "rationales": list(map(said, one["input_ids_rs"])),
            "answer": one["qa_target"],
            "rationale": one["qar_target"],
            "image": one["img_fname"][1],
        }
        for one in vcr_records().values()
    ]


def own_expressions() -> list[dict[str, Any]]:
    return [
        {"text": said(one["input_ids"]), "image": f"i{n}.npz", "target": 1}
        for n, one in enumerate(referring_records().values())
    ]


def qa_shards(folder: Path, lengths: str) -> Any:
    """VCR's database without boxes that people drew, which a person's records do not have."""
    found = vcr_shard(folder / lengths, lengths)
    return type(found)(found.texts, found.images, NoBoxes())


class NoBoxes:
    folder, feature_dim = "none", 6

    def count(self, name: str) -> int:
        return 0


OWN: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[Path], Any]]] = {
    "vqa": (
        lambda: own_captions(answers=lambda n: ANSWERS.answers[n % 3]),
        lambda records, **o: vqa_source(records, Numbers(), answers=ANSWERS, **o),
        lambda folder: AnswerSource([shard(folder)], 3),
    ),
    "ve": (
        lambda: own_captions(label=lambda n: ("contradiction", "entailment", "neutral")[n % 3]),
        lambda records, **o: ve_source(records, Numbers(), **o),
        lambda folder: AnswerSource([shard(folder)], 3),
    ),
    "nlvr2": (
        own_pairs,
        lambda records, **o: nlvr2_source(records, Numbers(), **o),
        lambda folder: PairSource([shard(folder, pair_records())]),
    ),
    "nlvr2 triplet": (
        own_pairs,
        lambda records, **o: nlvr2_source(records, Numbers(), layout="triplet", **o),
        lambda folder: PairSource([shard(folder, pair_records())], "triplet"),
    ),
    "vcr": (
        own_questions,
        lambda records, **o: vcr_source(records, Numbers(), **o),
        lambda folder: ChoiceSource([qa_shards(folder, "qa")], [qa_shards(folder, "qar")]),
    ),
    "vcr answers": (
        own_questions,
        lambda records, **o: vcr_source(records, Numbers(), rationales=False, **o),
        lambda folder: ChoiceSource([qa_shards(folder, "qa")]),
    ),
    "vcr val": (
        own_questions,
        lambda records, **o: vcr_evaluation_source(records, Numbers(), **o),
        lambda folder: ChoiceEvaluationSource([qa_shards(folder, "qar")]),
    ),
    "retrieval": (
        own_captions,
        lambda records, **o: retrieval_source(records, Numbers(), negatives=2, **o),
        lambda folder: RetrievalSource(Pairs([shard(folder)]), 2),
    ),
    "referring": (
        own_expressions,
        lambda records, **o: referring_source(records, Numbers(), **o),
        lambda folder: ReferringSource([referring_shard(folder)], names="i{}.npz"),
    ),
    **{
        task: (
            own_captions,
            lambda records, task=task, **o: caption_sources(records, Numbers(), tasks=[task], **o)[task],
            lambda folder, task=task: PretrainingSource([shard(folder)], task),
        )
        for task in TASKS
    },
}


def lengths(source: Any) -> list[int]:
    examples = source.pairs.examples if isinstance(source, RetrievalSource) else source.examples
    found: list[int] = examples.lengths.tolist()
    return found


def check_same(one: Mapping[str, Any], two: Mapping[str, Any], **tolerance: float) -> None:
    assert set(one) == set(two)
    for key, value in two.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(one[key], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=key)
        else:
            assert one[key] == value


@pytest.mark.parametrize("name", OWN)
def test_records_with_the_images_of_a_database_give_its_batches(name: str, tmp_path: Path) -> None:
    records, make, published = OWN[name]
    theirs = published(tmp_path)
    images = open_images(next(tmp_path.rglob("feat_numbb12")).parent, LIMITS)
    ours = make(records(), images=images)
    assert lengths(ours) == lengths(theirs)
    every = range(len(theirs))
    check_same(ours.batch(every, seeded()), theirs.batch(every, seeded()))


@pytest.mark.parametrize("name", OWN)
def test_a_list_a_generator_lines_and_what_is_read_again_give_the_same(name: str, tmp_path: Path) -> None:
    records, make, _ = OWN[name]
    named = records()
    inline = [inlined(record) for record in named]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps(listed(record)) for record in inline))
    images = {name: image(name) for name in IMAGES}
    sources = {
        "list": make(inline),
        "generator": make(record for record in inline),
        "lines": make(path),
        "read again": make(ReadAgain(inline)),
        "images by name": make(named, images=images),
        "generator of names": make((record for record in named), images=ReadAgain(images)),
        "made of pictures": make(named, images={name: name for name in IMAGES}, regions=made),
        "copied to another process": pickle.loads(pickle.dumps(make(ReadAgain(inline)))),
    }
    order = range(len(sources["list"]))[::-1]
    by_record = {"list", "generator", "lines", "read again", "copied to another process"}
    for kind, source in sources.items():
        # inline, no two records have one image: other images are wrong for a text
        like = "list" if kind in by_record else "images by name"
        check_same(source.batch(order, seeded()), sources[like].batch(order, seeded()), rtol=1e-6, atol=1e-7)
        assert lengths(source) == lengths(sources["list"])


def made(picture: str) -> Regions:
    features, boxes, labels = (torch.from_numpy(image(picture)[key]) for key in ("features", "boxes", "soft_labels"))
    return regions_of(features, boxes, labels)


def inlined(record: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in record.items() if key not in ("image", "left", "right")}
    sides = {key: image(record[key]) for key in ("left", "right") if key in record}
    return {**rest, **sides, **(image(record["image"]) if "image" in record else {})}


def listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: listed(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


class ReadAgain:
    """Holds records as a dataset on a disk does; `reads` counts how often one was asked for."""

    def __init__(self, held: Any) -> None:
        self.held, self.reads = held, 0

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, key: Any) -> Any:
        self.reads += 1
        return self.held[key]


def test_a_dataset_is_read_once_and_then_for_each_batch() -> None:
    records = ReadAgain([inlined(record) for record in own_captions()])
    source = retrieval_source(records, Numbers())
    assert records.reads == len(records) == len(source)
    source.batch([3], seeded())
    assert records.reads == len(records) + 2  # its own image and another


def test_a_dataset_of_datasets_is_taken() -> None:
    datasets = pytest.importorskip("datasets")
    records = [listed(inlined(record)) for record in OWN["vqa"][0]()]
    records[0]["answers"] = None  # which is how a dataset says that there is none
    records = [{**record, "answers": {record["answers"]: 0.5} if record["answers"] else None} for record in records]
    dataset = datasets.Dataset.from_list(records)
    ours = vqa_source(dataset, Numbers(), answers=ANSWERS)
    theirs = vqa_source(records, Numbers(), answers=ANSWERS)
    for kind in (None, "numpy", "torch"):
        dataset.set_format(kind)
        check_same(ours.batch([3, 1, 2]), theirs.batch([3, 1, 2]))
    assert ours.batch([3])["targets"].tolist() == [[0.5, 0, 0]]
    assert "targets" not in ours.batch([0])


def test_several_texts_of_an_image_are_examples_of_it() -> None:
    records = [{"text": ["7", "8 9"], **image("i1.npz")}, {"text": "10", **image("i2.npz")}]
    source = caption_sources(records, Numbers())["mlm"]
    assert [source.examples.key(n) for n in range(3)] == ["0.0", "0.1", "1"]
    pairs = retrieval_source(records, Numbers()).pairs
    batch = HardNegativeSource(pairs, "texts", 1).batch([0], seeded())
    assert batch["input_ids"].tolist() == [[1, 7, 2], [1, 10, 2]]  # never its image's other text


def test_an_example_has_the_id_of_its_record_as_its_key() -> None:
    records = [{"id": 17, "text": "7", **image("i1.npz")}, {"id": "b", "text": ["8", "9"], **image("i2.npz")}]
    source = caption_sources(records, Numbers())["mlm"]
    assert [source.examples.key(n) for n in range(3)] == ["17", "b.0", "b.1"]


def test_boxes_to_score_regions_by_are_those_of_the_target_or_of_the_record() -> None:
    one = {
        "text": "7",
        "features": np.ones((2, 6), "f4"),
        "boxes": [[0, 0, 20, 10], [10, 10, 40, 20]],
        "size": (40, 20),
    }
    records = [{**one, "target": 1}, {**one, "target": 0, "box": [20, 5, 40, 10]}]
    batch = referring_source(records, Numbers(), boxes=True).batch([0, 1])
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0.5, 0.75, 0.5]])
    torch.testing.assert_close(batch["region_boxes"], boxes.expand(2, 2, 4))
    torch.testing.assert_close(batch["target_boxes"], torch.tensor([[0.25, 0.5, 0.75, 0.5], [0.5, 0.25, 0.5, 0.25]]))
    detected = [{**one, "box": [20, 5, 40, 10]}]
    batch = referring_source(detected, Numbers(), targets=False, boxes=True).batch([0])
    assert "targets" not in batch
    torch.testing.assert_close(batch["target_boxes"], torch.tensor([[0.5, 0.25, 0.5, 0.25]]))


def test_tokenizers_of_either_library_say_their_special_tokens_and_words(tmp_path: Path) -> None:
    plain = build_tokenizer(["a dog runs !"])
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(plain.get_vocab(), key=plain.get_vocab().__getitem__)))
    bert = BertTokenizer(str(tmp_path / "vocab.txt"))
    assert TextMeta.of(bert) == TextMeta.of(plain)
    record = {"text": "a dog runs!", "answers": "red", **image("i0.npz")}
    ours, theirs = (vqa_source([record], one, answers=ANSWERS).batch([0]) for one in (bert, plain))
    check_same(ours, theirs)
    words = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "dog", "!", "Ġdog", "<mask>"])}
    roberta = RobertaTokenizer(vocab=words, merges=[])
    assert TextMeta.of(roberta) == TextMeta(0, 2, 8, (4, 8), 3)
    assert vqa_source([{**record, "text": "a!"}], roberta, answers=ANSWERS).batch([0])["input_ids"].tolist() == [
        [0, 4, 6, 2]
    ]


def test_tokenizers_that_change_lengths_or_lack_special_tokens_are_refused() -> None:
    record = {"text": "7", "answers": "red", **image("i0.npz")}
    padding, cutting = build_tokenizer(["a"]), build_tokenizer(["a"])
    padding.enable_padding(length=9)
    cutting.enable_truncation(4)
    for tokenizer in (padding, cutting):
        with pytest.raises(ConfigurationError, match="neither pads nor cuts"):
            vqa_source([record], tokenizer, answers=ANSWERS)
    with pytest.raises(ConfigurationError, match="expected a tokenizer of tokenizers or transformers, got 'bert'"):
        vqa_source([record], "bert", answers=ANSWERS)

    class NoMask(Numbers):
        def get_vocab(self) -> dict[str, int]:
            return {token: n for token, n in super().get_vocab().items() if token != "[MASK]"}

    with pytest.raises(DataError, match=r"expected a tokenizer that knows .* without \[MASK\]; give BERT's"):
        vqa_source([record], NoMask(), answers=ANSWERS)


def test_the_page_takes_20_lines_for_each_task() -> None:
    codes = [code for _, code in blocks(PAGE.read_text()) if "fit(" in code]
    assert len(codes) == 7
    assert max(len([line for line in code.splitlines() if line.strip()]) for code in codes) <= 20
