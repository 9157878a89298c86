"""A model under the pixel attacks of others: judged in eval mode, frozen, and with its gradients as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from evaluation.test_pixels import NORM, case, measured, pgd, target
from torch import Tensor, nn

from advvl import Linf
from advvl.evaluation.named_attacks import PixelAttack
from advvl.evaluation.pixels import attack_pixels, search_pixels
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import worst_case


def in_training_mode(model: nn.Module) -> Any:
    attack = torchattacks.PGD(model, eps=0.1, alpha=0.03, steps=10)
    attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=True)
    return attack


def idle_in_training_mode(model: nn.Module) -> Any:
    def attack(images: Tensor, labels: Tensor) -> Tensor:
        model.train()(images)
        return images

    return attack


@pytest.mark.parametrize("make", [in_training_mode, idle_in_training_mode])
def test_the_model_is_judged_in_eval_mode_whatever_mode_an_attack_leaves_it_in(make: Any) -> None:
    model, batch, labels = case()
    result = attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM)
    again = model(batch["pixel_values"] + result.deltas["image"], batch["text"]).argmax(1) == labels
    assert result.correct is not None
    assert torch.equal(result.correct, again)


def test_what_an_attack_found_is_scored_in_eval_mode_too() -> None:
    model, batch, labels = case()
    attack = PixelAttack(name="theirs", make=lambda images, _: idle_in_training_mode(images))
    ascent = attack.ascents({"image": Linf(0.1)}, 0, {}, {"image": NORM})["image"]
    found = search_pixels(
        target(model),
        batch,
        attack,
        ascent,
        lambda _: labels,
        lambda logits, _: (logits.argmax(1) == labels).double(),
        seed=0,
    )
    assert found.seen.all()
    expected = nn.functional.cross_entropy(model(**batch), labels, reduction="none")
    torch.testing.assert_close(found.losses, expected.detach().double())


def by_backward(images: nn.Module) -> Any:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        images.requires_grad_()
        images(x.clone().requires_grad_()).sum().backward()
        torch.set_grad_enabled(False)
        return x

    return attack


def fab(images: nn.Module) -> Any:
    return torchattacks.FAB(images, norm="Linf", eps=0.1, steps=2, n_classes=4)


@pytest.mark.parametrize("make", [by_backward, fab])
@pytest.mark.parametrize("filled", [False, True])
def test_an_attack_that_calls_backward_leaves_the_gradients_as_they_were(make: Any, filled: bool) -> None:
    model, batch, labels = case()
    model.head.bias.requires_grad_(False)
    if filled:
        nn.functional.cross_entropy(model(**batch), labels).backward()  # type: ignore[no-untyped-call]  # of torch
    before = [(p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    with torch.no_grad():
        attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM, one_by_one=True)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    for parameter, (requires_grad, gradient, values) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad is requires_grad
        assert parameter.grad is gradient
        assert values is None or torch.equal(values, gradient)
    theirs = PixelAttack(name="theirs", make=lambda images, _: make(images), one_by_one=True)
    measured(theirs, model=model, budgets={"image": Linf(0.1)})


def test_no_parameter_requires_grad_while_an_attack_of_others_runs() -> None:
    model, batch, labels = case()
    seen: list[bool] = []

    def make(images: nn.Module) -> Any:
        seen.extend(parameter.requires_grad for parameter in images.parameters())
        return pgd(images)

    attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM)
    assert seen
    assert not any(seen)


@pytest.mark.slow
def test_an_evaluation_takes_the_whole_of_autoattack() -> None:
    def make(images: nn.Module, radius: float) -> Any:
        return torchattacks.AutoAttack(images, norm="Linf", eps=radius, n_classes=4)

    model, batch, labels = case()
    two = take_rows(batch | {"targets": labels}, torch.tensor([1, 2]))  # one that holds and one that does not
    attack = PixelAttack(name="AutoAttack", make=make, one_by_one=True)
    options: dict[str, Any] = {"pixels": {"image": NORM}, "boxes": {"image": (0, 1)}, "checks": False}
    found = worst_case(target(model), [two], {"image": Linf(0.04)}, attacks=[attack], **options)
    assert found.worst().tolist() == [[1.0, 0.0]]
