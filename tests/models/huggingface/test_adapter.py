"""Models of transformers: where each is perturbed, that its masks are the true ones, and what its outputs are taken for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from support.hf_families import (
    BART,
    ENDS,
    FAMILIES,
    GPT2,
    IMAGE,
    PATCHES,
    WORDS,
    Family,
    Fields,
    chosen,
    classed,
    masked_words,
    next_words,
    pictures,
    words,
)
from support.hf_found import CHECKS, PAGE, Seen, failure, seen, with_table
from support.wrappers import Wrapper
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    PassTrace,
    Site,
    SymmetricKL,
    adapt,
    villa,
)
from advvl.errors import ConfigurationError, DataError, SiteError
from advvl.models.huggingface import fields

pytestmark = pytest.mark.slow


def families(*, which: Callable[[Family], object] = lambda family: True) -> pytest.MarkDecorator:
    """Run over those that are meant."""
    chosen = [pytest.param(i, id=f"{f.name}-{i}") for i, f in enumerate(FAMILIES) if which(f)]
    return pytest.mark.parametrize("index", chosen)


@functools.cache
def found(index: int) -> tuple[Adapter, Fields, dict[str, Seen]]:
    """A family's model with its sites; tests leave it as it is."""
    family = FAMILIES[index]
    target, batch = family.adapter(), family.fields()
    return target, batch, seen(target, batch)


def outcome(target: Adapter, batch: Fields, deltas: dict[str, Tensor], *, logits: bool = True) -> list[Tensor]:
    """The loss, and the logits that count."""
    with torch.no_grad(), target.inject(deltas):
        outputs = target.forward(batch)
    loss = target.loss(outputs, batch)
    if not logits:
        return [loss]
    predicted, counts = target.logits(outputs), target.positions(batch)
    return [loss, predicted if counts is None else predicted[counts]]


# --- every family ---


@pytest.mark.slow
@families()
@pytest.mark.parametrize("check", CHECKS)
def test_a_family_works(check: str, index: int) -> None:
    if (error := failure(check, index)) is not None:
        raise error


