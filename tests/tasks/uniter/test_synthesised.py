"""Synthesised negatives of ViLTA over UNITER's databases and over people's own records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import differences
from support.uniter_shards import IMAGES, WORDS, captions, seeded, shard
from torch import Tensor

from advvl import Averaged, villa, vilta
from advvl.data.mixing import MixedSampler, MixedSource
from advvl.data.row_draws import RowDraws
from advvl.data.sampling import TokenBuckets
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.own import caption_sources
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.fit.loop import fit
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.model import UniterConfig, UniterOutput
from advvl.tasks.uniter.pretraining import UniterForPretraining, loss_entries
from advvl.tasks.uniter.soft_labels import TextAlone
from advvl.tasks.uniter.synthesised import HardNegatives, nearest_images, word_endings

VOCABULARY = 97
CONTENT = torch.arange(VOCABULARY) >= 30
MASK = 3  # of these databases; another one than `advvl.data.wordpiece.MASK`
FIRST = {float(torch.as_tensor(one["features"][0, 0]).float()): name for name, one in IMAGES.items()}


class Numbers:
    """A tokeniser whose words are their ids."""

    def get_vocab(self) -> dict[str, int]:
        special = {1: "[CLS]", 2: "[SEP]", MASK: "[MASK]", 5: "[UNK]"}
        return {special.get(number, str(number)): number for number in range(VOCABULARY)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(map(int, text.split()))


def databases(folder: Path) -> PretrainingSource:
    """Captions of two shards: of the images i0 to i3, and of i4 to i8."""
    few = {key: record for key, record in captions().items() if record["img_fname"] < "i4"}
    rest = {key: record for key, record in captions().items() if record["img_fname"] > "i4"}
    return PretrainingSource([shard(folder / "a", few), shard(folder / "b", rest)], "itm")


def own_records(folder: Path) -> PretrainingSource:
    return caption_tasks(folder)["itm"]


def caption_tasks(folder: Path) -> dict[Any, PretrainingSource]:
    """Sources of two tasks, of own records."""
    del folder
    images = {
        name: {"features": one["features"].astype("f4"), "boxes": one["norm_bb"][:, :4].astype("f4")}
        for name, one in IMAGES.items()
    }
    records = [{"text": " ".join(map(str, one["input_ids"])), "image": one["img_fname"]} for one in captions().values()]
    return caption_sources(records, Numbers(), tasks=("mlm", "itm"), images=images)


SOURCES: dict[str, Callable[[Path], PretrainingSource]] = {"databases": databases, "own records": own_records}
both = pytest.mark.parametrize("name", SOURCES)


def model() -> UniterForPretraining:
    torch.manual_seed(0)
    return UniterForPretraining(
        UniterConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=16,
            img_dim=6,
        )
    )


def fixed(logits: Tensor, seen: list[Tensor] | None = None) -> Any:
    """An encoder that scores every masked word by the same logits `(V,)`, and notes the ids at the masked places."""

    def score(*, input_ids: Tensor, txt_labels: Tensor, **others: Tensor) -> UniterOutput:
        if seen is not None:
            seen.append(input_ids[txt_labels != -1])
        return UniterOutput(logits=logits.expand(int((txt_labels != -1).sum()), -1))

    return score


def drawn(source: PretrainingSource, seed: int = 0, rows: Any = None) -> dict[str, Any]:
    return source.batch(range(len(source)) if rows is None else rows, seeded(seed))


def shown(batch: dict[str, Any]) -> list[str]:
    """The image of each row."""
    return [FIRST[feature] for feature in batch["img_feat"][:, 0, 0].tolist()]


def own(source: PretrainingSource) -> list[str]:
    return shown({"img_feat": source.read_images(numbers_of(source)).features})


def numbers_of(source: PretrainingSource) -> Tensor:
    """The number of each caption's own image."""
    rows = torch.arange(len(source))
    return source.mismatches(rows, RowDraws.of(rows, seeded()))[0]


@both
def test_a_synthesised_negative_shows_the_true_image_and_other_content_words(name: str, tmp_path: Path) -> None:
    plain, seen = SOURCES[name](tmp_path), []
    logits = torch.randn(VOCABULARY)
    hard = replace(plain, negatives=HardNegatives(fixed(logits, seen), CONTENT, synthesised=1.0))
    mine, edits = own(plain), 0
    for seed in range(5):
        batch, usual = drawn(hard, seed), drawn(plain, seed)
        assert batch["task"] == "itm"
        assert torch.equal(batch["targets"], usual["targets"])
        wrong, ids = batch["targets"] == 0, usual["input_ids"]
        changed = batch["input_ids"] != ids
        assert torch.equal(changed.any(1), wrong & CONTENT[ids].any(1))
        assert CONTENT[batch["input_ids"][changed]].all()
        assert CONTENT[ids[changed]].all()
        for row, image in enumerate(shown(batch)):
            assert image == (mine[row] if changed[row].any() else shown(usual)[row])
        edits += int(changed.sum())
        assert torch.equal(batch["txt_lens"], usual["txt_lens"])
    assert edits > 20
    assert torch.cat(seen).unique().tolist() == [MASK]


