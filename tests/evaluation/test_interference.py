"""Modality interference, on models that need one modality, both, or none of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advvl import L2, Adapter, Site
from advvl.errors import ConfigurationError, DataError, SiteError
from advvl.evaluation.interference import modality_interference


class Weighted(nn.Module):
    """The logits of the text and of the image, each times its weight."""

    def __init__(self, text: float, image: float) -> None:
        super().__init__()
        self.words, self.regions, self.weights = nn.Identity(), nn.Identity(), (text, image)

    def forward(self, text: Tensor, image: Tensor, targets: Tensor) -> Tensor:
        text, image = self.words(text).mean(1), self.regions(image).mean(1)
        return self.weights[0] * text + self.weights[1] * image


def target(text: float, image: float) -> Adapter:
    return Adapter(Weighted(text, image).eval(), {"text": Site("words"), "image": Site("regions")})


def batch(count: int = 6) -> dict[str, Tensor]:
    """Each example's text and image say its class, and its neighbours are of other classes."""
    classes = torch.arange(count) % 3
    of_class = nn.functional.one_hot(classes, 3).double()
    return {"text": of_class[:, None].repeat(1, 2, 1), "image": of_class[:, None].repeat(1, 4, 1), "targets": classes}


@pytest.mark.parametrize(
    ("weights", "other_text", "other_image"),
    [((1, 0), 0.0, 1.0), ((0, 1), 1.0, 0.0), ((2, 1), 0.0, 1.0)],
    ids=["text alone", "image alone", "text first"],
)
def test_only_what_the_model_goes_by_takes_its_score_away(
    weights: tuple[float, float], other_text: float, other_image: float
) -> None:
    found = modality_interference(target(*weights), [batch(), batch(3)])
    means = {name: scores.mean().item() for name, scores in found.scores.items()}
    assert means == {"clean": 1.0, "other text": other_text, "other image": other_image}
    assert all(len(scores) == 9 for scores in found.scores.values())


def test_a_budget_attacks_its_modality_and_intervals_hold_the_estimate() -> None:
    found = modality_interference(target(2, 1), [batch()], modalities=("image",), budget={"image": L2(0.1)})
    assert set(found.scores) == {"clean", "other image", "perturbed image"}
    assert found.scores["perturbed image"].tolist() == [1.0] * 6
    assert "perturbed image          100.0 % [61.0, 100.0]" in str(found)
    for interval in found.accuracy().values():
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


def test_the_order_of_the_data_changes_nothing() -> None:
    given = batch(6)
    order = given["targets"].argsort(stable=True)
    for rows in (torch.arange(6), order):
        found = modality_interference(target(1, 0), [{name: field[rows] for name, field in given.items()}])
        assert found.scores["other text"].tolist() == [0.0] * 6


def test_examples_of_one_target_are_replaced_by_each_other() -> None:
    given = batch(4) | {"targets": torch.zeros(4, dtype=torch.long)}
    found = modality_interference(target(1, 0), [given])
    assert found.scores["clean"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert found.scores["other text"].tolist() == [1.0, 1.0, 0.0, 0.0]


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


def test_flags_of_the_attacks_are_kept() -> None:
    fake = target(0, 1)
    fake.model.regions.register_forward_hook(lambda module, inputs, output: _Hidden.apply(output))
    found = modality_interference(fake, [batch()], budget={"image": L2(0.1)})
    assert "gradients not finite" in {flag.name for flag in found.flags}
    assert "gradients not finite: " in str(found)


@pytest.mark.parametrize(
    ("loader", "options", "error", "words"),
    [
        ([batch(1)], {}, DataError, "two examples or more in a batch"),
        ([], {}, DataError, "one example or more"),
        (5, {}, DataError, "an iterable of batches"),
        ([batch()], {"modalities": ("audio",)}, SiteError, "'audio'"),
        ([batch()], {"modalities": ()}, ConfigurationError, "one modality to replace or more"),
        ([batch()], {"seed": "a"}, ConfigurationError, "seed"),
    ],
    ids=["a batch of one", "no batch", "no loader", "modality", "no modality", "seed"],
)
def test_what_makes_no_sense_is_refused(
    loader: Any, options: Mapping[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        modality_interference(target(1, 1), loader, **options)


def test_a_model_in_training_mode_is_refused() -> None:
    adapter = target(1, 1)
    adapter.model.train()
    with pytest.raises(ConfigurationError, match="eval mode"):
        modality_interference(adapter, [batch()])
