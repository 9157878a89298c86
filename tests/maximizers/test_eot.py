"""Expectation over transformation: means of several passes in the place of one, and nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.toy import perturber, toy, toy_batch
from torch import Tensor, nn

from advvl import (
    EOT,
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    Attack,
    AutoPGD,
    EmbeddingPerturber,
    Feedback,
    FreeLB,
    Held,
    InnerMaximizer,
    Place,
    Probe,
    RandomSearch,
    Uniform,
    adapt,
)
from advvl.errors import ConfigurationError

WIDTH, ROWS = 32, 16


class Noisy(nn.Module):
    """A linear score whose weights are drawn afresh in every forward, around those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weights = nn.Identity(), nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self.first(x) @ (self.weights + 5 * torch.randn_like(self.weights))


def noisy() -> tuple[Any, dict[str, Tensor]]:
    model = Noisy().eval()
    target = adapt(model, {"image": "first"}, call=lambda net, batch: net(batch["x"]), loss=lambda out, batch: out)
    return target, {"x": torch.randn(ROWS, WIDTH, dtype=torch.float64)}


def alignment(maximizer: InnerMaximizer) -> float:
    """The mean cosine between the perturbations that were found and the weights that count."""
    torch.manual_seed(0)
    target, batch = noisy()
    attack = Attack(EmbeddingPerturber(image=Ascent(L2(1.0), step_size=1.0)), maximizer)
    found = attack(target, batch).deltas["image"]
    return float(torch.cosine_similarity(found, target.model.weights.detach()[None], dim=1).mean())


def test_a_mean_gradient_climbs_what_the_model_does_on_average() -> None:
    assert alignment(PGD(1)) < 0.5
    assert alignment(EOT(PGD(1), draws=256)) > 0.9


@pytest.mark.parametrize("maximizer", [PGD(3), PGD(3, keep="best"), AutoPGD(4), PGD(2, "in turn")], ids=repr)
def test_of_a_model_that_draws_nothing_it_finds_the_same(maximizer: InnerMaximizer) -> None:
    found = []
    for one in (maximizer, EOT(maximizer, draws=4)):
        attack = Attack(perturber(ball=L2(0.5), start=Uniform(0.5)), one, seed=3)
        found.append(attack(toy(), toy_batch()).deltas)
    for modality, expected in found[0].items():
        torch.testing.assert_close(found[1][modality], expected, rtol=0, atol=1e-12)


def test_each_pass_without_a_lesson_is_made_as_often_as_asked() -> None:
    target, batch = noisy()
    Attack(EmbeddingPerturber(image=Ascent(L2(1.0), step_size=0.5)), EOT(PGD(3), draws=5))(target, batch)
    assert target.model.forwards == 3 * 5 + 1


def test_training_learns_from_one_pass() -> None:
    plain, other = toy(), toy()
    for target, maximizer in ((plain, PGD(2)), (other, EOT(PGD(2), draws=4))):
        AdversarialTraining(perturber(ball=L2(0.5)), maximizer).step(target, toy_batch())
    for one, expected in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, expected.grad, rtol=0, atol=1e-12)


def feedbacks(verdicts: list[bool]) -> Iterator[Feedback]:
    delta = torch.zeros(1, 1, 1)
    for n, correct in enumerate(verdicts):
        gradient, loss = torch.full_like(delta, float(n)), torch.tensor([float(n)])
        yield Feedback({"image": delta}, {"image": gradient}, {"image": Place(delta)}, loss, torch.tensor([correct]))


class Listening(InnerMaximizer):
    """Asks for one look and keeps what it is sent."""

    heard: Feedback
    closed = False

    def probes(self, perturber: Any, **options: Any) -> Any:
        try:
            self.heard = yield Probe({"image": torch.zeros(1, 1, 1)})
            yield Probe({"image": torch.zeros(1, 1, 1)}, weight=1.0)
            return {}
        finally:
            self.closed = True


@pytest.mark.parametrize(
    ("verdicts", "correct"), [([True, False, False], False), ([True, False, True], True), ([True, False], True)]
)
def test_gradients_and_losses_are_means_and_a_row_stands_where_half_the_draws_do(
    verdicts: list[bool], correct: bool
) -> None:
    listening = Listening()
    probes = EOT(listening, draws=len(verdicts)).probes(perturber())
    next(probes)
    for feedback in feedbacks(verdicts):
        probes.send(feedback)
    mean = (len(verdicts) - 1) / 2
    assert float(listening.heard.gradients["image"]) == mean
    assert listening.heard.losses is not None
    assert float(listening.heard.losses) == mean
    assert listening.heard.correct is not None
    assert bool(listening.heard.correct) is correct
    probes.close()
    assert listening.closed


def test_a_look_without_gradients_is_repeated_without_gradients() -> None:
    probes = EOT(RandomSearch(2), draws=2).probes(perturber(ball=L2(0.5)))
    next(probes)
    delta = torch.zeros(1, 1, 1)
    places = {"text": Place(delta), "image": Place(delta)}
    seen = Feedback(dict.fromkeys(places, delta), {}, places, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    assert not probes.send(seen).delta_gradients


@pytest.mark.parametrize("wrapped", [EOT(RandomSearch(2), draws=2), Held(RandomSearch(2), 2)], ids=repr)
def test_a_search_around_which_something_stands_is_still_one_without_gradients(wrapped: InnerMaximizer) -> None:
    assert not wrapped.gradients
    assert EOT(PGD(1), draws=2).gradients


@pytest.mark.parametrize(("maximizer", "draws"), [(PGD(2), 0), (PGD(2), True), (FreeLB(3), 2), ("PGD", 2)], ids=repr)
def test_what_cannot_be_averaged_is_refused(maximizer: Any, draws: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected (draws to be a whole number|a maximiser that teaches at its end)"
    ):
        EOT(maximizer, draws)
