"""Attacks that compare with the clean outputs: a wanted answer, KL, a distance of features; in attacks and worst cases."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, PGD, Adapter, Ascent, Attack, AutoPGD, EmbeddingPerturber, FromClean, Uniform, Zero
from advvl.errors import ConfigurationError, DataError, ShapeError, SiteError
from advvl.evaluation.attempts import searched
from advvl.evaluation.named_attacks import NamedAttack, first_clean
from advvl.evaluation.objectives import (
    cosine_distance,
    kl_from_clean,
    squared_distance,
    targeted_cross_entropy,
    targeted_dlr,
    targeted_margin,
    towards,
)
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import answer_score, own_targets
from advvl.evaluation.worst_case import worst_case
from advvl.runtime.descriptions import described

TARGETED = [targeted_cross_entropy, targeted_margin, targeted_dlr]
DISTANCES = [squared_distance, cosine_distance]
RADIUS = 8.0


class Answerer(nn.Module):
    """Five answers to inputs `(B, 2, 3)`, from hidden features `(B, 8)`; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.site, self.features, self.head = nn.Identity(), nn.Linear(6, 8), nn.Linear(8, 5)
        self.forwards = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.forwards += 1
        features = self.features(self.site(x).flatten(1))
        features = features + torch.tanh(features) / 2
        return {"logits": self.head(features), "features": features}