@families()
def test_what_the_mask_leaves_out_does_not_matter(index: int) -> None:
    target, batch, sites = found(index)
    logits, leaks = FAMILIES[index].logits, FAMILIES[index].leaks
    clean = outcome(target, batch, {}, logits=logits)
    for modality, site in sites.items():
        if modality in leaks:
            assert site.gradient[~site.mask].any(), "it no longer leaks; take back what is said of it"
            continue
        beyond = outcome(target, batch, {modality: torch.where(site.mask, 0.0, 100.0).double()}, logits=logits)
        for ours, expected in zip(beyond, clean, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        assert not site.gradient[~site.mask].any()


@families()
def test_every_position_in_the_mask_matters(index: int) -> None:
    _, batch, sites = found(index)
    idle = FAMILIES[index].idle
    for modality, site in sites.items():
        expected = site.mask if site.mask.ndim == 4 else site.mask.any(-1)
        if modality == "text" and idle is not None:
            expected = expected & ~idle(batch, expected)
        matters = site.gradient != 0 if site.mask.ndim == 4 else site.gradient.any(-1)
        assert torch.equal(matters & expected if modality in FAMILIES[index].leaks else matters, expected), modality
    assert all(site.mask.any() for site in sites.values())


@families(which=lambda family: not family.coupled and (family.logits or family.loss))
def test_a_perturbation_changes_the_predictions_of_its_own_sample_alone(index: int) -> None:
    target, batch, sites = found(index)
    read = target.logits if FAMILIES[index].logits else lambda outputs: target.loss(outputs, batch)
    clean = read(target.forward(batch))
    for modality, site in sites.items():
        for sample in (0, 1):
            own = (site.rows == sample).view(-1, *[1] * (site.mask.ndim - 1))
            with torch.no_grad(), target.inject({modality: torch.randn_like(site.gradient) * (own & site.mask)}):
                moved = read(target.forward(batch))
            torch.testing.assert_close(moved[1 - sample], clean[1 - sample], rtol=1e-10, atol=1e-10)
            assert not torch.allclose(moved[sample], clean[sample])


@families(which=lambda family: family.logits and not family.coupled)
def test_the_predictions_that_count_are_those_of_the_models_own_loss(index: int) -> None:
    target, batch, _ = found(index)
    counts = target.positions(batch)
    outputs = target.forward(batch)
    logits = target.logits(outputs)
    (gradient,) = torch.autograd.grad(target.loss(outputs, batch).sum(), logits)
    assert torch.equal(gradient.any(-1), torch.ones_like(logits[..., 0]).bool() if counts is None else counts)


@families(which=lambda family: family.embeds)
def test_a_perturbation_is_what_inputs_embeds_would_be_given(index: int) -> None:
    target, batch, sites = found(index)
    delta = torch.randn_like(sites["text"].gradient)
    ours = outcome(target, batch, {"text": delta})
    ids = {name: value for name, value in batch.items() if name != "input_ids"}
    embedding = target.model.get_submodule(target.sites["text"].module)
    with torch.no_grad():
        outputs = target.model(**ids, inputs_embeds=embedding(batch["input_ids"]) + delta)
    torch.testing.assert_close(ours[0], outputs.loss, rtol=1e-12, atol=0)
    counts = target.positions(batch)
    expected = outputs.logits if counts is None else outputs.logits[counts]
    torch.testing.assert_close(ours[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_table_of_the_page_is_what_was_found() -> None:
    page = PAGE.read_text()
    assert with_table(page) == page, (
        "what works has changed; run: PYTHONPATH=tests python -m support.hf_found, and look at the difference"
    )


def test_a_family_that_fails_is_marked_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(family: Family) -> None:
        raise AssertionError(family.name)

    monkeypatch.setitem(CHECKS, "attack", fails)
    failure.cache_clear()
    monkeypatch.setattr("support.hf_found.FAMILIES", FAMILIES[:1])
    row = with_table("<!-- table -->\n<!-- end of table -->\n").splitlines()[3]
    assert row.endswith("| `attention_mask` | ✓ | ✗ | ✓ |  |")
    failure.cache_clear()


# --- batches ---


def bert() -> Any:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**WORDS, num_labels=3)).double().eval()


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)).double().eval()


def climb(*modalities: str, size: float = 0.1) -> EmbeddingPerturber:
    return EmbeddingPerturber(**{name: Ascent(L2(1.0), step_size=size) for name in modalities or ("text",)})


@pytest.mark.parametrize("kind", [hf.BatchEncoding, hf.BatchFeature, dict])
def test_a_batch_is_what_a_tokeniser_or_a_processor_gives(kind: Any) -> None:
    report = AdversarialTraining(climb(), FreeLB(2)).step(bert(), kind(classed()))
    expected = AdversarialTraining(climb(), FreeLB(2)).step(bert(), classed())
    assert torch.equal(report.loss, expected.loss)


def test_without_an_attention_mask_all_words_are_real() -> None:
    batch = words()
    batch.pop("attention_mask")
    assert fields.text_mask(batch).all()


def test_padding_on_the_left_does_not_matter_either() -> None:
    target = adapt(llama())
    batch = {name: value.flip(1) for name, value in next_words().items()}
    batch["labels"][1, 2] = -100  # the first word, or padding would have to tell it
    mask = target.sites["text"].mask(batch)
    beyond = torch.where(mask, 0.0, 100.0).unsqueeze(-1).expand(2, 5, 16).double()
    for ours, expected in zip(outcome(target, batch, {"text": beyond}), outcome(target, batch, {}), strict=True):
        assert torch.equal(ours, expected)


def test_inputs_embeds_are_refused_before_the_model_runs() -> None:
    model, batch = bert(), classed()
    batch["inputs_embeds"] = torch.zeros(2, 5, 16)
    batch.pop("input_ids")
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(SiteError, match=r"expected input_ids, which .* embeds, got inputs_embeds, which go round it"):
        AdversarialTraining(climb(), FreeLB(2)).step(model, batch)


