"""Pixel attacks of torchattacks on a model with a text: in the ball, in [0, 1], and nothing left changed."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from advvl import L2, PGD, Adapter, Linf, Normalised, Site, adapt
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.hits import hit
from advvl.evaluation.measurement import Measurement
from advvl.evaluation.named_attacks import NamedAttack, PixelAttack
from advvl.evaluation.pixels import attack_pixels
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import worst_case

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


def writes(images: nn.Module) -> Any:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            images.model.head.weight.add_(1)  # type: ignore[union-attr, operator]
        return x

    return attack


def test_an_attack_that_writes_to_the_weights_is_refused() -> None:
    model, batch, labels = case()
    with pytest.raises(
        ConfigurationError, match=r"the attack to leave the model as found, got a changed .*head\.weight"
    ):
        attack_pixels(writes, target(model), batch, labels, Linf(0.1), pixels=NORM)


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


def by_radius(images: nn.Module, radius: float) -> Any:
    return torchattacks.PGD(images, eps=radius, alpha=radius / 4, steps=10)


THEIRS = PixelAttack(name="theirs", make=by_radius)
OURS = NamedAttack(name="ours", maximizer=PGD(5))


RADII = (0.02, 0.04)


def measured(*attacks: Any, model: nn.Module | None = None, **options: Any) -> Measurement:
    own, batch, labels = case()
    batch["targets"] = labels
    options = {"pixels": {"image": NORM}, "boxes": {"image": (0, 1)}, "checks": False, "rows": take_rows} | options
    budgets = options.pop("budgets", [{"image": Linf(radius)} for radius in RADII])
    return worst_case(target(model or own), [batch], budgets, attacks=attacks, **options)


def target(model: nn.Module) -> Adapter:
    def call(network: nn.Module, batch: Any) -> Any:
        return network(batch["pixel_values"], batch["text"])

    return adapt(model, {"image": Site("picture", at="input")}, call=call)


def test_an_evaluation_counts_the_images_of_torchattacks_as_they_are() -> None:
    found = measured(THEIRS)
    assert 0 < found.worst()[1].sum() < found.worst()[0].sum() < found.clean.sum()
    for r, radius in enumerate(RADII):
        made = ~found.scores[r, 0].isnan()
        assert (found.norms["image"][r, 0, made] <= radius * (1 + 1e-5)).all()
        assert (found.norms["image"][r, 0, made] > 0.9 * radius).all()
    assert not found.unmoved.any()


def test_an_evaluation_keeps_the_worst_of_our_attacks_and_theirs() -> None:
    weak = NamedAttack(name="weak", maximizer=PGD(1), step_fraction=1e-9)
    idle = PixelAttack(name="idle", make=lambda images, radius: lambda x, y: x)
    ours, theirs = measured(OURS).worst(), measured(THEIRS).worst()
    assert torch.equal(measured(THEIRS, weak).worst(), theirs)
    assert torch.equal(measured(weak, THEIRS).worst(), theirs)
    assert torch.equal(measured(idle, OURS).worst(), ours)
    assert ours.sum() < 2 * measured(idle).clean.sum()


@pytest.mark.parametrize(
    ("make", "by_gradients", "unmoved"),
    [
        pytest.param(by_radius, True, False, id="PGD"),
        pytest.param(lambda images, radius: lambda x, y: (x + radius).clamp(0, 1), False, False, id="no gradients"),
        pytest.param(lambda images, radius: torchattacks.PGD(Flat(images), eps=radius, steps=2), True, True, id="flat"),
    ],
)
def test_an_evaluation_sees_which_attacks_ask_for_gradients_and_which_get_none(
    make: Any, by_gradients: bool, unmoved: bool
) -> None:
    found = measured(PixelAttack(name="theirs", make=make), checks=True)
    made = ~found.scores.isnan()
    assert torch.equal(found.unmoved & made, made if unmoved else torch.zeros_like(made))
    assert (found.about["checks"]["vanishing gradients"] == "made") is by_gradients
    assert ("vanishing gradients" in [flag.name for flag in found.flags]) is unmoved


class Flat(nn.Module):
    """Answers that do not change with the images, but have a gradient, of zero."""

    def __init__(self, images: nn.Module) -> None:
        super().__init__()
        self.images = images

    def forward(self, pixels: Tensor) -> Tensor:
        return 0 * self.images(pixels)  # type: ignore[no-any-return]


def test_an_attack_of_torchattacks_on_another_model_is_a_transfer_attack() -> None:
    torch.manual_seed(1)
    other = target(Asked().eval())
    found = measured(OURS, PixelAttack(name="transfer", make=by_radius, surrogate=other), checks=True)
    assert found.about["checks"]["transfer attack beats gradients"] == "made"


def test_an_evaluation_makes_one_by_one_what_must_be() -> None:
    def some(images: nn.Module, radius: float) -> Any:
        return torchattacks.APGD(images, eps=radius, steps=5)

    alone = measured(PixelAttack(name="APGD", make=some, one_by_one=True))
    assert alone.worst().sum() < 2 * alone.clean.sum()
    with pytest.raises(ConfigurationError, match="pass one_by_one=True"):
        measured(PixelAttack(name="some", make=lambda images, radius: lambda x, y: images(x[:2])))


def test_restarts_draw_other_starts_and_one_seed_gives_one_measurement() -> None:
    seen: list[Tensor] = []

    def drawn(images: nn.Module, radius: float) -> Any:
        seen.append(torch.rand(3))
        return lambda x, y: x

    case()  # sets the state
    state = torch.get_rng_state()
    for _ in range(2):
        measured(PixelAttack(name="idle", make=drawn, restarts=2), budgets={"image": Linf(0.1)})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_an_evaluation_leaves_modes_gradients_and_buffers() -> None:
    model, _, _ = case()
    state = copy.deepcopy(model.state_dict())
    measured(THEIRS, model=model)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda *_: lambda x, y: (x + 0.2).clamp(0, 1), {}, r"the attack 'theirs' within Linf\(.*, got a norm of 0.2"),
        (lambda *_: lambda x, y: x + 0.019, {}, r"attacked pixels in \[0, 1\].*see the attack 'theirs'"),
        (lambda images, _: writes(images), {}, "'theirs' to leave the model as found, got a changed parameter"),
        (by_radius, {"pixels": None, "boxes": None}, "give pixels=Normalised"),
        (by_radius, {"budgets": {"image": L2(0.1, relative="row")}}, "an absolute radius of 'image' alone"),
    ],
    ids=["ball", "box", "weights", "pixels", "relative"],
)
def test_an_attack_that_an_evaluation_cannot_trust_is_refused(make: Any, options: Any, message: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        measured(PixelAttack(name="theirs", make=make), **options)


def test_pixels_are_attacked_where_the_model_takes_them() -> None:
    model, batch, labels = case()
    batch["targets"] = labels
    sites = {"image": Site("picture.0"), "text": Site("text", at="input")}
    other = adapt(model, sites, call=lambda network, given: network(given["pixel_values"], given["text"]))
    measure = partial(worst_case, other, [batch], attacks=[THEIRS], pixels={}, checks=False)
    with pytest.raises(
        ConfigurationError, match=r"the site of 'image' to take the pixels in 'pixel_values', got \(6, 6"
    ):
        measure({"image": Linf(0.1)})
    for budget in ({"text": Linf(0.1)}, {"image": Linf(0.1), "text": Linf(0.1)}):
        with pytest.raises(ConfigurationError, match="an absolute radius of 'image' alone for the attack 'theirs'"):
            measure(budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name"),
        ({"make": None}, "expected make to be a function"),
        ({"restarts": 0}, "restarts"),
        ({"gradients": "yes"}, "gradients"),
        ({"surrogate": nn.Identity()}, "surrogate"),
    ],
)
def test_a_pixel_attack_of_parts_that_are_none_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PixelAttack(**({"name": "theirs", "make": by_radius} | options))


def test_an_example_shows_the_pixels_that_an_attack_of_torchattacks_hit() -> None:
    model, batch, labels = case()
    one = {name: value[:1] for name, value in batch.items()} | {"targets": labels[:1]}
    found = hit(target(model), one, {"image": Linf(0.3)}, THEIRS, pixels={"image": NORM}, boxes={"image": (0, 1)})
    assert found.heat["image"].shape == (1, 8, 8)
    assert found.heat["image"].any()
