"""`generate` under a perturbation says what the model says of the perturbed embeddings, with beams and samples as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from advvl import Site, adapt
from advvl.errors import ShapeError

ROWS, LENGTH, WIDTH = 3, 5, 16


def llama() -> Any:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=40, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).double().eval()


def t5() -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    config = T5Config(**sizes, tie_word_embeddings=False, initializer_factor=5.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).double().eval()


def prompts() -> dict[str, torch.Tensor]:
    """Texts of several lengths, padded on the left."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, :2] = 0
    return {"input_ids": torch.randint(3, 40, (ROWS, LENGTH)) * mask, "attention_mask": mask}


def spoken(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """The new words alone; `generate` gives no prompt where it was given embeddings, nor behind an encoder."""
    torch.manual_seed(1)
    said = model.generate(**batch, max_new_tokens=6, **options)
    return said[:, LENGTH if "input_ids" in batch and not model.config.is_encoder_decoder else 0 :].tolist()


@pytest.mark.parametrize(
    ("copies", "options"),
    [
        (1, {"do_sample": False}),
        (3, {"do_sample": False, "num_beams": 3}),
        (4, {"do_sample": False, "num_beams": 4, "num_return_sequences": 2}),
        (2, {"do_sample": True, "num_return_sequences": 2}),
    ],
    ids=["greedy", "beams", "several-beams", "samples"],
)
def test_a_decoder_goes_on_from_the_perturbed_prompt(copies: int, options: dict[str, Any]) -> None:
    model, batch = llama(), prompts()
    target = adapt(model, {"text": Site("model.embed_tokens", firing=0)})
    delta = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    with target.inject({"text": delta.repeat_interleave(copies, 0)}):
        found = spoken(model, batch, **options)
    embedded = {"inputs_embeds": model.model.embed_tokens(batch["input_ids"]) + delta}
    assert found == spoken(model, embedded | {"attention_mask": batch["attention_mask"]}, **options)
    assert found != spoken(model, batch, **options)


def test_an_encoder_runs_before_rows_are_repeated_for_beams() -> None:
    model, batch = t5(), prompts()
    target = adapt(model, {"text": Site("encoder.embed_tokens")})
    delta = 3 * torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    with target.inject({"text": delta}):
        found = spoken(model, batch, num_beams=3)
    embedded = {"inputs_embeds": model.encoder.embed_tokens(batch["input_ids"]) + delta}
    assert found == spoken(model, embedded | {"attention_mask": batch["attention_mask"]}, num_beams=3)
    assert found != spoken(model, batch, num_beams=3)


def test_a_perturbation_that_misses_the_beams_is_refused_with_the_way_out() -> None:
    model, batch = llama(), prompts()
    target = adapt(model, {"text": Site("model.embed_tokens", firing=0)})
    message = r"of shape \(6, 5, 16\), got \(3, 5, 16\); for beams, repeat its rows: delta.repeat_interleave\(2, 0\)"
    with (
        pytest.raises(ShapeError, match=message),
        target.inject({"text": torch.zeros(ROWS, LENGTH, WIDTH, dtype=torch.float64)}),
    ):
        model.generate(**batch, num_beams=2, max_new_tokens=2)