def test_a_batch_without_names_is_refused() -> None:
    with pytest.raises(DataError, match="expected a batch as a mapping of the model's fields, got tuple"):
        adapt(bert()).forward((torch.ones(2, 3, dtype=torch.long),))


def test_images_with_differing_numbers_of_tokens_are_refused() -> None:
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE], [IMAGE, 5, 6]])
    with pytest.raises(SiteError, match=r"the same number for each of 3 images, got \[3, 1\] in the samples"):
        fields.image_rows({"input_ids": ids, "pixel_values": torch.zeros(3, 3, 8, 8)}, tokens={IMAGE})


def llava_next_batch(sizes: list[list[int]], lengths: list[int]) -> tuple[Adapter, Fields]:
    """Pictures of these sizes, in two samples with so many of their tokens."""
    index = next(i for i, family in enumerate(FAMILIES) if family.name == "LLaVA-NeXT")
    ids = torch.zeros(2, max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = IMAGE
    return found(index)[0], {"input_ids": ids, "image_sizes": torch.tensor(sizes)}


@pytest.mark.parametrize(
    ("lengths", "samples"),
    [
        # of [8, 16] 4 + 2·5 tokens, of [16, 16] 4 + 4·5, of [2, 16], all but whose whole is cut off, 4
        ([14, 28], [0] * 3 + [1] * 5 + [1] * 3),
        ([38, 4], [0] * 3 + [0] * 5 + [1] * 3),
        ([0, 42], [1] * 11),
        ([42, 0], [0] * 11),
    ],
)
def test_tiles_are_of_the_sample_whose_tokens_they_become(lengths: list[int], samples: list[int]) -> None:
    target, batch = llava_next_batch([[8, 16], [16, 16], [2, 16]], lengths)
    for modality in ("image", "image_tokens"):
        assert target.sites[modality].rows(batch).tolist() == samples


@pytest.mark.parametrize("lengths", [[15, 27], [14, 29]])
def test_tiles_of_half_an_image_are_refused(lengths: list[int]) -> None:
    target, batch = llava_next_batch([[8, 16], [16, 16], [2, 16]], lengths)
    with pytest.raises(
        SiteError, match=r"of whole images, which have \[14, 24, 4\], got \[\d+, \d+\] in the samples; give"
    ):
        target.sites["image"].rows(batch)


def test_features_that_are_cut_off_with_the_padding_of_an_image_stay_zero() -> None:
    """Of an image that is much wider than high nothing is left but the whole of it, made square."""
    family = next(family for family in FAMILIES if family.name == "LLaVA-NeXT")
    target, batch = family.adapter(), family.fields()
    batch["image_sizes"] = torch.tensor([[2, 16], [16, 16], [16, 8]])
    lengths = [4], [4 + 4 * 5, 4 + 4 * 3]
    rows = [[*(word for n in own for word in [*[IMAGE] * n, 5]), 2] for own in lengths]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    batch |= {"input_ids": ids, "attention_mask": (ids > 0).long()}
    batch["labels"] = ids.masked_fill((ids == 0) | (ids == IMAGE), -100)
    mask = target.sites["image_tokens"].mask(batch)
    assert (~mask).nonzero().tolist() == [[tile, patch] for tile in (1, 2) for patch in range(4)]
    site = seen(target, batch)["image_tokens"]
    assert torch.equal(site.gradient.any(-1), mask)


def test_all_tiles_of_a_sample_share_a_ball() -> None:
    index = next(i for i, family in enumerate(FAMILIES) if family.name == "LLaVA-NeXT")
    target, batch, sites = found(index)
    assert sites["image"].rows.tolist() == [0] * 3 + [1] * 5 + [1] * 3
    result = Attack(EmbeddingPerturber(image=Ascent(L2(0.5), step_size=1.0)), PGD(2))(target, batch)
    squares = result.deltas["image"].square().sum((1, 2))
    norms = torch.zeros(2).double().index_add(0, sites["image"].rows, squares).sqrt()
    torch.testing.assert_close(norms, torch.full((2,), 0.5).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{"pixel_values": torch.ones(2, 2, 3, 8, 8)}, {"image_sizes": torch.tensor([[8, 8]] * 2)}],
    ids=["5d", "sizes"],
)
def test_images_cut_in_a_way_that_is_not_known_are_refused(changes: Fields) -> None:
    batch = {"input_ids": torch.tensor([[IMAGE, 5]] * 2), "pixel_values": torch.zeros(2, 3, 8, 8)} | changes
    with pytest.raises(
        SiteError, match=r"\(images, C, H, W\) of images of one size, got .*; say what to perturb yourself"
    ):
        fields.image_rows(batch, tokens={IMAGE})