@both
def test_the_model_in_training_proposes_and_learns_from_the_batch(name: str, tmp_path: Path) -> None:
    given = model()
    source = replace(SOURCES[name](tmp_path), negatives=HardNegatives(TextAlone(given), CONTENT, synthesised=0.7))
    batch = drawn(source)
    assert differences(batch, drawn(source)) == []
    given(**batch).loss.backward()
    assert given.training
    some = drawn(source, rows=[3, 7, 11])
    for place, row in enumerate([3, 7, 11]):  # of its own row alone
        length = int(some["txt_lens"][place])
        assert torch.equal(some["input_ids"][place, :length], batch["input_ids"][row, :length])
        assert shown(some)[place] == shown(batch)[row]


def test_fit_trains_on_negatives_that_its_own_model_proposes(tmp_path: Path) -> None:
    """The encoder that fills the gaps is the model as the last update left it."""
    given, seen = model(), []
    alone = TextAlone(given)

    def propose(**inputs: Tensor) -> UniterOutput:
        seen.append(given.cls.predictions.bias.detach().clone())
        output: UniterOutput = alone(**inputs)
        return output

    tasks = caption_tasks(tmp_path)
    tasks["itm"] = replace(tasks["itm"], negatives=HardNegatives(propose, CONTENT, synthesised=1.0))
    buckets = {task: TokenBuckets(source.examples.lengths, 60, multiple=1) for task, source in tasks.items()}
    sampler, average = MixedSampler(buckets, {"mlm": 1, "itm": 1}), Averaged(given, 0.9)
    methods = {"mlm": vilta(average), "itm": villa({"text": 0.1, "image": 0.1}, steps=2)}
    options = OptimizerOptions(learning_rate=0.01)
    fit(
        given,
        MixedSource(tasks),
        sampler=sampler,
        options=options,
        seed=0,
        updates=8,
        method=methods,
        adversarial_tasks=None,
        count=loss_entries,
    )
    assert len(seen) > 1
    assert not torch.equal(seen[0], seen[-1])


def test_where_nothing_can_be_replaced_the_batch_is_that_without_negatives(tmp_path: Path) -> None:
    plain = databases(tmp_path)
    none = HardNegatives(fixed(torch.zeros(VOCABULARY)), torch.zeros(VOCABULARY).bool(), synthesised=1.0)
    assert differences(drawn(replace(plain, negatives=none)), drawn(plain)) == []


def test_wrong_says_how_many_are_mismatches(tmp_path: Path) -> None:
    few = replace(databases(tmp_path), wrong=0.0)
    hard = replace(few, negatives=HardNegatives(fixed(torch.zeros(VOCABULARY)), CONTENT, synthesised=1.0))
    assert bool(drawn(hard)["targets"].all())


def test_similar_images_are_of_the_captions_own_shard(tmp_path: Path) -> None:
    plain = databases(tmp_path)
    nearest = nearest_images(plain, 2)
    shards = plain.image_pools
    assert nearest.shape == (9, 2)
    assert torch.equal(shards[nearest], shards[:, None].expand(-1, 2))
    means = [torch.as_tensor(one["features"]).float().mean(0) for one in IMAGES.values()]
    cosines = torch.nn.functional.cosine_similarity(torch.stack(means)[:, None], torch.stack(means)[None], dim=-1)
    cosines[torch.arange(9), torch.arange(9)] = -2
    cosines[shards[:, None] != shards] = -2
    assert torch.equal(nearest, cosines.topk(2).indices)
    negatives = HardNegatives(fixed(torch.zeros(VOCABULARY)), CONTENT, synthesised=0.0, similar=1.0, nearest=nearest)
    mine, seen = own(plain), Counter()
    for seed in range(20):
        batch = drawn(replace(plain, negatives=negatives), seed)
        for row, image in enumerate(shown(batch)):
            number = list(IMAGES).index(mine[row])
            near = {list(IMAGES)[other] for other in nearest[number].tolist()}
            assert image in (near if batch["targets"][row] == 0 else {mine[row]})
            seen[image] += 1
    assert len(seen) > 4
    with pytest.raises(
        DataError, match="4 other images for each, got 3 for image 0, as the rest are copies or of other"
    ):
        nearest_images(plain, 4)


