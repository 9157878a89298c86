"""Pixel attacks of torchattacks on a model with a text: in the ball, in [0, 1], and nothing left changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from advvl import L2, Adapter, Linf, Normalised, Site, adapt
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.pixels import attack_pixels

NORM = Normalised((0.5, 0.4, 0.3), (0.25, 0.3, 0.2))


class Asked(nn.Module):
    """Answers `(B, 4)` of normalised pictures `(B, 3, 8, 8)` and a text `(B, 5)`."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 16))
        self.text, self.head, self.dropout = nn.Linear(5, 16), nn.Linear(16, 4), nn.Dropout(0.5)

    def forward(self, pixel_values: Tensor, text: Tensor) -> Tensor:
        return self.head(self.dropout(self.picture(pixel_values) * self.text(text)))  # type: ignore[no-any-return]


def case(dtype: torch.dtype = torch.float32) -> tuple[Asked, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model, raw = Asked().to(dtype), torch.rand(6, 3, 8, 8, dtype=dtype)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (NORM.mean, NORM.std))
    batch = {"pixel_values": (raw - mean) / std, "text": torch.randn(6, 5, dtype=dtype)}
    model.eval()
    return model, batch, model(**batch).argmax(1)


def target(model: nn.Module) -> Adapter:
    return adapt(model, {"image": Site("picture", at="input")})


def pgd(model: nn.Module) -> Any:
    return torchattacks.PGD(model, eps=0.1, alpha=0.03, steps=10)


ATTACKS = {
    "PGD": (pgd, Linf(0.1), False),
    "FGSM": (lambda model: torchattacks.FGSM(model, eps=0.1), Linf(0.1), False),
    "PGDL2": (lambda model: torchattacks.PGDL2(model, eps=1.0, alpha=0.3, steps=10), L2(1.0), False),
    "Square": (lambda model: torchattacks.Square(model, eps=0.3, n_queries=60), Linf(0.3), True),
    "APGD": (lambda model: torchattacks.APGD(model, eps=0.1, steps=10), Linf(0.1), True),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_of_torchattacks_stays_in_its_ball_and_in_the_box_and_hits(name: str) -> None:
    make, ball, one_by_one = ATTACKS[name]
    model, batch, labels = case()
    result = attack_pixels(make, target(model), batch, labels, ball, pixels=NORM, one_by_one=one_by_one)
    clean, moved = NORM.pixels(batch["pixel_values"]), NORM.pixels(batch["pixel_values"] + result.deltas["image"])
    assert (moved - clean).any()
    order = 2 if isinstance(ball, L2) else float("inf")
    assert (torch.linalg.vector_norm((moved - clean).flatten(1), order, dim=1) <= ball.radius + 1e-6).all()
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert result.correct is not None
    again = model(batch["pixel_values"] + result.deltas["image"], batch["text"]).argmax(1) == labels
    assert torch.equal(result.correct, again)
    assert not result.correct.all()


def test_the_model_sees_the_pixels_normalised_and_its_text() -> None:
    """The identity attack sees the model's own answers, of each image with its own text."""
    model, batch, labels = case(torch.float64)
    seen: list[Tensor] = []

    def make(images: nn.Module) -> Any:
        return lambda pictures, _: seen.append(images(pictures)) or pictures

    result = attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM)
    torch.testing.assert_close(seen[0], model(**batch))
    assert result.correct is not None
    assert result.correct.all()
    seen.clear()
    attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM, one_by_one=True)
    torch.testing.assert_close(torch.cat(seen), model(**batch))


def test_everything_is_left_as_it_was() -> None:
    model, batch, labels = case()
    model.train()
    model.picture[1].eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = [attack_pixels(pgd, target(model), batch, labels, Linf(0.1), pixels=NORM).deltas["image"] for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_is_left_as_it_was_when_the_attack_fails() -> None:
    model, batch, labels = case()
    model.train()

    def make(_: nn.Module) -> Any:
        raise RuntimeError("no attack")

    with pytest.raises(RuntimeError, match="no attack"):
        attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM)
    assert all(module.training for module in model.modules())


def moved_by(change: Any) -> Any:
    return lambda _: lambda images, labels: change(images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(moved_by(lambda x: (x + 0.2).clamp(0, 1)), r"within Linf\(.*, got a norm of 0.2", id="ball"),
        pytest.param(moved_by(lambda x: x + 0.09), r"attacked pixels in \[0, 1\]", id="box"),
        pytest.param(moved_by(lambda x: x * float("nan")), "finite", id="nan"),
        pytest.param(moved_by(lambda x: x[:3]), r"expected attacked images \(6, 3, 8, 8\)", id="shape"),
        pytest.param(moved_by(lambda x: None), "expected attacked images", id="none"),
        pytest.param(lambda model: lambda x, y: model(x[:2]), "got 2; pass one_by_one=True", id="some"),
    ],
)
def test_an_attack_that_cannot_be_trusted_is_refused(make: Any, message: str) -> None:
    model, batch, labels = case()
    with pytest.raises((ConfigurationError, DataError), match=message):
        attack_pixels(make, target(model), batch, labels, Linf(0.1), pixels=NORM)


def test_pixels_that_are_normalised_must_say_how() -> None:
    model, batch, labels = case()
    with pytest.raises(DataError, match=r"expected pixels in \[0, 1\].*give pixels=Normalised"):
        attack_pixels(pgd, target(model), batch, labels, Linf(0.1))
    with pytest.raises(DataError, match="expected pixels in 'images'"):
        attack_pixels(pgd, target(model), batch, labels, Linf(0.1), field="images")
    with pytest.raises(ConfigurationError, match="a ball"):
        attack_pixels(pgd, target(model), batch, labels, 0.1, pixels=NORM)  # type: ignore[arg-type]