def test_words_that_a_model_embeds_time_first_are_refused() -> None:
    model = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=32))
    with pytest.raises(
        SiteError, match=r"as \(B, T, D\) .* XLNetLMHeadModel, which embeds words as \(T, B, D\).*; take"
    ):
        adapt(model)


def test_the_best_of_a_question_is_kept_for_all_of_its_choices() -> None:
    def losses(outputs: Any, batch: Fields) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    torch.manual_seed(0)
    target, batch = adapt(hf.BertForMultipleChoice(hf.BertConfig(**WORDS)).double().eval(), loss=losses), chosen()
    result = Attack(climb(size=1.0), PGD(3, keep="best"))(target, batch)
    assert result.losses.shape == (2,)
    assert result.deltas["text"].shape == (4, 5, 16)
    assert (result.losses > losses(target.forward(batch), batch)).all()
    norms = result.deltas["text"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4).double(), rtol=1e-6, atol=0)  # a ball for each choice


def test_images_without_tokens_are_samples() -> None:
    batch = {"input_ids": torch.ones(3, 2, dtype=torch.long), "pixel_values": torch.zeros(3, 3, 8, 8)}
    assert fields.image_rows(batch, tokens={IMAGE}).tolist() == [0, 1, 2]


def test_one_norm_is_taken_over_all_images_of_a_sample() -> None:
    index = next(i for i, family in enumerate(FAMILIES) if family.name == "Qwen2.5-VL")
    target, batch, sites = found(index)
    for modality in ("image", "image_tokens"):
        result = Attack(EmbeddingPerturber(**{modality: Ascent(L2(0.5), step_size=1.0)}), PGD(2))(target, batch)
        squares = result.deltas[modality].square().sum(-1)
        norms = torch.zeros(2).double().index_add(0, sites[modality].rows, squares).sqrt()
        torch.testing.assert_close(norms, torch.full((2,), 0.5).double(), rtol=1e-6, atol=0)


# --- outputs ---


def test_predictions_count_where_a_label_is_and_without_labels_where_a_word_is() -> None:
    causal, masked = adapt(llama()), adapt(hf.BertForMaskedLM(hf.BertConfig(**WORDS)))
    assert causal.positions(next_words()).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert causal.positions(words()).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert masked.positions(masked_words()).int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert masked.positions(words()).int().tolist() == words()["attention_mask"].tolist()
    assert adapt(bert()).positions(classed()) is None
    assert adapt(bert()).positions(words()) is None
    assert causal.positions({"input_ids": words()["input_ids"]}) is None
    assert adapt(bert()).positions(words(labels=torch.rand(2, 3))) is None  # several classes a row


@pytest.mark.parametrize("kind", [hf.GPT2LMHeadModel, hf.BertLMHeadModel, hf.LlamaForCausalLM])
def test_padding_on_the_left_is_not_counted_as_predicting_the_first_word(kind: Any) -> None:
    config = hf.BertConfig(**WORDS, is_decoder=True) if kind is hf.BertLMHeadModel else kind.config_class(**WORDS)
    batch = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    assert adapt(kind(config)).positions(batch).int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0]]