@both
def test_an_image_of_the_batch_is_that_of_another_row_of_the_same_shard(name: str, tmp_path: Path) -> None:
    plain = SOURCES[name](tmp_path)
    negatives = HardNegatives(fixed(torch.zeros(VOCABULARY)), CONTENT, synthesised=0.0, in_batch=1.0)
    source, mine = replace(plain, negatives=negatives), own(plain)
    numbers = numbers_of(plain)
    rows, seen = [0, 1, 2, 12, 13], Counter[str]()
    for seed in range(60):
        batch = drawn(source, seed, rows)
        assert torch.equal(batch["targets"], drawn(plain, seed, rows)["targets"])
        for row, image, match in zip(rows, shown(batch), batch["targets"].tolist(), strict=True):
            pool = plain.image_pools[numbers]
            others = {mine[other] for other in rows if pool[other] == pool[row] and mine[other] != mine[row]}
            assert image in ({mine[row]} if match else others)
            seen[image] += not match
    assert set(seen) == {mine[row] for row in rows}
    alone = drawn(source, rows=[4])
    assert differences(alone, drawn(plain, rows=[4])) == []  # no other row: the image that is drawn from all


def test_shares_of_each_kind_are_as_asked(tmp_path: Path) -> None:
    plain, rows = own_records(tmp_path), [0, 9, 5]  # 0 and 9 are captions of one image
    mine, counts = own(plain), Counter[str]()
    nearest = torch.full((9, 1), list(IMAGES).index("i8.npz"))
    options: dict[str, Any] = {"synthesised": 0.2, "in_batch": 0.3, "similar": 0.4, "nearest": nearest}
    source = replace(plain, negatives=HardNegatives(fixed(torch.zeros(VOCABULARY)), CONTENT, **options))
    for seed in range(600):
        batch = drawn(source, seed, rows)
        if batch["targets"][2] == 0:
            counts[shown(batch)[2]] += 1
    total = counts.total()
    drawn_from_all = 0.1 / 8
    expected = {mine[5]: 0.2, "i0.npz": 0.3 + drawn_from_all, "i8.npz": 0.4 + drawn_from_all}
    assert all(abs(counts[kind] / total - share) < 0.06 for kind, share in expected.items()), counts


def test_a_word_of_several_pieces_is_left_as_it_is(tmp_path: Path) -> None:
    endings = torch.zeros(VOCABULARY).bool()
    ids = own_records(tmp_path).read_texts(torch.arange(len(WORDS))).ids
    endings[ids[5, 3]] = True  # now the third word of t5 continues its second
    assert CONTENT[ids[5, 1:7]].all()
    everything = CONTENT & ~endings
    negatives = HardNegatives(fixed(torch.zeros(VOCABULARY)), everything, synthesised=1.0, words=1.0, endings=endings)
    source = replace(own_records(tmp_path), negatives=negatives, wrong=0.99)
    changed = drawn(source)["input_ids"] != ids
    assert changed[5].nonzero().flatten().tolist() == [1, 4, 5, 6]
    assert word_endings(["[PAD]", "dog", "##s", "#"]).tolist() == [False, False, True, False]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    encoder = fixed(torch.zeros(VOCABULARY))
    negatives = HardNegatives(encoder, CONTENT)
    with pytest.raises(ConfigurationError, match="negatives for task 'itm' alone, got 'mlm'; leave them out"):
        PretrainingSource([shard(tmp_path)], "mlm", negatives=negatives)
    with pytest.raises(ConfigurationError, match="negatives as a function, or None, got 3"):
        PretrainingSource([shard(tmp_path / "more")], "itm", negatives=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"at most 1 together, got synthesised=0.5, similar=0.0, in_batch=0.6"):
        HardNegatives(encoder, CONTENT, in_batch=0.6)
    with pytest.raises(ConfigurationError, match=r"endings as a bool for each word .V,., got 3"):
        HardNegatives(encoder, CONTENT, endings=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="endings of 97 words as of content, got 5"):
        HardNegatives(encoder, CONTENT, endings=torch.zeros(5).bool())
    narrow = HardNegatives(encoder, CONTENT, synthesised=0.0, similar=1.0, nearest=torch.zeros(8, 1).long())
    with pytest.raises(ShapeError, match="nearest images of the source's 9, got 8 rows"):
        drawn(replace(own_records(tmp_path), negatives=narrow))
