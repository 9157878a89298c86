"""ViLTA's teachers and synthesised negatives (a reconstruction), alone and under VILLA's perturbations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compare import differences
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from advvl import L2, Ascent, Averaged, DiscretePerturber, Frozen, adapt, villa, vilta
from advvl.data.uniter.batching import Images, Texts
from advvl.data.uniter.sources import CaptionSource
from advvl.data.wordpiece import load_bert_tokenizer, save_tokenizer
from advvl.errors import CheckpointError, ConfigurationError, DataError, ShapeError
from advvl.fit.loop import fit
from advvl.fit.options import OptimizerOptions
from advvl.models.uniter.model import UniterConfig, UniterOutput
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.soft_labels import BertTeacher, LiveText, TextAlone
from advvl.tasks.uniter.synthesised import FUNCTION_WORDS, HardNegatives, content_words, nearest_images

WORDS = 40
CONFIG = UniterConfig(
    vocab_size=WORDS,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    img_dim=8,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONTENT = torch.arange(WORDS) >= 12  # 5 to 11 are function words


def model() -> UniterForPretraining:
    torch.manual_seed(0)
    return UniterForPretraining(CONFIG)


def source(*, count: int = 24, tasks: Any = ("mlm", "itm"), **options: Any) -> CaptionSource:
    generator = torch.Generator().manual_seed(0)
    lengths = 4 + torch.arange(count) % 3
    ids = torch.randint(5, WORDS, (count, 6), generator=generator) * (torch.arange(6) < lengths[:, None])
    ids[:, 0], ids[torch.arange(count), lengths - 1] = 2, 3
    regions = torch.full((count,), 3)
    images = Images(
        torch.randn(count, 3, 8, generator=generator),
        torch.rand(count, 3, 7, generator=generator),
        regions,
        torch.zeros(count, 3, 2),
    )
    return CaptionSource(
        Texts(ids, lengths), images, torch.arange(count), replacements=(5, WORDS), tasks=tasks, **options
    )


def drawn(given: CaptionSource, seed: int = 0, indices: Any = range(24)) -> dict[str, Any]:
    return given.batch(list(indices), torch.Generator().manual_seed(seed))


def bert(vocab_size: int = WORDS) -> BertForMaskedLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=vocab_size, max_position_embeddings=16, **sizes))


def test_a_bert_is_asked_for_the_masked_words_alone_and_padding_does_not_matter(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    teacher, batch = BertTeacher(tmp_path, vocab_size=WORDS), drawn(source(tasks=("mlm",)))
    logits = teacher(**batch).logits
    assert logits.shape == (int((batch["txt_labels"] != -1).sum()), WORDS)
    row = 1
    alone = bert().eval()(input_ids=batch["input_ids"][row : row + 1, : batch["txt_lens"][row]]).logits[0]
    asked = batch["txt_labels"][row, : batch["txt_lens"][row]] != -1
    before = int((batch["txt_labels"][:row] != -1).sum())
    torch.testing.assert_close(logits[before : before + int(asked.sum())], alone[asked])


def test_a_teacher_of_another_vocabulary_or_from_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vocabulary of the UNITER, 40 words, got 41; take one"):
        BertTeacher(bert(41), vocab_size=WORDS)
    with pytest.raises(CheckpointError, match="folder of a masked-language model"):
        BertTeacher(tmp_path, vocab_size=WORDS)
    with pytest.raises(ConfigurationError, match="got int"):
        BertTeacher(3, vocab_size=WORDS)  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_a_teacher_of_other_words_is_refused_where_they_are_given(file: str, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(WORDS - 5))]
    bert().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a vocab.txt or tokenizer.json in .*, got none; save the teacher's"):
        BertTeacher(tmp_path, vocab_size=WORDS, vocab=words)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    if file == "tokenizer.json":
        save_tokenizer(load_bert_tokenizer(tmp_path / "vocab.txt"), tmp_path / file)
        (tmp_path / "vocab.txt").unlink()
    assert isinstance(BertTeacher(tmp_path, vocab_size=WORDS, vocab=words).bert, BertForMaskedLM)
    swapped = [*words[:7], words[8], words[7], *words[9:]]
    with pytest.raises(
        ConfigurationError, match=rf"word 7, 'word3', in .*{file}', got 'word2'; take a teacher that was"
    ):
        BertTeacher(tmp_path, vocab_size=WORDS, vocab=swapped)
    with pytest.raises(ConfigurationError, match=r"word 39, None, in .*, got 'word34'"):
        BertTeacher(tmp_path, vocab_size=WORDS, vocab=words[:-1])
    with pytest.raises(ConfigurationError, match=r"vocab as a list of words, got 'vocab.txt'; read them"):
        BertTeacher(tmp_path, vocab_size=WORDS, vocab="vocab.txt")
    with pytest.raises(
        ConfigurationError, match="the folder of a teacher to compare words with vocab, got BertForMaskedLM"
    ):
        BertTeacher(bert(), vocab_size=WORDS, vocab=words)


def test_the_live_model_on_text_alone_does_not_see_the_picture() -> None:
    given, batch = model().eval(), drawn(source(tasks=("mlm",)))
    alone = TextAlone(given)(**batch).logits
    torch.testing.assert_close(TextAlone(given)(**{**batch, "img_feat": 9 * batch["img_feat"]}).logits, alone)
    assert not torch.allclose(given(**batch).logits, alone)


def test_a_teacher_is_looked_for_in_a_folder_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers was asked, which may ask the network")

    monkeypatch.setattr(AutoModelForMaskedLM, "from_pretrained", asked)
    for name in ("bert-base-uncased", tmp_path / "none"):
        with pytest.raises(
            CheckpointError, match=r"the folder of a masked-language model of transformers, got .*; give"
        ):
            BertTeacher(name, vocab_size=WORDS)


@pytest.mark.parametrize("kind", ["bert", "live"])
def test_a_batch_without_masked_words_is_refused_in_words(kind: str) -> None:
    given, batch = model(), drawn(source(tasks=("itm",)))
    teacher = LiveText() if kind == "live" else Frozen(BertTeacher(bert(), vocab_size=WORDS))
    with pytest.raises(DataError, match="'txt_labels'"):
        vilta(teacher).step(adapt(given), batch)


@pytest.mark.parametrize("perturbed", [False, True], ids=["plain", "villa"])
@pytest.mark.parametrize("kind", ["bert", "average", "live"])
def test_a_step_with_each_teacher_is_the_mixture_and_teaches_the_model_alone(kind: str, perturbed: bool) -> None:
    given, batch = model(), drawn(source(tasks=("mlm",)))
    teachers = {
        "bert": lambda: Frozen(BertTeacher(bert(), vocab_size=WORDS)),
        "average": lambda: Averaged(given, 0.995),
        "live": LiveText,
    }
    adversary = villa({"text": 0.1, "image": 0.1}, steps=2) if perturbed else None
    report = vilta(teachers[kind](), alpha=0.4, adversary=adversary).step(adapt(given), batch)
    assert given.training
    assert given.cls.predictions.bias.grad is not None
    if perturbed:
        assert report.delta_norms["image"].min() > 0.05
        return
    plain = model()(**batch)
    q = {
        "bert": lambda: BertTeacher(bert(), vocab_size=WORDS)(**batch).logits,
        "average": lambda: plain.logits,
        "live": lambda: TextAlone(model())(**batch).logits,
    }[kind]().softmax(1)
    expected = 0.6 * plain.loss - 0.4 * (q * plain.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(report.loss, expected.detach())


def fixed(logits: Tensor) -> Any:
    """An encoder that scores every masked word by the same logits `(V,)`."""

    def score(*, txt_labels: Tensor, **others: Tensor) -> UniterOutput:
        return UniterOutput(logits=logits.expand(int((txt_labels != -1).sum()), -1))

    return score


def test_a_synthesised_negative_shows_the_true_image_and_other_content_words() -> None:
    plain, negatives = source(tasks=("itm",)), HardNegatives(TextAlone(model()), CONTENT, synthesised=1.0)
    hard = replace(plain, negatives=negatives)
    batch, usual = drawn(hard), drawn(plain)
    assert torch.equal(batch["targets"], usual["targets"])
    wrong, ids = batch["targets"] == 0, plain.texts.ids
    changed = batch["input_ids"] != ids
    assert not changed[~wrong].any()
    editable = CONTENT[ids].any(1)
    assert torch.equal(changed.any(1), wrong & editable)
    assert torch.equal(batch["img_feat"][editable], plain.images.features[editable])
    assert torch.equal(batch["img_feat"][~editable], usual["img_feat"][~editable])
    assert CONTENT[batch["input_ids"][changed]].all()
    assert CONTENT[ids[changed]].all()


def test_neither_the_original_word_nor_a_synonym_is_drawn() -> None:
    """Words 20 and 21 are synonyms to the teacher, and the encoder likes 20 to 23 best."""
    logits, teacher = torch.zeros(WORDS), torch.full((WORDS,), -20.0)
    logits[20:24], teacher[20:22] = 30.0, 1.0
    seen = set()
    for seed in range(20):
        negatives = HardNegatives(fixed(logits), CONTENT, teacher=fixed(teacher), synthesised=1.0, top_k=2)
        batch = drawn(source(tasks=("itm",), negatives=negatives), seed)
        originals = source().texts.ids
        changed = batch["input_ids"] != originals
        seen |= set(zip(originals[changed].tolist(), batch["input_ids"][changed].tolist(), strict=True))
    assert {new for old, new in seen if old not in (22, 23)} == {22, 23}
    assert all(old != new for old, new in seen)
    one = HardNegatives(fixed(logits), CONTENT, teacher=fixed(teacher), synthesised=1.0, threshold=1.0, top_k=4)
    found = set(drawn(source(tasks=("itm",), negatives=one))["input_ids"].flatten().tolist())
    assert found & {20, 21}  # with no filter synonyms come back


def test_where_every_word_is_a_synonym_the_mismatch_is_another_image() -> None:
    plain = source(tasks=("itm",))
    none = HardNegatives(fixed(torch.zeros(WORDS)), CONTENT, synthesised=1.0, threshold=0.0)
    assert differences(drawn(replace(plain, negatives=none)), drawn(plain)) == []


def test_similar_images_come_with_their_share() -> None:
    plain = source(tasks=("itm",))
    nearest = nearest_images(plain.images, 2)
    assert not (nearest == torch.arange(24)[:, None]).any()
    negatives = HardNegatives(fixed(torch.zeros(WORDS)), CONTENT, synthesised=0.0, similar=1.0, nearest=nearest)
    batch = drawn(replace(plain, negatives=negatives))
    for row in range(24):
        shown = batch["img_feat"][row]
        near = [row] if batch["targets"][row] else nearest[row].tolist()
        assert any(torch.equal(shown, plain.images.features[image]) for image in near)
    with pytest.raises(DataError, match="more than 24 images"):
        nearest_images(plain.images, 24)


def test_a_copy_of_the_true_image_is_no_image_like_it() -> None:
    images = source().images
    twice = Images(*(torch.cat([part, part]) for part in vars(images).values()))
    nearest = nearest_images(twice, 2)
    assert not (nearest % 24 == torch.arange(48)[:, None] % 24).any()
    few = Images(*(part[[0, 0, 0, 1]] for part in vars(images).values()))
    with pytest.raises(DataError, match="2 other images for each, got 1 for image 0"):
        nearest_images(few, 2)


@pytest.mark.parametrize("nearest", [torch.zeros(23, 1).long(), torch.full((24, 1), 24), torch.full((24, 1), -1)])
def test_nearest_images_of_another_source_are_refused(nearest: Tensor) -> None:
    negatives = HardNegatives(fixed(torch.zeros(WORDS)), CONTENT, synthesised=0.0, similar=1.0, nearest=nearest)
    with pytest.raises(ShapeError, match="nearest images of the source's 24, got"):
        drawn(source(tasks=("itm",), negatives=negatives))


def test_shares_of_negatives_are_as_asked_and_draws_repeat() -> None:
    negatives = HardNegatives(TextAlone(model()), CONTENT, synthesised=0.3)
    given = source(count=24, tasks=("itm",), negatives=negatives)
    edited = wrong = 0
    for seed in range(60):
        batch = drawn(given, seed)
        edited += int((batch["input_ids"] != given.texts.ids).any(1).sum())
        wrong += int((batch["targets"] == 0).sum())
    assert 0.24 < edited / wrong < 0.34
    assert differences(drawn(given), drawn(given)) == []
    some = drawn(given, indices=[3, 7, 11])
    assert torch.equal(some["input_ids"][:, :5], drawn(given)["input_ids"][[3, 7, 11], :5])  # of its own row alone


def test_the_model_that_proposes_stays_as_it_was() -> None:
    given = model()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    state = torch.get_rng_state()
    drawn(source(tasks=("itm",), negatives=HardNegatives(TextAlone(given), CONTENT, synthesised=1.0)))
    assert given.training
    assert torch.equal(torch.get_rng_state(), state)
    assert differences(given.state_dict(), before) == []


def test_content_words_are_whole_words_that_are_no_function_words() -> None:
    words = ["[PAD]", "[MASK]", "the", "dog", "##s", ",", "red", "3"]
    assert content_words(words).tolist() == [False, False, False, True, False, False, True, True]
    assert content_words(["The", "Dog"]).tolist() == [False, True]  # of a cased vocabulary
    assert "of" in FUNCTION_WORDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synthesised": 1.2}, "share in"),
        ({"synthesised": 0.7, "similar": 0.5, "nearest": torch.zeros(2, 1).long()}, "at most 1 together"),
        ({"similar": 0.2}, "expected nearest images"),
        ({"similar": 0.2, "nearest": 3}, "numbers of images, a whole number for each, .M, n., got 3"),
        ({"similar": 0.2, "nearest": torch.rand(24, 2)}, "numbers of images"),
        ({"similar": 0.2, "nearest": torch.zeros(24).long()}, "numbers of images"),
        ({"similar": 0.2, "nearest": torch.zeros(24, 0).long()}, "numbers of images"),
        ({"top_k": 0}, "top_k"),
        ({"content": torch.ones(3)}, "content as a bool"),
        ({"encoder": 3}, "encoder as a function"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HardNegatives(**{"encoder": fixed(torch.zeros(WORDS)), "content": CONTENT, **options})


def test_an_encoder_of_another_vocabulary_is_refused() -> None:
    negatives = HardNegatives(fixed(torch.zeros(7)), CONTENT, synthesised=1.0)
    with pytest.raises(ShapeError, match="expected scores of 40 words, got 7"):
        drawn(source(tasks=("itm",), negatives=negatives))


def run(checkpoint: Path | None, *, updates: int = 6, stop: int | None = None) -> tuple[Any, Averaged]:
    """A run of VILLA with a momentum teacher for masked words, plain VILLA for matching, and synthesised negatives."""
    given = model()
    average = Averaged(given, 0.5)
    adversary = villa({"text": 0.1, "image": 0.1}, steps=2)
    methods = {"mlm": vilta(average, adversary=adversary), "itm": adversary}
    captions = source(negatives=HardNegatives(TextAlone(given), CONTENT, synthesised=0.5))

    def log(done: int, loss: float, factor: float) -> None:
        if done == stop:
            raise KeyboardInterrupt

    options = OptimizerOptions(epochs=1, batch_size=4, learning_rate=0.01)
    try:
        fit(
            given,
            captions,
            options=options,
            seed=0,
            updates=updates,
            method=methods,
            checkpoint=checkpoint,
            resume=True,
            log=log,
            checkpoint_seconds=0.0,
        )
    except KeyboardInterrupt:
        assert stop is not None
    return given, average


@pytest.mark.slow
def test_a_run_with_both_and_villa_that_is_killed_ends_with_the_same_weights_and_average(tmp_path: Path) -> None:
    whole, average = run(None)
    assert differences(average.average.module.state_dict(), whole.state_dict())  # it moved, and lags behind
    assert differences(average.average.module.state_dict(), model().state_dict())
    run(tmp_path / "run.pt", stop=4)
    resumed, again = run(tmp_path / "run.pt")
    assert differences(resumed.state_dict(), whole.state_dict()) == []
    assert differences(again.state_dict(), average.state_dict()) == []


def test_a_teacher_and_a_discretiser_go_where_the_model_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, discretise = BertTeacher(bert(), vocab_size=WORDS), torch.nn.Identity().eval()
    moved = []
    for module in (teacher, discretise):
        monkeypatch.setattr(module, "to", lambda device, module=module: moved.append((module, device)))
    soft = vilta(Frozen(teacher))
    seen = replace(villa({"image": 0.1}), perturber=DiscretePerturber(discretise, image=Ascent(L2(0.1), step_size=0.1)))
    options = OptimizerOptions(epochs=1, batch_size=4, learning_rate=0.01)
    fit(model(), source(), options=options, seed=0, updates=1, method={"mlm": soft, "itm": seen})
    assert moved == [(teacher, torch.device("cpu")), (discretise, torch.device("cpu"))]


def test_methods_for_tasks_leave_no_other_choice_of_tasks() -> None:
    options = OptimizerOptions(epochs=1, batch_size=4, learning_rate=0.01)
    with pytest.raises(ConfigurationError, match="adversarial_tasks=None"):
        fit(model(), source(), options=options, seed=0, method={"mlm": villa()}, adversarial_tasks=("mlm",))
    for wrong in ({"mlm": 3}, {3: villa()}):
        with pytest.raises(ConfigurationError, match="one for each task by name"):
            fit(model(), source(), options=options, seed=0, method=wrong)  # type: ignore[arg-type]