def test_a_decoder_whose_loss_does_not_shift_is_not_shifted() -> None:
    bart = adapt(hf.BartForCausalLM(hf.BartConfig(**BART, **ENDS)))
    assert bart.positions(next_words()).int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert bart.positions(words()).int().tolist() == words()["attention_mask"].tolist()
    masked = llama()
    masked.loss_type = "ForMaskedLM"
    assert adapt(masked).positions(words()).int().tolist() == words()["attention_mask"].tolist()


def git() -> Any:
    return hf.GitForCausalLM(hf.GitConfig(**WORDS, vision_config=PATCHES))


def marian() -> Any:
    return hf.MarianForCausalLM(hf.MarianConfig(**BART, **ENDS))


def llama_with_a_loss_of_its_own() -> Any:
    model = llama()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    return model


@pytest.mark.parametrize("make", [git, marian, llama_with_a_loss_of_its_own])
def test_a_loss_that_is_not_known_says_nothing_of_predictions(make: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"got (Git|Marian|Llama)ForCausalLM, whose own .*; pass positions=…; see"
    ):
        adapt(make()).positions(next_words())
    assert adapt(make(), positions=lambda batch: None).positions(next_words()) is None


def test_a_subclass_shifts_as_the_class_that_it_calls() -> None:
    class Louder(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert adapt(Louder(hf.LlamaConfig(**WORDS))).positions(words()).int().tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0],
    ]


def test_a_regulariser_does_not_see_padding() -> None:
    passes: list[PassTrace] = []
    AdversarialTraining(climb(), FreeLB(2), SymmetricKL(1.0)).step(llama(), next_words(), trace=passes.append)
    clean, last = (passes[i].logits.detach().log_softmax(-1) for i in (0, -1))
    rows = ((clean.exp() - last.exp()) * (clean - last)).sum(-1)
    counts = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    torch.testing.assert_close(passes[-1].regularization.double(), rows[counts].mean(), rtol=1e-5, atol=0)


def logits_of(model: Any, batch: Fields) -> Tensor:
    target = adapt(model.eval())
    return target.logits(target.forward(batch))


def test_logits_are_found_under_the_names_that_models_give_them() -> None:
    pretraining = hf.BertForPreTraining(hf.BertConfig(**WORDS)).eval()
    assert torch.equal(logits_of(pretraining, words()), pretraining(**words()).prediction_logits)
    answering = hf.BertForQuestionAnswering(hf.BertConfig(**WORDS)).eval()
    outputs = answering(**words())
    assert torch.equal(logits_of(answering, words()), torch.stack([outputs.start_logits, outputs.end_logits], 1))
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=PATCHES, projection_dim=16)).eval()
    batch = pictures(**words())
    assert torch.equal(logits_of(clip, batch), clip(**batch).logits_per_image)


@families(which=lambda family: not family.logits)
def test_outputs_without_logits_are_refused(index: int) -> None:
    target, batch, _ = found(index)
    said = r"expected outputs with logits to compare, got \w+( of \[|, whose logits are embeddings .*; pass logits=…)"
    with pytest.raises(ConfigurationError, match=said):
        target.logits(target.forward(batch))


def test_a_model_without_a_head_has_no_logits() -> None:
    with pytest.raises(ConfigurationError, match=r"expected outputs with logits to compare, got BaseModelOutput\w+ of"):
        logits_of(hf.BertModel(hf.BertConfig(**WORDS)), words())


def test_a_contrastive_model_without_return_loss_is_refused() -> None:
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=PATCHES, projection_dim=16))
    with pytest.raises(ConfigurationError, match=r"got CLIPOutput of .* without; give what .*return_loss=True"):
        AdversarialTraining(climb("image"), FreeLB(2)).step(clip, pictures(**words()))


