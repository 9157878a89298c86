"""ViLTA's masked-word loss is, in float64, its formula; alone, under VILLA's perturbations, and for each kind of teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.plain import agree, agree_on_gradients, gradients_of, word_net, words
from torch import Tensor

from advvl import Averaged, Frozen, Objective, SoftCrossEntropy, SymmetricKL, trades, villa, vilta
from advvl.errors import ConfigurationError, ShapeError


def mixture(
    logits: Tensor, y: Tensor, teacher: Tensor, *, alpha: float, temperature: float, top_k: int | None
) -> Tensor:
    q = (teacher / temperature).exp()
    if top_k is not None:
        q = torch.where(teacher >= teacher.sort(1, descending=True).values[:, top_k - 1 : top_k], q, 0)
    q = q / q.sum(1, keepdim=True)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    hard = -log_p[torch.arange(len(y)), y]
    return ((1 - alpha) * hard + alpha * -(q * log_p).sum(1)).mean()


def teacher_of(batch: Any) -> tuple[Frozen, Tensor]:
    other = word_net().model
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    return Frozen(other.eval()), other(**batch)["logits"].detach()


@pytest.mark.parametrize("options", [{}, {"alpha": 0.7, "temperature": 2.5}, {"top_k": 2}, {"alpha": 1.0, "top_k": 9}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_alone(options: dict[str, Any], dropout: float) -> None:
    batch = words()
    ours, theirs = word_net(dropout=dropout), word_net(dropout=dropout).model
    teacher, logits = teacher_of(batch)
    torch.manual_seed(7)
    report = vilta(teacher, **options).step(ours, batch, generator=torch.Generator())

    torch.manual_seed(7)
    options = {"alpha": 0.4, "temperature": 1.0, "top_k": None, **options}
    options["top_k"] = options["top_k"] if (options["top_k"] or 9) < 5 else None
    loss = mixture(theirs(**batch)["logits"], batch["y"], logits, **options)
    agree(report.loss, loss.detach(), 1e-9)
    agree_on_gradients(ours.model, gradients_of(loss, theirs))
    assert report.passes == 1
    assert all(parameter.grad is None for parameter in teacher.frozen.parameters())


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_under_villas_perturbations(clean_weight: float) -> None:
    """Both K passes and the clean term have the mixture; KL and moves are VILLA's."""
    batch, step, kl_weight, passes, alpha = words(), 0.3, 1.5, 2, 0.4
    ours, theirs = word_net(), word_net().model
    teacher, logits = teacher_of(batch)
    adversary = villa({"text": step}, steps=passes, kl_weight=kl_weight, clean_weight=clean_weight)
    report = vilta(teacher, alpha=alpha, adversary=adversary).step(ours, batch)

    options = {"alpha": alpha, "temperature": 1.0, "top_k": None}
    clean = theirs(**batch)["logits"]
    loss = clean_weight * mixture(clean, batch["y"], logits, **options)
    delta = torch.zeros(*batch["ids"].shape, 6, dtype=torch.float64)
    for _ in range(passes):
        delta = delta.detach().requires_grad_()
        found = theirs(**batch, delta=delta)["logits"]
        p, q = clean.softmax(1), found.softmax(1)
        own = mixture(found, batch["y"], logits, **options) + kl_weight * ((p - q) * (p.log() - q.log())).sum(1).mean()
        (gradient,) = torch.autograd.grad(own, delta, retain_graph=True)
        loss = loss + own / passes
        gradient = gradient * batch["mask"].unsqueeze(-1)
        delta = delta + step * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    agree(report.loss, loss.detach(), 1e-9)
    agree_on_gradients(ours.model, gradients_of(loss, theirs))


def test_a_momentum_average_is_a_teacher_as_any() -> None:
    batch, ours = words(), word_net()
    average = Averaged(ours.model, decay=0.995)
    report = vilta(average, alpha=1.0).step(ours, batch)
    p = word_net().model(**batch)["logits"].softmax(1)
    agree(report.loss, -(p * p.log()).sum(1).mean().detach(), 1e-9)  # its own entropy, as both are equal


def test_a_penalty_that_is_climbed_alone_stays_alone() -> None:
    teacher, _ = teacher_of(words())
    method = vilta(teacher, adversary=trades(radius=0.1, step_size=0.1, modality="text"))
    assert [type(one).__name__ for one in method.regularizers] == ["KL", "SoftCrossEntropy"]
    assert method.regularizers[1].on == "clean"
    assert method.clean_weight == 0.6


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
def test_the_adversarys_weight_of_penalties_is_not_that_of_soft_labels(clean_weight: float) -> None:
    """The same adversary written in two ways gives the same mixture."""
    teacher, batch = teacher_of(words())[0], words()
    halved = replace(villa({"text": 0.3}, clean_weight=clean_weight), teach=Objective(penalty=0.5))
    plain = replace(halved, teach=Objective(), regularizer=SymmetricKL(0.5))
    found = []
    for adversary in (replace(halved, regularizer=SymmetricKL(1.0)), plain):
        target = word_net()
        report = vilta(teacher, adversary=adversary).step(target, batch)
        found.append((report.loss, {name: p.grad for name, p in target.model.named_parameters()}))
    agree(found[0][0], found[1][0], 1e-9)
    for name, gradient in found[1][1].items():
        agree(found[0][1][name], gradient, 1e-9)


def test_an_adversary_without_a_weight_of_penalties_is_refused() -> None:
    none = replace(villa({"text": 0.3}), regularizer=None, teach=Objective(penalty=0.0))
    with pytest.raises(ConfigurationError, match=r"teach.penalty as a finite number above 0, got 0.0"):
        vilta(teacher_of(words())[0], adversary=none)


def test_masked_rows_do_not_count() -> None:
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    soft = SoftCrossEntropy(reference=Frozen(torch.nn.Identity()))
    bad = torch.where(mask[..., None], student, math.nan).requires_grad_()
    found = soft(teacher, bad, mask)
    torch.testing.assert_close(found, soft(teacher[mask], student[mask]))
    found.backward()
    assert bad.grad is not None
    assert bad.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha to be a number in \(0, 1\], got 0.0"),
        ({"alpha": 1.2}, r"alpha to be a number in \(0, 1\], got 1.2"),
        ({"alpha": "x"}, r"alpha to be a number in \(0, 1\], got 'x'"),
        ({"adversary": "villa"}, "expected a method such as pgd.*, got 'villa'; give an AdversarialTraining"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0"),
        ({"top_k": 0}, "top_k of 1 or more, or None, got 0"),
        ({"teacher": None}, "a reference as the teacher, got None"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        vilta(**{"teacher": teacher_of(words())[0], **options})


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    soft = SoftCrossEntropy(reference=Frozen(torch.nn.Identity()))
    with pytest.raises(ShapeError, match=r"a teacher of the same 5 classes, got 7; take one with the same vocabulary"):
        soft(torch.zeros(2, 7), torch.zeros(2, 5))
