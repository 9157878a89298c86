"""NLVR2, VCR and visual entailment: the fields they take, and those they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.task_batches import batch_of, model_of
from torch import Tensor
from torch.nn import functional as F

from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.nlvr2 import UniterForNLVR2
from advvl.tasks.uniter.vcr import VCR_WORDS, UniterForVCR
from advvl.tasks.uniter.ve import VE_LABELS, UniterForVE


@pytest.mark.parametrize("task", ["nlvr2-paired-attn", "nlvr2-paired", "nlvr2-triplet", "vcr"])
def test_a_loss_is_the_cross_entropy_of_each_example(task: str) -> None:
    model, batch = model_of(task).eval(), batch_of(task)
    output = model(**batch)
    targets = batch.pop("targets").flatten()
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, targets, reduction="none"))
    without = model(**batch)
    assert without.loss is None
    assert torch.equal(without.logits, output.logits)


@pytest.mark.parametrize("task", ["nlvr2-paired-attn", "nlvr2-paired"])
def test_sentences_know_nothing_of_each_other_and_left_is_not_right(task: str) -> None:
    model, batch = model_of(task).eval(), batch_of(task)
    batch.pop("targets")
    expected = model(**batch).logits

    def rows(order: list[int]) -> Tensor:
        taken = {n: t if n == "position_ids" else t[order] for n, t in batch.items()}
        logits: Tensor = model(**taken).logits
        return logits

    torch.testing.assert_close(rows([4, 5, 0, 1, 2, 3]), expected[[2, 0, 1]], rtol=1e-10, atol=1e-12)
    assert (rows([1, 0, 2, 3, 4, 5])[0] - expected[0]).abs().max() > 1e-4


def test_an_odd_number_of_rows_is_no_pairs() -> None:
    batch = {n: t if n in ("position_ids", "targets") else t[:5] for n, t in batch_of("nlvr2-paired").items()}
    with pytest.raises(ShapeError, match=r"two rows for each sentence.*got 5 rows.*variant=\"triplet\""):
        model_of("nlvr2-paired")(**batch)


@pytest.mark.parametrize("variant", ["triplets", None, 2, "paired_attn"])
def test_a_variant_is_one_of_three(variant: Any) -> None:
    with pytest.raises(ConfigurationError, match="paired-attn, paired, triplet, got"):
        UniterForNLVR2(UniterConfig.tiny(), variant=variant)


@pytest.mark.parametrize(
    ("task", "targets", "error", "said"),
    [
        ("nlvr2-paired", torch.tensor([1, 0, 1, 0, 1, 0]), ShapeError, r"\(B,\) = \(3,\).*got \(6,\)"),
        ("nlvr2-paired", torch.tensor([1, 0, 2]), DataError, r"in 0\.\.1, got \[2\]"),
        ("vcr", torch.tensor([0.0, 1, 0, 0]), DataError, "whole numbers"),
        ("vcr", torch.tensor([[0, 1], [0, 0]]), ShapeError, r"got \(2, 2\)"),
        ("vcr", torch.tensor([3]), ShapeError, r"\(4,\)"),
        ("ve", torch.tensor([0, 1, 2, 0]), ShapeError, "expected targets"),
    ],
)
def test_targets_that_do_not_fit_are_refused(task: str, targets: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        model_of(task)(**batch_of(task) | {"targets": targets})


def test_new_types_and_words_of_vcr_count() -> None:
    model, batch = model_of("vcr").eval(), batch_of("vcr")
    assert isinstance(model, UniterForVCR)
    expected = model(**batch).logits
    plain = {name: value for name, value in batch.items() if name != "txt_type_ids"}
    assert (model(**plain).logits - expected).abs().max() > 1e-4
    words = batch["input_ids"].clone()
    words[:, 2] = model.config.vocab_size - VCR_WORDS
    assert (model(**batch | {"input_ids": words}).logits - expected).abs().max() > 1e-4


def test_entailment_is_vqa_with_three_answers() -> None:
    model, batch = model_of("ve").eval(), batch_of("ve")
    assert isinstance(model, UniterForVE)
    output = model(**batch)
    assert output.logits.shape == output.losses.shape == (4, len(VE_LABELS))
    torch.testing.assert_close(output.loss.mean(), 3 * output.losses.mean())
