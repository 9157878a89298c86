"""Climb and teach are two objectives: each is computed as it says, and what cannot be had is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels
from torch import Tensor
from torch.nn import functional as F

from advvl import (
    KL,
    PGD,
    AdversarialTraining,
    Ascent,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Frozen,
    InnerMaximizer,
    Linf,
    Normal,
    Objective,
    PassTrace,
    Perturber,
    Probe,
    SymmetricKL,
    Zero,
)
from advvl.errors import ConfigurationError
from advvl.maximizers.probes import Probes
from advvl.perturbers import Decay


def perturber(**options: Any) -> EmbeddingPerturber:
    options = {"step_size": 0.05, "start": Normal(0.01), "rule": "sign"} | options
    return EmbeddingPerturber(image=Ascent(Linf(0.1), **options))


def stepped(method: AdversarialTraining, target: Any, batch: Any) -> list[PassTrace]:
    passes: list[PassTrace] = []
    method.step(target, batch, trace=passes.append)
    return [seen for seen in passes if seen.modalities]


def climbed(start: Tensor, objective: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    deltas = [start]
    for _ in range(steps):
        leaf = deltas[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
        deltas.append((leaf.detach() + 0.05 * gradient.sign()).clamp(-0.1, 0.1))
    return deltas


def towards(outputs: Any, batch: Any) -> Tensor:
    """A loss of the user's own: one per row."""
    return -F.cross_entropy(outputs["logits"], (batch["y"] + 1) % 5, reduction="none")


def test_another_loss_is_climbed_than_is_taught() -> None:
    """As in latent adversarial training: climb towards a target, teach the task and a penalty."""
    batch, ours, theirs = pixels(), pixel_net(), pixel_net().model
    method = AdversarialTraining(
        perturber(), PGD(3), KL(2.0), climb=Objective(penalty=0, loss=towards), teach=Objective(task=0.5, penalty=3.0)
    )
    passes = stepped(method, ours, batch)
    x, y = batch["x"], batch["y"]
    deltas = climbed(passes[0].deltas["image"], lambda d: towards(theirs(x, delta=d), batch).mean(), 3)
    for seen, delta in zip(passes, deltas, strict=True):
        agree(seen.deltas["image"], delta)
    perturbed, clean = theirs(x, y, delta=deltas[-1]), theirs(x)["logits"].log_softmax(1)
    kl = (clean.exp() * (clean - perturbed["logits"].log_softmax(1))).sum(1).mean()
    agree_on_gradients(ours.model, gradients_of(0.5 * perturbed["loss"] + 3.0 * 2.0 * kl, theirs))


@pytest.mark.parametrize(("task", "penalty"), [(0.0, 1.0), (0.25, 3.0)])
def test_a_report_adds_up_what_is_taught(task: float, penalty: float) -> None:
    batch, target, passes = pixels(), pixel_net(), list[PassTrace]()
    objective = Objective(task, penalty)
    method = AdversarialTraining(perturber(), PGD(2), SymmetricKL(2.0), clean_weight=0.5, teach=objective)
    report = method.step(target, batch, trace=passes.append)
    clean, last = passes[0], passes[-1]
    assert (last.task_loss is None) == (task == 0)
    taught = 0.5 * clean.task_loss + (task * last.task_loss if task else 0.0)  # type: ignore[operator]
    agree(report.task_loss, taught)
    agree(report.regularization, penalty * last.regularization)  # type: ignore[operator]
    agree(report.loss, taught + penalty * last.regularization)  # type: ignore[operator]


def test_the_best_is_kept_where_the_clean_pass_answers_for_the_first() -> None:
    """Its losses per row too: with one randomness the pass at zero is not run again."""
    found = []
    for dropout in ("shared", "fresh"):
        target, passes = pixel_net(), list[PassTrace]()
        method = AdversarialTraining(
            perturber(start=Zero(), step_size=Decay(0.1, rate=0.1)),
            PGD(3, keep="best"),
            SymmetricKL(),
            dropout=dropout,  # type: ignore[arg-type]
        )
        report = method.step(target, pixels(), loss=towards, trace=passes.append)
        found.append((report, passes[-1].deltas["image"], target.model))
    (shared, ours, model), (fresh, theirs, other) = found
    assert shared.passes == fresh.passes - 1
    agree(ours, theirs)
    agree_on_gradients(model, {name: p.grad for name, p in other.named_parameters() if p.grad is not None})


def test_the_best_of_what_has_no_loss_per_row_is_refused() -> None:
    method = AdversarialTraining(perturber(), PGD(2, keep="best"), KL(), teach=Objective(task=0))
    with pytest.raises(ConfigurationError, match=r"loss for each row to keep the best of, got none; .*and climb it"):
        method.step(pixel_net(), pixels())