def answerer() -> tuple[Adapter, dict[str, Tensor]]:
    model = Answerer().double().eval()
    batch = {"x": torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    with torch.no_grad():
        batch["targets"] = model(batch["x"])["logits"].argmax(1)
    return Adapter(model, {"image": "site"}, call=lambda net, batch: net(batch["x"])), batch


def attack(loss: Any, maximizer: Any = None, *, start: Any = None, **options: Any) -> Attack:
    ascent = Ascent(L2(RADIUS), step_size=RADIUS / 2, start=start or Uniform(RADIUS / 4))
    return Attack(EmbeddingPerturber(image=ascent), maximizer or PGD(20, keep="best"), loss=loss, **options)


def under(target: Adapter, batch: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        outputs: dict[str, Tensor] = target.model(batch["x"] + deltas["image"])
    return outputs


@pytest.mark.parametrize("objective", TARGETED)
@pytest.mark.parametrize("answer", [0, 3])
def test_a_targeted_attack_reaches_the_wanted_answer(objective: Any, answer: int) -> None:
    target, batch = answerer()
    deltas = attack(towards(objective, answer=answer))(target, batch).deltas
    logits = under(target, batch, deltas)["logits"]
    if objective is targeted_dlr:  # it wants the answer ahead of the clean one, whatever the others do
        there = batch["targets"] == answer
        assert ((logits[:, answer] > logits.gather(1, batch["targets"][:, None])[:, 0]) | there).all()
        return
    assert (logits.argmax(1) == answer).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_a_targeted_attack_reaches_the_answer_of_a_rank(rank: int) -> None:
    target, batch = answerer()
    order = under(target, batch, {"image": torch.zeros(1)})["logits"].sort(dim=1, descending=True).indices
    deltas = attack(towards(targeted_margin, rank=rank))(target, batch).deltas
    assert torch.equal(under(target, batch, deltas)["logits"].argmax(1), order[:, rank])


CLEAN = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 5.0, 5.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("chosen", "against", "wanted"),
    [
        ({"rank": 1}, [0, 1], [2, 2]),  # of equal logits the first is the answer
        ({"rank": 3}, [0, 1], [1, 0]),
        ({"answer": 1}, [0, 2], [1, 1]),  # where it is wanted, the clean answer is held against the next one
    ],
    ids=str,
)
def test_the_wanted_answer_and_the_one_against_it_are_chosen_by_the_clean_logits(
    chosen: dict[str, int], against: list[int], wanted: list[int]
) -> None:
    def seen(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
        return torch.stack([targets.argmax(1), wanted.argmax(1), targets.sum(1), wanted.sum(1)], 1)

    found = towards(seen, **chosen).compare(torch.zeros_like(CLEAN), CLEAN)
    assert found.tolist() == [[a, w, 1, 1] for a, w in zip(against, wanted, strict=True)]


def test_the_ratio_towards_a_rank_is_the_published_one() -> None:
    """Eq. 7 of Croce & Hein: the wanted logit minus the right one, over the first to the mean of third and fourth."""
    logits = torch.tensor([[1.0, 2.5, 0.5, 4.0], [3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    found = towards(targeted_dlr, rank=1).compare(logits, CLEAN)
    assert found.tolist() == pytest.approx([(0.5 - 1.0) / (4.0 - 0.75), (2.0 - 1.0) / (3.0 - 0.5)])


def test_the_best_over_the_likeliest_answers_is_the_worst_of_their_attacks() -> None:
    """Nothing changes the likeliest other answer of these logits, and a step along x the next one."""
    head = nn.Linear(2, 4).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))
        head.bias.copy_(torch.tensor([1.0, 0.9, 0.5, -5.0]))
    target = Adapter(nn.Sequential(head).eval(), {"image": "0:input"}, call=lambda net, batch: net(batch["x"]))
    batch = {"x": torch.zeros(3, 2).double(), "targets": torch.zeros(3).long()}
    auto: dict[str, Any] = {"maximizer": AutoPGD(10), "start": first_clean, "step_fraction": 2.0}
    ranks = [
        NamedAttack(name=f"to rank {k}", loss=towards(objective, rank=k), **auto)
        for k, objective in ((1, targeted_cross_entropy), (2, targeted_dlr))
    ]
    measured = worst_case(target, [batch], {"image": L2(1.0)}, attacks=ranks, rows=take_rows, checks=False)
    assert measured.scores[0].tolist() == [[1.0] * 3, [0.0] * 3]
    assert measured.worst()[0].tolist() == [0.0] * 3


READ: dict[Any, Callable[[Answerer, Tensor], Tensor]] = {
    None: lambda model, x: model(x)["logits"],
    "features": lambda model, x: model.features(x.flatten(1)),
    (lambda outputs: outputs["features"]): lambda model, x: model(x)["features"],
}


@pytest.mark.parametrize(("reads", "read"), READ.items(), ids=["logits", "module", "function"])
@pytest.mark.parametrize("compare", [*DISTANCES, kl_from_clean])
def test_a_distance_from_the_clean_outputs_is_climbed(compare: Any, reads: Any, read: Any) -> None:
    target, batch = answerer()
    result = attack(FromClean(compare, reads))(target, batch)
    directions = torch.randn(20, 12, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    others = RADIUS * F.normalize(directions, dim=-1).view(20, 12, 2, 3)
    with torch.no_grad():
        clean = read(target.model, batch["x"])
        found, *random = (
            compare(read(target.model, batch["x"] + delta), clean) for delta in (result.deltas["image"], *others)
        )
    torch.testing.assert_close(result.losses, found)
    assert (found > torch.stack(random).mean(dim=0)).all()
    if (compare, reads) == (squared_distance, "features"):  # these are linear: the largest singular value is known
        largest = torch.linalg.matrix_norm(target.model.features.weight.detach(), 2)
        most = (RADIUS * largest) ** 2
        assert (found <= most * (1 + 1e-12)).all()
        assert (found > 0.9 * most).all()


def test_the_clean_pass_runs_once_for_each_batch_and_leaves_no_graph() -> None:
    target, batch = answerer()
    counts: list[int] = []
    kept: list[Tensor] = []

    def compare(perturbed: Tensor, clean: Tensor) -> Tensor:
        assert not clean.requires_grad
        kept.append(clean)
        return kl_from_clean(perturbed, clean)

    for loss in (lambda outputs, batch: outputs["logits"].logsumexp(1), FromClean(compare)):
        target.model.forwards = 0
        attack(loss, PGD(5))(target, batch)
        counts.append(target.model.forwards)
    assert counts == [6, 7]
    assert len(kept) == 6
    assert all(one is kept[0] for one in kept)
    held = weakref.ref(kept[0])
    kept.clear()
    assert held() is None  # nobody holds it afterwards
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_a_batch_is_compared_with_its_own_clean_outputs() -> None:
    target, batch = answerer()
    made = attack(FromClean(squared_distance), start=Zero(), maximizer=PGD(1), end_pass=True)
    for rows in (torch.arange(12), torch.arange(5, 9)):
        result = made(target, take_rows(batch, rows))
        assert result.losses is not None
        assert result.losses.tolist() == [0.0] * len(rows)  # at the clean point it is 0, and no gradient leads away
        assert result.unmoved["image"].all()


@pytest.mark.parametrize("loss", [FromClean(kl_from_clean), towards(targeted_margin, rank=2)], ids=["kl", "targeted"])
def test_the_same_seed_gives_the_same_bits(loss: FromClean) -> None:
    target, batch = answerer()
    first, again = (attack(loss, seed=3)(target, batch).deltas["image"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(attack(loss, seed=4)(target, batch).deltas["image"], first)


@pytest.mark.parametrize("loss", [FromClean(cosine_distance, "features"), FromClean(kl_from_clean)], ids=["name", "kl"])
def test_named_attacks_start_at_random_and_run_beside_the_others(loss: FromClean) -> None:
    target, batch = answerer()
    named = NamedAttack(name="from clean", maximizer=PGD(10), loss=loss)
    measured = worst_case(target, [batch], [{"image": L2(1.0)}, {"image": L2(8.0)}], attacks=[named], rows=take_rows)
    assert not measured.unmoved.any()
    assert measured.worst()[1].mean() < measured.worst()[0].mean()
    assert not [flag for flag in measured.flags if "gradients" in flag.name]
    given = [named.ascents({"image": L2(8.0)}, 0, {}, {})["image"].start, first_clean(0, L2(8.0))]
    assert given == [Uniform(8.0), Zero()]
    assert NamedAttack(name="own", maximizer=PGD(2)).ascents({"image": L2(8.0)}, 0, {}, {})["image"].start == Zero()


def test_a_surrogate_is_compared_with_its_own_clean_outputs() -> None:
    target, batch = answerer()
    other = answerer()[0]
    with torch.no_grad():
        other.model.head.bias += 3.0
    found = []

    def compare(perturbed: Tensor, clean: Tensor) -> Tensor:
        found.append(clean)
        return kl_from_clean(perturbed, clean)

    made = NamedAttack(name="transfer", maximizer=PGD(2), loss=FromClean(compare), surrogate=other)
    worst_case(target, [batch], {"image": L2(1.0)}, attacks=[made], checks=False)
    torch.testing.assert_close(found[0], under(other, batch, {"image": torch.zeros(1)})["logits"])


def test_the_worst_case_counts_a_fall_of_the_score_whatever_answer_was_wanted() -> None:
    """Towards an answer that no perturbation can reach, others are lost on the way, and count."""
    target, batch = answerer()
    with torch.no_grad():
        target.model.head.weight[4].zero_()
        target.model.head.bias[4] = -1e3
    named = NamedAttack(name="to 4", maximizer=PGD(20), loss=towards(targeted_cross_entropy, answer=4))
    budget = {"image": L2(20.0)}
    ended = searched(
        named,
        target,
        batch,
        named.ascents(budget, 0, {}, {}),
        own_targets,
        answer_score(target),
        seed=0,
    ).ended
    assert (under(target, batch, ended)["logits"].argmax(1) != 4).all()
    measured = worst_case(target, [batch], budget, attacks=[named], checks=False)
    assert measured.worst()[0].mean() < measured.clean.mean()


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "neither": (lambda: towards(targeted_margin), ConfigurationError, "either answer of 0 or more or rank of 1"),
    "both": (lambda: towards(targeted_margin, answer=1, rank=1), ConfigurationError, "either answer"),
    "rank 0": (lambda: towards(targeted_margin, rank=0), ConfigurationError, "rank of 1 or more"),
    "answer -1": (lambda: towards(targeted_margin, answer=-1), ConfigurationError, "answer of 0 or more"),
    "a share": (lambda: towards(targeted_margin, rank=1.5), ConfigurationError, "rank"),  # type: ignore[arg-type]
    "objective": (lambda: towards("dlr", rank=1), ConfigurationError, "an objective"),  # type: ignore[arg-type]
    "compare": (lambda: FromClean(3), ConfigurationError, "compare as a function"),  # type: ignore[arg-type]
    "reads": (lambda: FromClean(kl_from_clean, 3), ConfigurationError, "reads as a function"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_parts_that_are_none_are_refused(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


IN_A_RUN: dict[str, tuple[FromClean, type[Exception], str]] = {
    "answer": (towards(targeted_margin, answer=5), DataError, "logits with answer 5, got 5 answers"),
    "rank": (towards(targeted_margin, rank=5), DataError, "logits with rank 5, got 5 answers"),
    "module": (FromClean(cosine_distance, "feature"), SiteError, "'feature'"),
    "no tensor": (FromClean(cosine_distance, lambda outputs: None), ConfigurationError, "reads to give a tensor"),
    "no rows": (FromClean(cosine_distance, lambda outputs: outputs["logits"][:, 0]), ShapeError, "features of one"),
}


@pytest.mark.parametrize(("loss", "error", "words"), IN_A_RUN.values(), ids=IN_A_RUN)
def test_what_the_model_does_not_have_is_refused_and_the_model_left_as_found(
    loss: FromClean, error: type[Exception], words: str
) -> None:
    target, batch = answerer()
    target.model.train()
    with pytest.raises(error, match=words):
        attack(loss)(target, batch)
    assert target.model.training
    assert all(parameter.requires_grad for parameter in target.model.parameters())


def test_a_module_that_does_not_run_is_refused() -> None:
    target, batch = answerer()
    target.model.unused = nn.Linear(1, 1)
    with pytest.raises(SiteError, match="expected the module 'unused' to run in every pass"):
        attack(FromClean(cosine_distance, "unused"))(target, batch)


def test_a_model_that_is_attacked_keeps_no_hook() -> None:
    target, batch = answerer()
    target.close()
    model = target.model
    made = attack(FromClean(squared_distance, "features"))
    adapter = Adapter(model, {"image": "site"}, call=lambda net, batch: net(batch["x"]))
    made(adapter, batch)
    made(adapter, batch)
    assert len(model.features._forward_hooks) == 1  # of the adapter, however often it is attacked
    adapter.close()
    assert not model.features._forward_hooks


def test_attacks_of_different_ranks_are_described_differently() -> None:
    """A measurement says how it was made, and a cache of another one is refused by that."""
    one, two, again = (
        described(NamedAttack(name="a", maximizer=PGD(2), loss=towards(targeted_dlr, rank=rank))) for rank in (1, 2, 1)
    )
    assert one == again != two
