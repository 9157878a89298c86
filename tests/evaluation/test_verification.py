"""Lengths of perturbations, example by example, and what a model was before an attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch
from torch import Tensor

from advvl import L2, Ascent, Ball, Linf
from advvl.errors import ConfigurationError
from advvl.evaluation.verification import Untouched, length, verify
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.places import Place
from advvl.runtime.states import kept_weights

DELTA = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)
X = torch.full_like(DELTA, 2.0)
PACKED = DELTA.flatten(0, 1)


def place(x: Tensor = X, **options: Any) -> Place:
    return Place(x, **{name: torch.tensor(value) for name, value in options.items()})


LENGTHS: dict[str, tuple[Ball, Place, Tensor, list[float]]] = {
    "L2 per sample": (L2(1.0), place(), DELTA, [26**0.5, 2.0]),
    "L2 per token: the longest": (L2(1.0, per="token"), place(), DELTA, [5.0, 2.0]),
    "Linf": (Linf(1.0), place(), DELTA, [4.0, 2.0]),
    "masked": (L2(1.0), place(mask=[[False, True], [True, False]]), DELTA, [1.0, 0.0]),
    "packed": (L2(1.0), place(PACKED.abs(), segments=[1, 0, 1, 1]), PACKED, [1.0, 29**0.5]),
    "packed, per token": (L2(1.0, per="token"), place(PACKED.abs(), segments=[1, 0, 1, 1]), PACKED, [1.0, 5.0]),
    "packed, an example without rows": (L2(1.0), place(PACKED, segments=[0, 0, 0, 0]), PACKED, [30**0.5, 0.0]),
    "several rows per example": (L2(1.0, per="token"), place(PACKED, examples=[0, 0, 0, 1]), PACKED, [5.0, 2.0]),
    "relative to each row": (L2(1.0, relative="row"), place(), DELTA, [26**0.5 / 8**0.5, 2.0 / 8**0.5]),
    "relative, per token": (L2(1.0, per="token", relative=True), place(), DELTA, [5.0 / 8**0.5, 2.0 / 8**0.5]),
}


@pytest.mark.parametrize(("ball", "where", "delta", "expected"), LENGTHS.values(), ids=LENGTHS)
def test_a_length_is_that_of_the_example_in_the_unit_of_its_ball(
    ball: Ball, where: Place, delta: Tensor, expected: list[float]
) -> None:
    found = length(Ascent(ball, step_size=1.0), delta, where, 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_length_of_pixels_is_in_pixels() -> None:
    pixels = Normalised([0.5, 0.5], [0.1, 0.2], axis=1)
    found = length(Ascent(Linf(1.0), step_size=1.0, pixels=pixels), DELTA, place(), 2)
    torch.testing.assert_close(found, torch.tensor([0.4, 0.4], dtype=torch.float64))


def test_nothing_relative_to_a_tensor_of_zeros_is_as_long_as_nothing_and_anything_is_far() -> None:
    ascent = Ascent(L2(1.0, relative=True), step_size=1.0)
    delta = torch.stack([torch.zeros_like(DELTA[0]), DELTA[0]])
    found = length(ascent, delta, place(torch.zeros_like(X)), 2)
    assert found[0] == 0
    assert found[1] > 1e29


@pytest.mark.parametrize("size", [1.0, 1.0 + 1e-12, 1.0 - 1e-3])
def test_a_perturbation_at_the_edge_is_inside_and_one_beyond_is_not(size: float) -> None:
    target, batch = toy(), toy_batch()
    deltas = {"image": torch.zeros(3, 4, 5, dtype=torch.float64)}
    deltas["image"][:, 0, 0] = size
    ascents = {"image": Ascent(L2(1.0), step_size=1.0)}

    def half(outputs: Any, rows: Any) -> Tensor:
        return torch.full((3,), 0.5)

    found = verify(target, batch, ascents, deltas, half, name="a", seed=0)
    assert found.scores.tolist() == [0.5] * 3
    assert found.lengths["image"].tolist() == [size] * 3
    deltas["image"] *= 1.001 / size
    with pytest.raises(ConfigurationError, match=r"by the attack 'a' to be in L2\(.*got 1\.001 in 3 rows"):
        verify(target, batch, ascents, deltas, half, name="a", seed=0)


def test_any_change_of_a_model_is_seen() -> None:
    target = toy()
    model = target.model
    model.register_buffer("steps", torch.zeros(2))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    changes = {
        "parameter 'head.bias'": lambda: model.head.bias.data.add_(1),
        ".grad of 'head.bias'": lambda: setattr(model.head.bias, "grad", torch.zeros_like(model.head.bias)),
        ".grad of 'head.weight'": lambda: model.head.weight.grad.add_(1),
        "parameter 'head.weight'": lambda: model.head.weight.detach().copy_(model.head.weight.flip(0)),
        "parameter 'words.weight'": lambda: setattr(
            model.words, "weight", torch.nn.Parameter(model.words.weight.detach().clone())
        ),
        "parameter 'query.bias'": lambda: model.query.bias.requires_grad_(False),
        "buffer 'steps'": lambda: model.steps.add_(1),
    }
    for what, change in changes.items():
        before = Untouched(model)
        before.check("a")
        change()
        with pytest.raises(
            ConfigurationError, match=f"the attack 'a' to leave the model as found, got a changed {what}"
        ):
            before.check("a")


def test_weights_that_a_forward_writes_to_may_be_written_and_put_back() -> None:
    model = torch.nn.Embedding(3, 4, max_norm=0.1)
    before = Untouched(model)
    with kept_weights(model):
        model(torch.tensor([0, 1]))
    before.check("a")
    model(torch.tensor([0, 1]))
    with pytest.raises(ConfigurationError, match="a changed parameter 'weight'"):
        before.check("a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [1, 3, 8, 1001])
def test_the_smallest_change_of_one_entry_of_a_buffer_is_seen(dtype: torch.dtype, size: int) -> None:
    model = torch.nn.Module()
    whole = torch.full((size + 1,), 3).to(dtype)
    model.register_buffer("kept", whole[1:])  # begins anywhere
    before = Untouched(model)
    before.check("a")
    model.kept[size // 2] = not model.kept[size // 2] if dtype == torch.bool else after(model.kept[size // 2])
    with pytest.raises(ConfigurationError, match="a changed buffer 'kept'"):
        before.check("a")


def after(value: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(value, value + 1) if value.is_floating_point() else value + 1