@pytest.mark.parametrize("model", [bert, llama])
def test_a_tuple_is_the_loss_then_the_logits(model: Any) -> None:
    batch = classed() if model is bert else next_words()
    method = AdversarialTraining(climb(), FreeLB(2), SymmetricKL(1.0))
    named, bare = model(), model()
    report, expected = method.step(bare, batch | {"return_dict": False}), method.step(named, batch)
    assert torch.equal(report.loss, expected.loss)
    for ours, theirs in zip(bare.parameters(), named.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    target = adapt(model())
    unlabelled = target.forward({"input_ids": batch["input_ids"], "return_dict": False})
    assert target.logits(unlabelled) is unlabelled[0]


def test_a_loss_of_ones_own_replaces_the_models() -> None:
    def losses(outputs: Any, batch: Fields) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    target, batch = adapt(bert(), loss=losses), classed()
    result = Attack(climb(), PGD(3, keep="best"))(target, batch)
    clean = losses(target.forward(batch), batch)
    assert (result.losses > clean).all()


# --- which models, and wrapped how ---


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_wrapped_model_is_adapted(name: str) -> None:
    report = AdversarialTraining(climb(), FreeLB(2)).step(Wrapper(bert(), name), classed())
    assert torch.equal(report.loss, AdversarialTraining(climb(), FreeLB(2)).step(bert(), classed()).loss)


def test_no_row_is_said_to_be_independent() -> None:
    assert not any(found(index)[0].pure for index in range(len(FAMILIES)))


def test_a_model_that_embeds_neither_words_nor_patches_is_refused() -> None:
    model = hf.Wav2Vec2Model(hf.Wav2Vec2Config(**{k: v for k, v in WORDS.items() if k != "max_position_embeddings"}))
    with pytest.raises(SiteError, match=r"got Wav2Vec2Model; pass sites=…, from those of advvl.sites\(model\)"):
        adapt(model)


def test_of_two_vision_towers_one_has_to_be_named() -> None:
    class Twice(hf.ViTModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.other = hf.ViTModel(config)

    with pytest.raises(
        SiteError, match=r"one vision tower in Twice, got 2, .* embeddings, other.embeddings; say which"
    ):
        adapt(Twice(hf.ViTConfig(**PATCHES)))


class Table(nn.Module):
    """A word embedding that is no nn.Embedding."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.weight = words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LowRank(nn.Module):
    """A word embedding with something of low rank added, as PEFT wraps it."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = words
        self.a = nn.Parameter(torch.randn(words.num_embeddings, 2))
        self.b = nn.Parameter(torch.randn(2, words.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return self.base_layer(ids) + self.a[ids] @ self.b


class Projected(nn.Sequential):
    """A word embedding and a projection."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__(words, nn.Linear(words.embedding_dim, words.embedding_dim))


@families(which=lambda family: "BLIP" not in family.name)
@pytest.mark.parametrize("kind", [Table, LowRank, Projected])
def test_a_word_embedding_of_another_class_is_found(kind: type[nn.Module], index: int) -> None:
    model = FAMILIES[index].model()
    before = {modality: site.module for modality, site in adapt(model).sites.items()}
    if "text" in before:
        where, _, last = before["text"].rpartition(".")
        owner = model.get_submodule(where)
        setattr(owner, last, kind(getattr(owner, last)))
        assert {modality: site.module for modality, site in adapt(model).sites.items()} == before


def test_a_model_whose_embedding_is_no_module_is_refused() -> None:
    sizes = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    model = hf.PerceiverForSequenceClassification(
        hf.PerceiverConfig(**sizes, **heads, vocab_size=60, max_position_embeddings=7)
    )
    with pytest.raises(SiteError, match="expected a model that says where it embeds words or images, got Perceiver"):
        adapt(model)


def test_a_word_embedding_that_was_replaced_after_adapt_is_refused() -> None:
    model = bert()
    target = adapt(model)
    model.resize_token_embeddings(60)
    model.set_input_embeddings(nn.Embedding(60, 16).double())
    with pytest.raises(SiteError, match="no longer holds the Embedding that was adapted; adapt it again"):
        Attack(climb(), PGD(1))(target, classed())


def test_a_model_that_runs_once_for_each_image_takes_a_site_for_each_firing() -> None:
    config = hf.ViltConfig(**WORDS, image_size=8, patch_size=4, num_labels=2, modality_type_vocab_size=3, num_images=2)
    torch.manual_seed(0)
    model = hf.ViltForImagesAndTextClassification(config).eval()
    with pytest.raises(SiteError, match=r"runs its parts once, got ViltForImagesAndText.*; give sites with firing"):
        adapt(model)
    place = "vilt.embeddings.patch_embeddings"
    target = adapt(model, {"first": Site(place, firing=0), "second": Site(place, firing=1)})
    masks = torch.ones(2, 2, 8, 8, dtype=torch.long)
    batch = classed(words) | {"pixel_values": torch.rand(2, 2, 3, 8, 8), "pixel_mask": masks}
    batch["labels"] = torch.tensor([0, 1])
    assert set(Attack(climb("first", "second"), PGD(2))(target, batch).deltas) == {"first", "second"}


def test_sounds_take_the_place_of_words_too() -> None:
    config = hf.LlamaConfig(**WORDS)
    config.audio_token_id, config.video_token_index = 7, 8
    assert fields.placeholders(config) == {7, 8}
    assert fields.text_mask(words(), void={7, 8}).int().tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 0, 0]]


def test_start_and_end_of_a_tuple_are_compared_both() -> None:
    model = hf.BertForQuestionAnswering(hf.BertConfig(**WORDS)).double().eval()
    spans = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])}
    target = adapt(model)
    for batch in (words(), words(**spans)):
        named, bare = target.forward(batch), target.forward(batch | {"return_dict": False})
        assert torch.equal(target.logits(bare), target.logits(named))
        assert target.logits(bare).shape == (2, 2, 5)


# --- hidden layers ---

HIDDEN = [
    pytest.param(bert, "bert.encoder.layer.0", classed, id="BERT"),
    pytest.param(llama, "model.layers.0", next_words, id="Llama"),
    pytest.param(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**PATCHES, num_labels=3)),
        "vit.layers.0",
        lambda: classed(pictures),
        id="ViT",
    ),
    pytest.param(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        "encoder.block.0",
        next_words,
        id="T5, a tuple",
    ),
    pytest.param(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, **ENDS)), "transformer.h.0", next_words, id="GPT-2"),
]


@pytest.mark.parametrize(("make", "module", "batch"), HIDDEN)
def test_a_hidden_layer_is_attacked_and_trained(make: Any, module: str, batch: Any) -> None:
    torch.manual_seed(0)
    model, fields_ = make().eval(), batch()
    mask = (lambda b: b["attention_mask"]) if "attention_mask" in fields_ else None
    target = adapt(model, {"hidden": Site(module, mask=mask)})
    clean = model(**fields_).loss
    result = Attack(climb("hidden"), PGD(3))(target, fields_)
    with target.inject(result.deltas):
        assert model(**fields_).loss > clean
    if mask is not None:
        assert not result.deltas["hidden"][~fields_["attention_mask"].bool()].any()
    AdversarialTraining(climb("hidden"), FreeLB(2), SymmetricKL(1.0)).step(target, fields_)
    assert all(parameter.grad is not None for parameter in model.get_input_embeddings().parameters())


def test_with_sites_of_ones_own_what_is_known_of_the_model_stays() -> None:
    """Else a regulariser would compare a decoder's padding and prompt too."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = hf.LlamaForCausalLM(config).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = torch.randint(3, 20, (2, 5))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    known = adapt(model)
    own = adapt(model, {"text": Site("model.embed_tokens", mask=lambda batch: batch["attention_mask"])})
    found = [villa(step_sizes={"text": 0.5}).step(target, batch).regularization for target in (known, own)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    free = adapt(model, own.sites, positions=lambda batch: None)
    assert villa(step_sizes={"text": 0.5}).step(free, batch).regularization != found[0]
