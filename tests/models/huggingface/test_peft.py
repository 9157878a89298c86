"""Models that PEFT has changed: the sites of the model itself, and predictions where it gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.hf_families import CLASSES, FAMILIES, WORDS, Fields, classed, next_words, words
from torch.nn import functional as F

from advvl import L2, PGD, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeLB, SymmetricKL, adapt
from advvl.errors import SiteError
from advvl.runtime.names import find

pytestmark = [
    pytest.mark.slow,
    # peft 0.21 asks for what transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)).double().eval()


def bert() -> Any:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**WORDS, **CLASSES)).double().eval()


def t5() -> Any:
    return next(family for family in FAMILIES if family.name == "T5").model()


def llava() -> Any:
    return next(family for family in FAMILIES if family.name == "LLaVA").model()


def llava_batch() -> Fields:
    return next(family for family in FAMILIES if family.name == "LLaVA").fields()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)


Case = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Fields]]

CHANGED: dict[str, Case] = {
    "LoRA": (llama, lora, next_words),
    "LoRA on the embedding": (llama, lambda: lora(target_modules=["embed_tokens", "q_proj"]), next_words),
    "DoRA on the embedding": (llama, lambda: lora(target_modules=["embed_tokens"], use_dora=True), next_words),
    "modules_to_save": (llama, lambda: lora(modules_to_save=["embed_tokens", "lm_head"]), next_words),
    "trainable_token_indices": (llama, lambda: lora(trainable_token_indices=[3, 5]), next_words),
    "trainable tokens": (llama, lambda: peft.TrainableTokensConfig(token_indices=[3, 5]), next_words),
    "LoRA of an encoder": (
        bert,
        lambda: lora(target_modules=["query", "word_embeddings"], task_type="SEQ_CLS"),
        classed,
    ),
    "LoRA of T5": (t5, lambda: lora(target_modules=["q"], task_type="SEQ_2_SEQ_LM"), next_words),
    "LoRA of LLaVA": (
        llava,
        lambda: lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["multi_modal_projector"]),
        llava_batch,
    ),
}
PROMPTED: dict[str, Case] = {
    "prompt tuning": (
        llama,
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        next_words,
    ),
    "P-tuning": (
        llama,
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        next_words,
    ),
    "prefix tuning": (
        llama,
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        next_words,
    ),
    "prompt tuning of an encoder": (
        bert,
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
        classed,
    ),
    "prompt tuning of T5": (
        t5,
        lambda: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3),
        next_words,
    ),
}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "config", "batch"), list(cases.values()), ids=list(cases))


def modules(target: Any) -> dict[str, str]:
    return {modality: site.module for modality, site in target.sites.items()}


def changed(make: Callable[[], Any], config: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(make(), config).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_embedding_B" in name or "lora_B" in name:  # zero, so that they would change nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@each(CHANGED | PROMPTED)
def test_the_sites_are_those_of_the_model_itself(make: Any, config: Any, batch: Any) -> None:
    expected = modules(adapt(make()))
    model, fields = changed(make, config()), batch()
    target = adapt(model)
    assert modules(target) == expected
    clean = model(**fields).loss
    for modality in expected:
        perturber = EmbeddingPerturber(**{modality: Ascent(L2(0.5), step_size=0.2)})
        result = Attack(perturber, PGD(3))(target, fields)
        with torch.no_grad(), target.inject(result.deltas):
            assert model(**fields).loss > clean
        if modality == "text" and "attention_mask" in fields:
            assert not result.deltas["text"][~fields["attention_mask"].bool()].any()
    report = AdversarialTraining(
        EmbeddingPerturber(**dict.fromkeys(expected, Ascent(L2(), step_size=0.2))), FreeLB(2), SymmetricKL()
    ).step(target, fields)
    assert report.regularization > 0
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in learning)


@each({name: case for name, case in CHANGED.items() if "LLaVA" not in name and "T5" not in name})
def test_the_whole_wrapped_embedding_is_perturbed(make: Any, config: Any, batch: Any) -> None:
    """A perturbation is what `inputs_embeds` would be given: beside what PEFT adds to the embedding, not under it."""
    model, fields = changed(make, config()), batch()
    target = adapt(model)
    inner = find(model, target.sites["text"].module)
    delta = torch.randn(*fields["input_ids"].shape, 16, dtype=torch.float64)
    with torch.no_grad():
        with target.inject({"text": delta}):
            found = model(**fields).loss
        ids = fields.pop("input_ids")
        expected = model(**fields, inputs_embeds=inner(ids) + delta).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@each({name: PROMPTED[name] for name in ("prompt tuning", "P-tuning", "prefix tuning")})
def test_predictions_count_after_the_prompts(make: Any, config: Any, batch: Any) -> None:
    """Those that the model's own loss is of."""
    model, fields = changed(make, config()), batch()
    target = adapt(model)
    outputs = target.forward(fields)
    logits, counts = target.logits(outputs), target.positions(fields)
    prompts = logits.shape[1] - fields["input_ids"].shape[1]
    assert prompts == (0 if "Prefix" in type(config()).__name__ else 3)
    labels = fields["labels"][:, 0 if prompts else 1 :]  # the last prompt predicts the first word
    expected = F.cross_entropy(logits[counts], labels[labels != -100])
    torch.testing.assert_close(expected.float(), outputs.loss.float(), rtol=1e-5, atol=0)
    assert torch.equal(target.positions(words()), counts)


def test_a_model_that_embeds_its_words_twice_is_refused() -> None:
    model = changed(llava, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    perturber = EmbeddingPerturber(text=Ascent(L2(0.5), step_size=0.2))
    with pytest.raises(SiteError, match="to fire once in a forward, got 2 times; say which time counts"):
        Attack(perturber, PGD(1))(adapt(model), llava_batch())
