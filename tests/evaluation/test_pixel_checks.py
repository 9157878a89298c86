"""Checks of pixel attacks: the batch and labels given, the empty batch, and the room for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluation.test_pixels import NORM, case, pgd, target
from torch import Tensor

from advvl import L2, Linf
from advvl.errors import AdvVLError, ConfigurationError, DataError, SiteError
from advvl.evaluation.pixel_checks import verified
from advvl.evaluation.pixels import attack_pixels


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param({"batch": [1]}, DataError, "a batch as a mapping from field to value, got list", id="batch"),
        pytest.param({"labels": [0] * 6}, DataError, r"labels as 6 class ids.*got list", id="list"),
        pytest.param({"labels": torch.eye(4)[[0] * 6]}, DataError, r"got float32 \(6, 4\).*argmax", id="one-hot"),
        pytest.param(
            {"labels": torch.eye(4).long()[[0] * 6]}, DataError, r"got int64 \(6, 4\).*argmax", id="whole one-hot"
        ),
        pytest.param({"labels": torch.zeros(6)}, DataError, r"got float32 \(6,\)", id="float"),
        pytest.param({"labels": torch.zeros(6, dtype=torch.bool)}, DataError, r"got bool \(6,\)", id="bool"),
        pytest.param({"labels": torch.zeros(5, dtype=torch.long)}, DataError, r"got int64 \(5,\)", id="few"),
        pytest.param({"labels": torch.full((6,), -1)}, DataError, "labels of 0 or more, got -1", id="negative"),
        pytest.param({"labels": torch.full((6,), 4)}, DataError, "labels below 4, .* got 4; number", id="beyond"),
        pytest.param({"pixels": (0.5, 0.5)}, ConfigurationError, r"pixels as Normalised\(mean, std\)", id="normalised"),
        pytest.param({"modality": "audio"}, SiteError, "got 'audio'", id="modality"),
    ],
)
def test_what_is_no_batch_of_pixels_with_labels_is_refused(
    changed: dict[str, Any], error: type[AdvVLError], message: str
) -> None:
    model, batch, labels = case()
    given: dict[str, Any] = {"batch": batch, "labels": labels, "ball": Linf(0.1), "pixels": NORM} | changed
    with pytest.raises(error, match=message):
        attack_pixels(pgd, target(model), **given)


def test_labels_beyond_the_answers_are_refused_of_an_attack_that_never_runs_the_model() -> None:
    model, batch, labels = case()
    with pytest.raises(DataError, match="labels below 4"):
        attack_pixels(lambda _: lambda x, y: x, target(model), batch, labels + 9, Linf(0.1), pixels=NORM)


def test_whole_numbers_as_pixels_are_refused() -> None:
    model, batch, labels = case()
    whole = batch | {"pixel_values": torch.ones(6, 3, 8, 8, dtype=torch.uint8)}
    with pytest.raises(DataError, match=r"floating-point numbers.*got uint8 \(6, 3, 8, 8\).*divide"):
        attack_pixels(pgd, target(model), whole, labels, Linf(0.1))


def test_pixels_that_are_not_finite_are_refused() -> None:
    model, batch, labels = case()
    broken = batch["pixel_values"].clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="finite pixels in 'pixel_values'"):
        attack_pixels(pgd, target(model), batch | {"pixel_values": broken}, labels, Linf(0.1), pixels=NORM)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_empty_batch_has_an_empty_result(one_by_one: bool) -> None:
    model, batch, labels = case()
    none = {name: value[:0] for name, value in batch.items()}
    result = attack_pixels(pgd, target(model), none, labels[:0], Linf(0.1), pixels=NORM, one_by_one=one_by_one)
    assert result.deltas["image"].shape == (0, 3, 8, 8)
    assert result.correct is not None
    assert result.correct.shape == (0,)


def off_by(far: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Images that are grey, and the same one step further at each pixel."""
    clean = torch.full((2, 3, 16, 16), 0.25, dtype=dtype)
    return [clean + far], clean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_room_for_rounding_does_not_grow_with_the_pixels_of_a_linf_ball(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    with pytest.raises(ConfigurationError, match="got a norm of"):
        verified(*off_by(4 * eps, dtype), Linf(2 * eps), "")
    assert (verified(*off_by(2.5 * eps, dtype), Linf(2 * eps), "") == 2 * eps).all()


def test_the_room_for_rounding_grows_with_the_pixels_of_an_l2_ball() -> None:
    eps, pixels = torch.finfo(torch.bfloat16).eps, 3 * 16 * 16
    found, clean = off_by(2.5 * eps, torch.bfloat16)
    assert verified(found, clean, L2(2 * eps * pixels**0.5), "").any()
    with pytest.raises(ConfigurationError, match="got a norm of"):
        verified(found, clean, L2(eps * pixels**0.5), "")