def test_a_backward_that_scales_by_zero_leaves_zero() -> None:
    """As of a batch that does not count: nothing of it, through the clean branch either."""
    target = pixel_net()
    AdversarialTraining(perturber(), PGD(2), SymmetricKL()).step(
        target, pixels(), backward=lambda t: (0 * t).backward()
    )
    assert all(p.grad is not None and not p.grad.any() for p in target.model.parameters())


def test_without_a_task_no_loss_is_asked_for() -> None:
    def never(outputs: Any, batch: Any) -> Tensor:
        raise AssertionError

    method = AdversarialTraining(perturber(), PGD(1), KL(detach_clean=True), teach=Objective(task=0))
    report = method.step(pixel_net(), {"x": pixels()["x"]}, loss=never)
    assert report.task_loss is None


def test_without_a_penalty_no_regulariser_is_asked() -> None:
    class Counted(SymmetricKL):
        calls = 0

        def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
            Counted.calls += 1
            return super().__call__(clean, perturbed, mask)

    method = AdversarialTraining(perturber(), PGD(4), Counted(), climb=Objective(penalty=0))
    method.step(pixel_net(), pixels())
    assert Counted.calls == 1  # of the pass that is taught


@pytest.mark.parametrize("maximizer", [FreeLB(3), FreeAT(3)], ids=["FreeLB", "FreeAT"])
def test_one_backward_cannot_serve_two_objectives(maximizer: InnerMaximizer) -> None:
    words = rf"expected climb and teach to be one objective with {type(maximizer).__name__}.*use PGD"
    with pytest.raises(ConfigurationError, match=words):
        AdversarialTraining(perturber(), maximizer, KL(), climb=Objective(task=0))
    AdversarialTraining(perturber(), maximizer, KL(), climb=Objective(task=0), teach=Objective(task=0))


class Both(InnerMaximizer):
    """A maximiser of the user's own that moves and teaches by one pass, without saying so."""

    def probes(self, perturber: Perturber, *, generator: Any = None, state: Any = None) -> Probes:
        feedback = yield Probe(perturber.starts(), weight=1.0, update=True)
        return feedback.deltas


def test_a_pass_that_moves_and_teaches_two_objectives_is_refused_when_it_is_asked_for() -> None:
    method = AdversarialTraining(perturber(), Both(), KL(), climb=Objective(task=0))
    with pytest.raises(ConfigurationError, match=r"expected one objective where one backward .*use PGD"):
        method.step(pixel_net(), pixels())
    AdversarialTraining(perturber(), Both(), KL()).step(pixel_net(), pixels())


@pytest.mark.parametrize(
    ("words", "make"),
    [
        pytest.param("a task or a penalty above 0", lambda: Objective(task=0, penalty=0), id="neither"),
        pytest.param("weight task to be a finite number of 0 or more, got -1", lambda: Objective(task=-1), id="task"),
        pytest.param("weight penalty to be .*, got nan", lambda: Objective(penalty=float("nan")), id="penalty"),
        pytest.param("loss as a function of outputs and batch, got 1", lambda: Objective(loss=1), id="loss"),
        pytest.param(
            "a regularizer on perturbed passes for teach=.*, got none",
            lambda: AdversarialTraining(perturber(), PGD(1), teach=Objective(task=0)),
            id="no-regularizer",
        ),
        pytest.param(
            "a regularizer on perturbed passes for climb=.*, got none",
            lambda: AdversarialTraining(perturber(), PGD(1), climb=Objective(task=0)),
            id="no-regularizer-to-climb",
        ),
        pytest.param(
            "a regularizer on perturbed passes for teach=.*, got none",
            lambda: AdversarialTraining(
                perturber(), PGD(1), KL(reference=Frozen(pixel_net().model), on="clean"), teach=Objective(task=0)
            ),
            id="only-on-clean",
        ),
        pytest.param(
            "climb as an Objective",
            lambda: AdversarialTraining(perturber(), PGD(1), climb="penalty"),  # type: ignore[arg-type]
            id="text",
        ),
        pytest.param(
            "a clean pass for track_stats='clean', got none",
            lambda: AdversarialTraining(
                perturber(), PGD(1), KL(reference=Frozen(pixel_net().model)), track_stats="clean"
            ),
            id="statistics-of-no-clean-pass",
        ),
    ],
)
def test_objectives_that_make_no_sense_are_refused(words: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_penalty_is_not_climbed_from_where_it_vanishes() -> None:
    options = {"clean_weight": 1.0, "teach": Objective(task=0.0), "dropout": "shared"}
    for start, refused in ((Zero(), True), (Normal(1e-3), False)):
        perturber = EmbeddingPerturber(image=Ascent(Linf(0.1), step_size=0.05, start=start))
        with pytest.raises(ConfigurationError, match="expected a start such as") if refused else nullcontext():
            AdversarialTraining(perturber, PGD(2), KL(6.0), **options)
