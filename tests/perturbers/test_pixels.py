"""A perturbation of normalised pixels is the one of the pixels behind them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.draws import randn
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    EmbeddingPerturber,
    FreeAT,
    Given,
    InnerMaximizer,
    Linf,
    Momentum,
    Normalised,
    Uniform,
    UniversalPerturber,
    adapt,
)
from advvl.errors import ConfigurationError

MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)
NORMALISED = Normalised(MEAN, STD)


class Pictures(nn.Module):
    """Class scores of pictures `(B, 3, 4, 4)`, raw ones normalised inside it."""

    def __init__(self, *, raw: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.raw, self.site, self.head = raw, nn.Identity(), nn.Linear(48, 3)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.site(pixels)
        x = normalise(x) if self.raw else x
        logits = self.head(x.sin().flatten(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def normalise(pixels: Tensor) -> Tensor:
    return (pixels - column(MEAN)) / column(STD)


def pictures(*, raw: bool) -> tuple[Adapter, dict[str, Tensor]]:
    pixels = randn(5, 3, 4, 4).sigmoid()
    pixels[0, 0], pixels[1, 1] = 0.0, 1.0  # at the edges of the box
    batch = {"pixels": pixels if raw else normalise(pixels), "labels": torch.arange(5) % 3}
    return adapt(Pictures(raw=raw).double(), {"image": "site"}), batch


def both(maximizer: InnerMaximizer, ball: Any, perturber: Any = EmbeddingPerturber, **options: Any) -> list[Tensor]:
    """The perturbations in pixels that an attack finds on normalised pixels and on raw ones."""
    found = []
    for raw in (False, True):
        ascent = Ascent(ball, box=(0, 1), pixels=None if raw else NORMALISED, **options)
        result = Attack(perturber(image=ascent), maximizer)(*pictures(raw=raw))
        found.append(result.deltas["image"] * (1 if raw else column(STD)))
    return found


@pytest.mark.parametrize("perturber", [EmbeddingPerturber, UniversalPerturber])
@pytest.mark.parametrize("start", [0.0, 0.05])
@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5), Linf(0.1, relative=True)], ids=repr)
def test_normalised_pixels_are_attacked_as_raw_ones(ball: Any, start: float, perturber: Any) -> None:
    if perturber is UniversalPerturber and ball.relative:
        pytest.skip("a universal perturbation has no sample to be relative to")
    options = {"start": Uniform(start)} if start else {}
    found, expected = both(PGD(4), ball, perturber, step_size=0.02, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 0.01


def test_a_rule_with_a_state_follows_the_pixels() -> None:
    found, expected = both(PGD(4), Linf(0.1), step_size=0.02, rule=Momentum(0.9))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_start_that_is_given_is_in_the_units_of_the_tensor() -> None:
    start = randn(5, 3, 4, 4, seed=3) * 1e-3
    ascent = Ascent(L2(5.0), step_size=5.0, pixels=NORMALISED)
    place = advvl_place(normalise(randn(5, 3, 4, 4).sigmoid()))
    torch.testing.assert_close(ascent.begin(Given(start), place, None), start, rtol=1e-12, atol=0)


def advvl_place(x: Tensor) -> Any:
    from advvl import Place

    return Place(x)


def test_what_free_training_carries_and_reports_is_the_same_in_both() -> None:
    found = []
    for raw in (False, True):
        target, batch = pictures(raw=raw)
        ascent = Ascent(Linf(0.05), step_size=0.05, rule="sign", box=(0, 1), pixels=None if raw else NORMALISED)
        method = AdversarialTraining(EmbeddingPerturber(image=ascent), FreeAT(2, carry=True))
        optimizer, state = torch.optim.SGD(target.model.parameters(), lr=0.1), AscentState()

        def update(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(2):
            report = method.step(target, batch, update=update, state=state)
        found.append((report.delta_norms["image"], state.deltas["image"] * (1 if raw else column(STD))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_pixels_outside_the_box_are_refused_in_their_own_units() -> None:
    target, batch = pictures(raw=False)
    attack = Attack(EmbeddingPerturber(image=Ascent(Linf(0.1), step_size=0.1, box=(0, 0.5), pixels=NORMALISED)), PGD(1))
    with pytest.raises(ConfigurationError, match="inside its box"):
        attack(target, batch)


def test_a_processor_gives_its_normalisation() -> None:
    inner = SimpleNamespace(image_mean=list(MEAN), image_std=list(STD))
    assert Normalised.of(inner) == Normalised.of(SimpleNamespace(image_processor=inner)) == NORMALISED
    with pytest.raises(ConfigurationError, match="processor with image_mean"):
        Normalised.of(object())


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.1, 0.2)), ((), ()), ((0.5,), (0.0,)), ((0.5,), (float("nan"),)), (0.5, 0.1), ("a", "b")],
)
def test_what_is_no_normalisation_is_refused(mean: Any, std: Any) -> None:
    with pytest.raises(ConfigurationError, match="for each channel"):
        Normalised(mean, std)


def test_a_tensor_of_other_channels_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected 3 channels in axis 1 .*got \(2, 4, 3\)"):
        NORMALISED.pixels(torch.zeros(2, 4, 3))


@pytest.mark.parametrize("given", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_a_processor_that_does_something_else_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="rescales pixels by 1/255"):
        Normalised.of(SimpleNamespace(image_mean=list(MEAN), image_std=list(STD), **given))


def test_channels_of_several_images_want_their_axis() -> None:
    images = torch.zeros(2, 3, 3, 4, 4)
    with pytest.raises(ConfigurationError, match="give axis"):
        NORMALISED.pixels(images)
    assert Normalised(MEAN, STD, axis=2).pixels(images)[0, 0, :, 0, 0].tolist() == pytest.approx(MEAN)
