"""Examples as people look at them: pictures, regions, heat; and the attack that is made once more to see where it hits."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib import image
from support.toy import toy, toy_batch

from advvl import L2, PGD, Linf
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.examples import Example, grid, picture_bytes, position_norms
from advvl.evaluation.hits import hit
from advvl.evaluation.named_attacks import NamedAttack, first_clean

SAID = {"before": "yes", "after": "no"}


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (4, 3, 1)], ids=str)
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_an_array_becomes_a_png_of_its_pixels(shape: tuple[int, ...], kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    given = pixels if kind == "uint8" else torch.from_numpy(pixels / 255)
    media, data = picture_bytes(given)
    assert media == "image/png"
    read = np.round(255 * image.imread(io.BytesIO(data), format="png")).astype(np.uint8)
    assert np.array_equal(read, pixels[..., 0] if shape[2:] == (1,) else pixels)


def test_bytes_of_a_picture_stay_as_they_are() -> None:
    jpeg = b"\xff\xd8\xff\xe0 and so on"
    assert picture_bytes(jpeg) == ("image/jpeg", jpeg)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"<svg/>", "bytes of a PNG or JPEG"),
        (np.zeros((3, 4, 5), np.uint8), r"\(H, W\) or \(H, W, 3\), got \(3, 4, 5\)"),
        (np.zeros((0, 4), np.uint8), "expected a picture"),
        (np.full((2, 2), 1.5), r"floats in \[0, 1\], got 1.5 to 1.5"),
        (np.full((2, 2), np.nan), r"floats in \[0, 1\]"),
        (np.zeros((2, 2), np.int64), "uint8 or of floats"),
    ],
)
def test_what_is_no_picture_is_refused(given: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        picture_bytes(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"words": ["a", "b"], "word_heat": [1.0]}, "a heat for each of 2 words, got 1"),
        ({"regions": grid(1, 2), "region_heat": [1.0]}, "a heat for each of 2 regions"),
        ({"words": ["a"], "word_heat": [-1.0]}, "finite heats of 0 or more"),
        ({"words": ["a"], "word_heat": [float("nan")]}, "finite heats"),
        ({"regions": [(0.5, 0.0, 0.2, 1.0)]}, "left, top, right, bottom"),
        ({"regions": [(0, 0, 32, 32)]}, r"in \[0, 1\].*divide by the size"),
    ],
)
def test_an_example_that_cannot_be_drawn_is_refused(given: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Example(**given, **SAID)


def test_the_regions_of_a_grid_are_row_by_row() -> None:
    assert grid(1, 2) == ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
    assert grid(2, 1)[1] == (0, 0.5, 1, 1)


def test_the_norm_of_a_position_is_over_features_and_that_of_a_pixel_over_channels() -> None:
    delta = torch.randn(2, 3, 4, dtype=torch.float32)
    torch.testing.assert_close(position_norms(delta), delta.double().norm(dim=2))
    pixels = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(position_norms(pixels), pixels.double().norm(dim=1))


def one_example() -> dict[str, torch.Tensor]:
    return {name: value[1:2] for name, value in toy_batch(seed=4).items()}


def attacked(**changes) -> tuple[dict[str, torch.Tensor], object]:
    model = toy(seed=1)
    model.model.eval()
    batch = one_example()
    with torch.no_grad():
        batch["labels"] = model.logits(model.forward(batch)).argmax(1)
    attack = NamedAttack(**{"name": "pgd", "maximizer": PGD(10), "restarts": 2, **changes})
    return batch, hit(model, batch, {"text": L2(8.0), "image": L2(8.0)}, attack, targets=lambda batch: batch["labels"])


def test_a_hit_says_the_answers_and_where_the_perturbation_is() -> None:
    batch, found = attacked()
    assert found.before.argmax() == batch["labels"][0]
    assert found.after.argmax() != batch["labels"][0]
    assert found.taken
    for modality, mask in (("text", batch["mask"]), ("image", batch["region_mask"])):
        assert found.heat[modality].shape == mask.shape
        assert (found.heat[modality] > 0).equal(mask)  # zero at masked positions alone
        assert float(found.heat[modality].norm()) <= 8.0 * (1 + 1e-12)


def test_an_attack_that_fails_is_made_with_further_starts_until_one_takes_the_example() -> None:
    seen = []

    def start(restart, ball):
        seen.append(restart)
        return first_clean(restart, ball)

    attacked(start=start)
    assert set(seen) == {0, 1}
    seen.clear()
    model = toy(seed=1)
    model.model.eval()
    attack = NamedAttack(name="pgd", maximizer=PGD(2), restarts=1, start=start)
    batch = one_example()
    with torch.no_grad():
        batch["labels"] = model.logits(model.forward(batch)).argmax(1)
    found = hit(model, batch, {"text": Linf(1e-9)}, attack, targets=lambda batch: batch["labels"], tries=3)
    assert set(seen) == {0, 1, 2, 3}
    assert not found.taken
    assert found.before.argmax() == found.after.argmax()
    assert float(found.heat["text"].max()) > 0


@pytest.mark.parametrize("trains", ["model", "surrogate"])
def test_a_model_in_training_mode_is_refused(trains: str) -> None:
    models = {"model": toy(), "surrogate": toy()}
    for name, adapter in models.items():
        adapter.model.train(name == trains)
    attack = NamedAttack(name="pgd", maximizer=PGD(2), surrogate=models["surrogate"])
    with pytest.raises(ConfigurationError, match="expected a model in eval mode"):
        hit(models["model"], one_example(), {"text": L2(1.0)}, attack, targets=lambda batch: batch["labels"])


def test_a_batch_of_several_examples_is_refused() -> None:
    model = toy()
    model.model.eval()
    with pytest.raises(DataError, match="a batch of one example, got 3"):
        hit(
            model,
            toy_batch(),
            {"text": L2(1.0)},
            NamedAttack(name="pgd", maximizer=PGD(2)),
            targets=lambda batch: batch["labels"],
        )
