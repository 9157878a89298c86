"""The minimum-norm attack finds the distance to a linear boundary, and keeps what succeeded."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.linear import correct_of, linear, linear_batch, margin_of
from support.scripted import driven
from support.toy import perturber, toy, toy_batch
from torch import Tensor

from advvl import L2, PGD, Ascent, Attack, Ball, EmbeddingPerturber, Linf, MinimumNorm, Normalised
from advvl.errors import ConfigurationError

CLOSE = 0.01  # the last bounds change by 1e-4, those a few moves before by a little more


def attack(steps: int = 60, **balls: Ball) -> Attack:
    reach = {name: ball.radius if math.isfinite(ball.radius) else 3.0 for name, ball in balls.items()}  # type: ignore[attr-defined]
    ascents = {name: Ascent(ball, step_size=reach[name]) for name, ball in balls.items()}
    return Attack(EmbeddingPerturber(**ascents), MinimumNorm(steps), loss=margin_of, correct=correct_of)


def length(values: Tensor, ball: Ball) -> Tensor:
    rows = values.flatten(1) if ball.per == "sample" else values
    return rows.norm(dim=-1) if isinstance(ball, L2) else rows.abs().amax(-1)


def dual(values: Tensor, ball: Ball) -> Tensor:
    """The rise of a linear function along the steepest perturbation of size 1, `(B,)`."""
    rows = values.flatten(1) if ball.per == "sample" else values
    found = rows.norm(dim=-1) if isinstance(ball, L2) else rows.abs().sum(-1)
    return found if found.ndim == 1 else found.sum(1)


@pytest.mark.parametrize("radius", [math.inf, 50.0])
@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("kind", [L2, Linf])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_it_finds_the_distance_to_a_linear_boundary(kind: Any, per: Any, modality: str, radius: float) -> None:
    ball, model, batch = kind(radius, per=per), linear(), linear_batch()
    result = attack(**{modality: ball})(model, batch)
    margins = -margin_of(model.model(**batch), batch)
    exact = margins / dual(model.model.normals(batch)[modality], ball)
    found = length(result.deltas[modality], ball)
    found = found if found.ndim == 1 else found.amax(1)
    assert not result.correct.any()
    assert (found > exact).all()
    torch.testing.assert_close(found, exact, rtol=CLOSE, atol=0)


def test_modalities_together_are_measured_in_their_radii() -> None:
    balls, model, batch = {"text": L2(10.0), "image": Linf(20.0)}, linear(), linear_batch()
    result = attack(**balls)(model, batch)
    margins, normals = -margin_of(model.model(**batch), batch), model.model.normals(batch)
    exact = margins / sum(ball.radius * dual(normals[name], ball) for name, ball in balls.items())
    sizes = torch.stack([length(result.deltas[name], ball) / ball.radius for name, ball in balls.items()]).amax(0)
    assert not result.correct.any()
    torch.testing.assert_close(sizes, exact, rtol=CLOSE, atol=0)


def test_a_modality_that_does_not_matter_has_no_part_in_the_size() -> None:
    model, batch = linear(), linear_batch()
    with torch.no_grad():
        model.model.image.zero_()
    batch["labels"] = model.model(**batch).argmax(1)
    exact = -margin_of(model.model(**batch), batch) / dual(model.model.normals(batch)["text"], L2())
    result = attack(text=L2(10.0), image=L2(10.0))(model, batch)
    torch.testing.assert_close(length(result.deltas["text"], L2()), exact.detach(), rtol=CLOSE, atol=0)
    assert not result.correct.any()


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_at_the_smallest_flip_and_looks_no_further_after_one(seed: int) -> None:
    """Whatever the model answers: here losses and verdicts are drawn."""
    drawn = torch.rand(25, generator=torch.Generator().manual_seed(seed)).tolist()
    correct = [True, *(value < 0.6 for value in drawn[1:])]
    points, end = driven(MinimumNorm(24), Ascent(L2(), step_size=3.0), [-value for value in drawn], correct)
    flipped = [abs(point) for point, right in zip(points, correct, strict=True) if not right]
    assert abs(end) == min(flipped)
    for number, right in enumerate(correct[:-1]):
        if not right:
            smallest = min(abs(p) for p, r in zip(points[: number + 1], correct[: number + 1], strict=True) if not r)
            assert abs(points[number + 1]) <= smallest


def test_step_sizes_shrink_as_half_a_cosine() -> None:
    points, _ = driven(MinimumNorm(6), Ascent(L2(), step_size=3.0), [-1e9] * 7, [True] * 7)
    steps = [after - before for before, after in pairwise(points)]
    assert steps == pytest.approx([3 * (1 + math.cos(math.pi * move / 6)) / 2 for move in range(6)])


def test_a_row_that_never_flips_ends_at_its_highest_margin() -> None:
    losses = [-9.0, -5.0, -2.0, -7.0, -3.0, -8.0]
    points, end = driven(MinimumNorm(5), Ascent(L2(), step_size=1.0), losses, [True] * 6)
    assert end == points[2] != points[-1]


def test_rows_that_the_radius_does_not_let_flip_are_correct_at_its_edge() -> None:
    model, batch = linear(), linear_batch()
    exact = -margin_of(model.model(**batch), batch) / dual(model.model.normals(batch)["image"], L2())
    radius = float(exact.detach().median())
    result = attack(image=L2(radius))(model, batch)
    norms = length(result.deltas["image"], L2())
    assert torch.equal(result.correct, exact >= radius * (1 - 1e-9))
    assert result.correct.any()
    assert not result.correct.all()
    assert (norms <= radius).all()
    assert (norms[result.correct] > 0.99 * radius).all()


def test_a_row_that_is_wrong_already_is_not_perturbed() -> None:
    batch = linear_batch()
    batch["labels"][::2] = 1 - batch["labels"][::2]
    result = attack(image=L2())(linear(), batch)
    assert not result.deltas["image"][::2].any()
    assert result.deltas["image"][1::2].flatten(1).any(1).all()
    assert not result.correct.any()


def test_padding_is_left_alone_and_rows_do_not_depend_on_each_other() -> None:
    batch = linear_batch()
    whole = attack(text=L2(), image=L2())(linear(), batch)
    assert not whole.deltas["text"][~batch["mask"]].any()
    for row in range(len(batch["labels"])):
        alone = attack(text=L2(), image=L2())(linear(), {name: v[row : row + 1] for name, v in batch.items()})
        torch.testing.assert_close(alone.deltas["text"][0], whole.deltas["text"][row], rtol=1e-9, atol=1e-12)


def test_the_box_is_kept_and_pixels_are_the_unit() -> None:
    batch = linear_batch()
    batch["regions"] = batch["regions"].clamp(-0.9, 0.9)
    pixels = Normalised((0.5,) * 5, (0.5,) * 5, 2)  # pixels from 0 to 1 are regions from -1 to 1
    batch["labels"] = linear().model(**batch).argmax(1)
    ascent = Ascent(L2(), step_size=1.0, box=(0.0, 1.0), pixels=pixels)
    result = Attack(EmbeddingPerturber(image=ascent), MinimumNorm(80), loss=margin_of, correct=correct_of)(
        linear(), batch
    )
    moved = batch["regions"] + result.deltas["image"]
    assert (moved >= -1 - 1e-12).all()
    assert (moved <= 1 + 1e-12).all()
    plain = attack(80, image=L2())(linear(), batch)
    both = ~result.correct & ~plain.correct
    assert both.any()
    assert (result.deltas["image"].flatten(1).norm(dim=1) > plain.deltas["image"].flatten(1).norm(dim=1) * 0.98)[
        both
    ].all()


def test_on_a_model_that_is_not_linear_it_is_below_what_an_attack_of_a_fixed_radius_needs() -> None:
    model, batch = toy(), toy_batch(12)
    batch["labels"] = model.model(**batch)["logits"].argmax(1)

    def margin(outputs: Any, batch: Any) -> Tensor:
        return margin_of(outputs["logits"], batch)

    def correct(outputs: Any, batch: Any) -> Tensor:
        return outputs["logits"].argmax(1) == batch["labels"]

    found = Attack(perturber("image", ball=L2(50.0), step_size=5.0), MinimumNorm(60), loss=margin, correct=correct)(
        model, batch
    )
    flipped = ~found.correct
    assert flipped.any()
    for radius in (0.5, 1.0, 2.0, 4.0):
        plain = Attack(
            perturber("image", ball=L2(radius), step_size=radius / 4),
            PGD(30, keep="best"),
            loss=margin,
            correct=correct,
        )(model, batch)
        inside = flipped & (found.deltas["image"].flatten(1).norm(dim=1) <= radius)
        assert int(inside.sum()) >= int((~plain.correct).sum()) - 1


def test_a_loss_that_is_no_margin_is_refused() -> None:
    def positive(outputs: Tensor, batch: Any) -> Tensor:
        return margin_of(outputs, batch).exp()

    ascent = Ascent(L2(), step_size=1.0)
    with pytest.raises(ConfigurationError, match="expected a margin as loss, below 0 where a row is correct"):
        Attack(EmbeddingPerturber(image=ascent), MinimumNorm(3), loss=positive, correct=correct_of)(
            linear(), linear_batch()
        )


def test_a_judge_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="expected correct=… to look for the smallest flip"):
        Attack(EmbeddingPerturber(image=Ascent(L2(), step_size=1.0)), MinimumNorm(3))(linear(), linear_batch())
