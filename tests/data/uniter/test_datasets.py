"""Sources over databases: what they draw, how long their rows are, and what is in a batch."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from support.uniter_databases import arrays
from support.uniter_shards import (
    IMAGES,
    WORDS,
    captions,
    pair_records,
    referring_shard,
    seeded,
    shard,
    vcr_records,
    vcr_shard,
)

from advvl.data.mixing import MixedSampler, MixedSource
from advvl.data.sampling import TokenBuckets
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import ReferringSource
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs, RetrievalSource, drawn
from advvl.data.uniter.datasets.vcr import ChoiceEvaluationSource, ChoiceSource
from advvl.data.uniter.datasets.vcr_pretraining import VCRPretrainingSource
from advvl.errors import DataError
from advvl.fit.loop import fit
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.pretraining import UniterForPretraining, loss_entries
from advvl.tasks.uniter.vqa import UniterForVQA

SOURCES: dict[str, Callable[[Path], Any]] = {
    **{
        task: lambda folder, task=task: PretrainingSource([shard(folder)], task)
        for task in ("mlm", "mrfr", "mrc", "mrc-kl")
    },
    "answers": lambda folder: AnswerSource([shard(folder)], 3),
    "paired": lambda folder: PairSource([shard(folder, pair_records())]),
    "triplet": lambda folder: PairSource([shard(folder, pair_records())], "triplet"),
    "qa": lambda folder: ChoiceSource([vcr_shard(folder, "qa")]),
    "qar": lambda folder: ChoiceSource([], [vcr_shard(folder, "qar")]),
    "vcr val": lambda folder: ChoiceEvaluationSource([vcr_shard(folder, "qar")]),
    "vcr test": lambda folder: ChoiceEvaluationSource([vcr_shard(folder, "qar", known=False)], "test"),
    "referring": lambda folder: ReferringSource([referring_shard(folder)], names="i{}.npz"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_an_examples_length_is_its_rows_times_the_longest(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path)
    for index in range(len(source)):
        rows, longest = source.batch([index], seeded())["attn_masks"].shape
        assert int(source.examples.lengths[index]) == rows * longest


@pytest.mark.parametrize("name", [*SOURCES, "itm", "retrieval"])
def test_a_batch_follows_from_its_examples_and_the_generator(name: str, tmp_path: Path) -> None:
    """And the parts of a batch, each with a generator of the same state, have the rows of the whole."""
    more = {
        "itm": lambda folder: PretrainingSource([shard(folder)], "itm"),
        "retrieval": lambda folder: RetrievalSource(Pairs([shard(folder)])),
    }
    source = {**SOURCES, **more}[name](tmp_path)
    order = list(range(len(source)))[::-1]
    whole, again = source.batch(order, seeded()), source.batch(order, seeded())
    assert set(whole) == set(again)
    for key, value in whole.items():
        assert (
            torch.equal(torch.as_tensor(again[key]), value) if isinstance(value, torch.Tensor) else again[key] == value
        )
    rows = len(whole["attn_masks"]) // len(order)
    for place, index in enumerate(order):
        part = source.batch([index], seeded())
        words, boxes = part["input_ids"].shape[1], part["img_feat"].shape[1]
        mine = slice(rows * place, rows * place + rows)
        assert torch.equal(part["input_ids"], whole["input_ids"][mine, :words])
        assert torch.equal(part["img_feat"], whole["img_feat"][mine, :boxes])
        if "targets" in whole:
            share = len(whole["targets"]) // len(order)
            assert torch.equal(part["targets"], whole["targets"][share * place : share * (place + 1)])


def test_words_are_masked_by_the_databases_own_ids_and_never_the_special_ones(tmp_path: Path) -> None:
    made = shard(tmp_path, MASK=55, CLS=56, SEP=57, v_range=[70, 71])
    source = PretrainingSource([made], "mlm", mask=0.6)
    fates: Counter[str] = Counter()
    for seed in range(60):
        batch = source.batch(range(len(source)), seeded(seed))
        assert batch["task"] == "mlm"
        chosen = batch["txt_labels"] != -1
        assert chosen.any(1).all()
        for row, length in enumerate(batch["txt_lens"].tolist()):
            assert batch["input_ids"][row, 0] == 56
            assert batch["input_ids"][row, length - 1] == 57
            assert not chosen[row, [0, *range(length - 1, chosen.shape[1])]].any()
            ids = batch["input_ids"][row].where(~chosen[row], batch["txt_labels"][row])
            assert ids[1 : length - 1].tolist() == WORDS[f"t{row}"]
        for shown, true in zip(batch["input_ids"][chosen].tolist(), batch["txt_labels"][chosen].tolist(), strict=True):
            fates["mask" if shown == 55 else "wrong" if shown == 70 != true else "same"] += 1
    shares = {fate: count / fates.total() for fate, count in fates.items()}
    assert all(abs(shares[fate] - share) < 0.03 for fate, share in {"mask": 0.8, "wrong": 0.1, "same": 0.1}.items())


def test_masked_regions_are_hidden_and_asked_for(tmp_path: Path) -> None:
    made = shard(tmp_path)
    batches = {task: PretrainingSource([made], task).batch(range(9), seeded()) for task in ("mrfr", "mrc", "mrc-kl")}  # type: ignore[arg-type]
    for task, batch in batches.items():
        masks = batch["img_masks"]
        assert masks.any(1).all()
        assert not batch["img_feat"][masks].any()
        assert int(batch["img_mask_tgt"].sum()) == int(masks.sum())
        name = "feat_targets" if task == "mrfr" else "label_targets"
        kind = "features" if task == "mrfr" else "soft_labels"
        true = [one[kind][masks[n, : len(one[kind])].numpy()] for n, one in enumerate(IMAGES.values())]
        assert torch.equal(batch[name], torch.from_numpy(np.concatenate(true)).float())


def test_wrong_images_are_any_others_of_the_same_shard(tmp_path: Path) -> None:
    few = {key: record for key, record in captions().items() if record["img_fname"] in ("i0.npz", "i1.npz", "i2.npz")}
    rest = {key: record for key, record in captions().items() if record["img_fname"] > "i2.npz"}
    shards = [shard(tmp_path / "a", few), shard(tmp_path / "b", rest)]
    source = PretrainingSource(shards, "itm")
    place = {float(one["features"][0, 0]): name for name, one in IMAGES.items()}
    shown: dict[str, Counter[str]] = {key: Counter() for key in WORDS}
    wrong = total = 0
    for seed in range(400):
        batch = source.batch(range(len(source)), seeded(seed))
        for row, feature in enumerate(batch["img_feat"][:, 0, 0].tolist()):
            key = source.examples.key(row)
            own = place[feature] == captions()[key]["img_fname"]
            assert own == bool(batch["targets"][row])
            wrong, total = wrong + (not own), total + 1
            if not own:
                shown[key][place[feature]] += 1
    assert abs(wrong / total - 0.5) < 0.02
    for key, counts in shown.items():
        own = captions()[key]["img_fname"]
        pool = {f"i{n}.npz" for n in (range(3) if key in few else range(3, 9))} - {own}
        assert set(counts) == pool
        assert min(counts.values()) > 0.5 * counts.total() / len(pool)


@given(st.integers(1, 12), st.data())
def test_places_are_drawn_without_those_excluded_and_none_twice(count: int, data: Any) -> None:
    excluded = data.draw(st.lists(st.integers(0, count - 1), max_size=count))
    free = count - len(set(excluded))
    draws = data.draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=free))
    found = drawn(count, excluded, draws)
    assert len(found) == len(set(found)) == len(draws)
    assert not set(found) & set(excluded)
    assert all(0 <= place < count for place in found)


def test_all_places_are_equally_likely() -> None:
    grid = [(n + 0.5) / 60 for n in range(60)]
    pairs = Counter(tuple(drawn(6, [2], [a, b])) for a in grid for b in grid)
    assert len(pairs) == 5 * 4
    assert set(pairs.values()) == {60 * 60 // 20}


def test_a_group_is_a_match_and_mismatches_of_its_text_and_of_its_image(tmp_path: Path) -> None:
    pairs = Pairs([shard(tmp_path)])
    source = RetrievalSource(pairs, negatives=2)
    place = {float(one["features"][0, 0]): name for name, one in IMAGES.items()}
    text = {tuple(ids): key for key, ids in WORDS.items()}
    for seed in range(20):
        batch = source.batch(range(len(source)), seeded(seed))
        assert batch["sample_size"] == 5
        for group in range(len(source)):
            rows = range(5 * group, 5 * group + 5)
            keys = [text[tuple(batch["input_ids"][row, 1 : batch["txt_lens"][row] - 1].tolist())] for row in rows]
            names = [place[float(batch["img_feat"][row, 0, 0])] for row in rows]
            match = [captions()[key]["img_fname"] == name for key, name in zip(keys, names, strict=True)]
            assert match == [True, False, False, False, False]
            assert keys[:3] == [f"t{group}"] * 3
            assert names[3:] == names[:1] * 2
            assert len(set(names[:3])) == 3
            assert len({keys[0], *keys[3:]}) == 3


@pytest.mark.parametrize("side", ["images", "texts"])
def test_hard_negatives_are_a_match_and_many_mismatches_of_one_side(side: Any, tmp_path: Path) -> None:
    source = HardNegativeSource(Pairs([shard(tmp_path)]), side, candidates=7)
    batch = source.batch([3], seeded())
    shapes = len(batch["input_ids"]), len(batch["img_feat"]), len(batch["txt_lens"]), len(batch["num_bbs"])
    assert shapes == ((1, 8, 8, 8) if side == "images" else (8, 1, 8, 8))
    with pytest.raises(DataError, match="one example at a time, got 2"):
        source.batch([3, 4], seeded())
    greedy = HardNegativeSource(Pairs([shard(tmp_path / "more")]), side, candidates=13)
    with pytest.raises(DataError, match="expected 13 or more that do not match, got"):
        greedy.batch([3], seeded())


@pytest.mark.parametrize("filling", ["full", "uniter"])
def test_wrong_images_do_not_carry_a_batch_over_its_budget(filling: Any, tmp_path: Path) -> None:
    """One image has far more regions than the others, and any caption may get it."""
    images = {**IMAGES, "i3.npz": arrays(12, features=6)}
    source = PretrainingSource([shard(tmp_path, images=images)], "itm")
    lengths = [len(words) + 2 + 12 for words in WORDS.values()]
    assert source.examples.lengths.tolist() == lengths
    sampler = TokenBuckets(source.examples.lengths, 80, multiple=2, bucket=8, filling=filling)
    most = 0
    for update in range(200):
        (rows,) = sampler.parts(update, 1)
        batch = source.batch(rows, seeded(update))
        most = max(most, batch["attn_masks"].numel())
    assert 60 < most <= 80


def test_the_largest_image_is_that_of_the_captions_own_shard(tmp_path: Path) -> None:
    few = {key: record for key, record in captions().items() if record["img_fname"] in ("i0.npz", "i1.npz")}
    rest = {key: record for key, record in captions().items() if record["img_fname"] in ("i2.npz", "i3.npz")}
    source = PretrainingSource([shard(tmp_path / "a", few), shard(tmp_path / "b", rest)], "itm")
    assert source.examples.lengths.tolist() == [
        len(record["input_ids"]) + 2 + regions for part, regions in ((few, 3), (rest, 5)) for record in part.values()
    ]


def config() -> UniterConfig:
    return UniterConfig(
        vocab_size=97,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        img_dim=6,
        img_label_dim=4,
    )


@pytest.mark.slow
def test_a_killed_pretraining_run_of_all_tasks_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """From databases, in token buckets, mixed by ratio; in the middle of an epoch."""
    tasks = {"mlm": 2, "itm": 2, "mrfr": 1, "mrc": 1, "mrc-kl": 1}
    made = shard(tmp_path)
    sources = {task: PretrainingSource([made], task) for task in tasks}  # type: ignore[arg-type]
    sampler = MixedSampler(
        {task: TokenBuckets(source.examples.lengths, 60, bucket=8) for task, source in sources.items()}, tasks
    )

    class Stopped:
        def __init__(self, after: int) -> None:
            self.source, self.left, self.tasks = MixedSource(sources), after, []

        def __len__(self) -> int:
            return len(self.source)

        def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            batch = self.source.batch(indices, generator)
            self.tasks.append(batch["task"])
            return batch

    def run(after: int = 10**6, **arguments: Any) -> tuple[Any, list[str]]:
        torch.manual_seed(0)
        model, source = UniterForPretraining(config()), Stopped(after)
        options = OptimizerOptions(learning_rate=1e-2)
        fit(
            model,
            source,
            sampler=sampler,
            options=options,
            seed=1,
            updates=20,
            count=loss_entries,
            accelerator=Accelerator(cpu=True),
            **arguments,
        )
        return model.state_dict(), source.tasks

    whole, drawn_tasks = run()
    assert set(drawn_tasks) == set(tasks)
    with pytest.raises(KeyboardInterrupt):
        run(11, checkpoint=tmp_path / "run.pt", checkpoint_seconds=0.0)
    resumed, rest = run(checkpoint=tmp_path / "run.pt", resume=True)
    assert rest == drawn_tasks[11:]
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_source_may_be_sent_to_another_process(tmp_path: Path) -> None:
    for source in (PretrainingSource([shard(tmp_path / "a")], "itm"), RetrievalSource(Pairs([shard(tmp_path / "b")]))):
        sent = pickle.loads(pickle.dumps(source))
        found, expected = sent.batch([3, 1], seeded()), source.batch([3, 1], seeded())
        assert torch.equal(found["img_feat"], expected["img_feat"])
        assert len(sent) == len(source)


def test_a_model_learns_from_a_batch_of_a_database(tmp_path: Path) -> None:
    source = AnswerSource([shard(tmp_path)], 3)
    output = UniterForVQA(config(), num_answers=3)(**source.batch(range(5)))
    assert output.loss.shape == (5,)
    assert output.loss.isfinite().all()


def test_test_sets_have_no_targets_and_half_of_one_is_refused(tmp_path: Path) -> None:
    without = {key: {n: v for n, v in record.items() if n != "target"} for key, record in captions().items()}
    assert "targets" not in AnswerSource([shard(tmp_path / "a", without)], 3).batch([0, 1])
    mixed = AnswerSource([shard(tmp_path / "b", {**without, "t0": captions()["t0"]})], 3)
    with pytest.raises(DataError, match="expected targets of all examples of a batch or of none, got 1 of 2"):
        mixed.batch([0, 1])
    unlabelled = {key: {**record, "target": None} for key, record in pair_records().items()}
    assert "targets" not in PairSource([shard(tmp_path / "c", unlabelled)]).batch([0, 1])
    batch = ChoiceEvaluationSource([vcr_shard(tmp_path / "d", "qar", known=False)], "test").batch([0, 1])
    assert len(batch["input_ids"]) == 40
    assert "qa_targets" not in batch


def test_regions_have_the_type_of_their_image_only_where_asked(tmp_path: Path) -> None:
    made = shard(tmp_path, pair_records())
    assert "img_type_ids" not in PairSource([made], image_types=False).batch([0])
    assert PairSource([made], "triplet").batch([0])["img_type_ids"].tolist() == [[1, 1] + [2] * 6]


def test_a_damaged_page_is_an_error_and_names_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shard(tmp_path)

    class Damaged:
        def get(self, key: bytes) -> bytes:
            raise lmdb.CorruptedError("MDB_CORRUPTED: Located page was wrong type")

    monkeypatch.setattr(type(made.texts.file), "_transaction", Damaged())
    with pytest.raises(DataError, match=r"expected to read 't0' in '.*x\.db', got .*MDB_CORRUPTED.*; copy it again"):
        made.texts["t0"]


@pytest.mark.parametrize("rationales", [True, False])
def test_a_second_pretraining_on_vcr_hides_words_of_each_part_and_regions_of_both_databases(
    rationales: bool, tmp_path: Path
) -> None:
    made = vcr_shard(tmp_path, "qar")
    rows = [
        [20 + n, 21, 2, *vcr_records()[f"q{n}"]["input_ids_as"][n], 2, *([15] * 5 + [2] if rationales else [])]
        for n in range(3)
    ]
    for seed in range(20):
        batch = VCRPretrainingSource([made], "mlm", rationales=rationales).batch([0, 1, 2], seeded(seed))
        for row, expected in enumerate(rows):
            labels = batch["txt_labels"][row]
            ids = batch["input_ids"][row].where(labels == -1, labels)[: len(expected) + 1].tolist()
            assert ids == [1, *expected]
            ends = [place for place, number in enumerate(ids) if number == 2]
            hidden = [place for place in range(len(ids)) if labels[place] != -1]
            assert not set(hidden) & {0, *ends}
            assert {sum(end < place for end in ends) for place in hidden} == set(range(len(ends)))
            types = [0] * 3 + [2] * (ends[1] - 2) + [3] * (len(ids) - ends[1] - 1)
            types[ends[1]] = 3 if rationales else 2
            assert batch["txt_type_ids"][row, : len(types)].tolist() == types
    for task, name in (("mrfr", "feat_targets"), ("mrc-kl", "label_targets")):
        batch = VCRPretrainingSource([made], task, mask=0.5).batch([0, 1, 2], seeded())  # type: ignore[arg-type]
        masks = batch["img_masks"]
        assert masks[:, :2].any()
        assert masks[:, 2:].any()
        assert len(batch[name]) == int(masks.sum()) == int(batch["img_mask_tgt"].sum())
        assert not batch["img_feat"][masks].any()
