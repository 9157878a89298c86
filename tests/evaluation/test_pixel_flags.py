"""Flags with pixel attacks of others that ask for no gradients: an order that hides nothing, or a check not called made."""

from __future__ import annotations

from typing import Any

import torch
from evaluation.test_pixels import NORM, OURS, Asked, target
from torch import Tensor, nn

from advvl import Linf
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.named_attacks import PixelAttack
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import worst_case


class Turned(torch.autograd.Function):
    """The identity, with a gradient that points the wrong way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def drawn_corners(images: nn.Module, radius: float) -> Any:
    """A search: the corner of the box, of 30 drawn, that answers wrong."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        best = x.clone()
        for _ in range(30):
            corner = (x + radius * torch.randn_like(x).sign()).clamp(0, 1)
            wrong = images(corner).argmax(1) != y
            best[wrong] = corner[wrong]
        return best

    return attack


def masked_gradients(*attacks: Any) -> Measurement:
    torch.manual_seed(0)
    model = Asked().eval()
    model.picture[0].register_forward_hook(lambda module, inputs, output: Turned.apply(output))  # type: ignore[no-untyped-call]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (NORM.mean, NORM.std))
    batch = {"pixel_values": (torch.rand(60, 3, 8, 8) - mean) / std, "text": torch.randn(60, 5)}
    batch["targets"] = model(**batch).argmax(1)
    options: dict[str, Any] = {"pixels": {"image": NORM}, "boxes": {"image": (0, 1)}, "rows": take_rows}
    return worst_case(target(model), [batch], [{"image": Linf(r)} for r in (0.03, 0.1)], attacks=attacks, **options)


MASKED = {"loss not rising with radius", "random search beats gradients"}


def test_a_search_of_others_is_made_after_the_attacks_by_gradients() -> None:
    search = PixelAttack(name="corners", make=drawn_corners, gradients=False)
    first, last = masked_gradients(search, OURS), masked_gradients(OURS, search)
    for found in (first, last):
        assert {flag.name for flag in found.flags} >= MASKED
        assert all(found.about["checks"][name] == "made" for name in MASKED)
    assert torch.equal(first.worst(), last.worst())


def test_checks_are_not_called_made_where_a_search_came_first() -> None:
    found = masked_gradients(PixelAttack(name="corners", make=drawn_corners), OURS)
    checks = found.about["checks"]
    assert checks["loss not rising with radius"] == "not made: corners, the first attack, asked for no gradients"
    assert checks["random search beats gradients"] == "not made: corners was made before the attacks by gradients"
