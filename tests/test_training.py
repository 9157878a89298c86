"""A training step: equal to the published loop, at reduced cost, with nothing left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.compare import close
from support.counting import HostReads
from support.published import villa as published_villa
from support.toy import STEP_SIZES, ToyModel, gradients, perturber, toy, toy_batch, toy_sites
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advvl import (
    KL,
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Linf,
    PassTrace,
    Site,
    StepReport,
    SymmetricKL,
    Uniform,
    adapt,
    ops,
)
from advvl.errors import ConfigurationError, NonFiniteError, RandomnessError, ShapeError, SiteError
from advvl.runtime.randomness import RandomState


def zeros(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "text": torch.zeros(*batch["ids"].shape, 8, dtype=torch.float64),
        "image": torch.zeros_like(batch["regions"]),
    }


CASES = [
    pytest.param(
        modalities, order, norm, radius, dropout, id=f"{'+'.join(modalities)}-{order}-{norm}-{radius}-dropout{dropout}"
    )
    for modalities, order in [
        (("text",), "together"),
        (("image",), "together"),
        (("text", "image"), "together"),
        (("text", "image"), "in turn"),
    ]
    for norm, radius in [("l2", math.inf), ("l2", 0.4), ("linf", 0.35)]
    for dropout in (0.0, 0.3)
]


@pytest.mark.parametrize("masks", ["fresh", "shared"])
@pytest.mark.parametrize(("modalities", "order", "norm", "radius", "dropout"), CASES)
def test_villa_is_the_published_loop(
    modalities: tuple[str, ...], order: str, norm: str, radius: float, dropout: float, masks: str
) -> None:
    """Logits, deltas, their gradients, the loss and every parameter gradient, whichever masks the passes see."""
    batch, steps = toy_batch(), 3
    theirs = toy(dropout=dropout)
    torch.manual_seed(7)
    first = RandomState.of(theirs.model)
    record = published_villa(
        theirs,
        batch,
        zeros(batch),
        step_sizes={m: STEP_SIZES[m] for m in modalities},
        steps=steps,
        norm=norm,
        radius=radius,
        alter=order == "in turn",
        before_pass=first.replay if masks == "shared" else lambda: None,
    )
    ours, passes = toy(dropout=dropout), list[PassTrace]()
    torch.manual_seed(7)
    ball = L2(radius) if norm == "l2" else Linf(radius)
    method = AdversarialTraining(
        perturber(*modalities, ball=ball),
        FreeLB(steps, order),
        SymmetricKL(1.5),
        dropout=masks,
    )  # type: ignore[arg-type]
    report = method.step(ours, batch, trace=passes.append)

    close(report.loss, torch.as_tensor(record.loss))
    turns = len(modalities) if order == "in turn" else 1
    for logits, seen in zip(record.logits, passes, strict=True):
        close(seen.logits, logits)
    for step, turn in itertools.product(range(steps), range(turns)):
        seen = passes[1 + step * turns + turn]
        for modality in seen.modalities:
            close(seen.deltas[modality], record.deltas[step][modality])
            if step < steps - 1:
                close(seen.gradients[modality], record.gradients[step][modality])
    expected, found = gradients(theirs), gradients(ours)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        close(found[name], gradient)


@pytest.mark.parametrize(
    ("masks", "order", "forwards"),
    [("fresh", "together", 4), ("shared", "together", 3), ("fresh", "in turn", 7), ("shared", "in turn", 5)],
)
def test_the_clean_branch_costs_what_the_algebra_says(masks: str, order: str, forwards: int) -> None:
    batch, target = toy_batch(), toy()
    AdversarialTraining(perturber(), FreeLB(3, order), SymmetricKL(), dropout=masks).step(target, batch)  # type: ignore[arg-type]
    report = AdversarialTraining(perturber(), FreeLB(3, order), SymmetricKL(), dropout=masks).step(target, batch)  # type: ignore[arg-type]
    assert report.passes == forwards


@pytest.mark.parametrize("masks", ["fresh", "shared"])
@pytest.mark.parametrize("maximizer", [FreeLB(3), FreeLB(3, "in turn"), PGD(2)], ids=repr)
def test_one_backward_over_both_graphs_and_one_each_give_the_same_gradient(maximizer: Any, masks: Any) -> None:
    """Under DDP (whose `no_sync` the argument stands for) it is one, elsewhere one each; a scaled backward in both."""
    found = []
    for sync in (None, lambda: nullcontext()):
        target, calls = toy(dropout=0.3), []
        torch.manual_seed(7)
        method = AdversarialTraining(perturber(), maximizer, SymmetricKL(1.5), clean_weight=0.5, dropout=masks)

        def backward(loss: Tensor, calls: list[Tensor] = calls) -> None:
            calls.append(loss)
            (4 * loss).backward()

        method.step(target, toy_batch(), sync=sync, backward=backward)
        found.append((gradients(target), len(calls)))
    (apart, more), (jointly, fewer) = found
    assert more == fewer + 1
    for name, gradient in jointly.items():
        close(apart[name], gradient)


def test_a_clean_weight_adds_the_clean_task_gradient() -> None:
    batch = toy_batch()
    method = lambda weight: AdversarialTraining(perturber(), FreeLB(3), SymmetricKL(), clean_weight=weight)  # noqa: E731
    without, with_, clean = toy(), toy(), toy()
    method(0.0).step(without, batch)
    report = method(0.7).step(with_, batch)
    task = clean.forward(batch)["loss"].mean()
    task.backward()
    for name, gradient in gradients(with_).items():
        close(gradient, gradients(without)[name] + 0.7 * gradients(clean)[name])
    close(report.loss - method(0.0).step(toy(), batch).loss, 0.7 * task.detach())


@pytest.mark.parametrize("masks", ["fresh", "shared"])
def test_a_detached_clean_branch_gets_no_gradient(masks: str) -> None:
    batch, ours, theirs = toy_batch(), toy(), toy()
    AdversarialTraining(perturber(), FreeLB(2), KL(0.8, detach_clean=True), dropout=masks).step(ours, batch)  # type: ignore[arg-type]
    passes = list[PassTrace]()
    AdversarialTraining(perturber(), FreeLB(2), KL(0.8, detach_clean=True)).step(toy(), batch, trace=passes.append)
    clean = theirs.forward(batch)["logits"].detach()
    for seen in passes[1:]:
        with theirs.inject(seen.deltas):
            outputs = theirs.forward(batch)
        ((outputs["loss"].mean() + KL(0.8)(clean, outputs["logits"])) / 2).backward()
    for name, gradient in gradients(theirs).items():
        close(gradients(ours)[name], gradient)


def test_pgd_trains_at_its_last_point_only() -> None:
    batch, ours, theirs = toy_batch(), toy(), toy()
    passes = list[PassTrace]()
    AdversarialTraining(perturber(ball=L2(0.5)), PGD(4)).step(ours, batch, trace=passes.append)
    assert [seen.weight for seen in passes] == [0, 0, 0, 0, 1]
    with theirs.inject(passes[-1].deltas):
        theirs.forward(batch)["loss"].mean().backward()
    for name, gradient in gradients(theirs).items():
        close(gradients(ours)[name], gradient)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.7])
def test_a_scaled_backward_changes_nothing_but_the_scale(scale: float) -> None:
    """What the maximiser is sent does not depend on a loss scale, and neither does the clean branch."""
    batch, plain, scaled = toy_batch(), toy(), toy()
    method = AdversarialTraining(perturber(ball=L2(0.5)), FreeLB(3, "in turn"), SymmetricKL(2.0), clean_weight=0.5)
    one, two = list[PassTrace](), list[PassTrace]()
    method.step(plain, batch, trace=one.append)
    method.step(scaled, batch, backward=lambda total: (total * scale).backward(), trace=two.append)
    for name, gradient in gradients(plain).items():
        close(gradients(scaled)[name] / scale, gradient)
    for a, b in zip(one, two, strict=True):
        for modality, gradient in a.gradients.items():
            close(b.gradients[modality], gradient)


def test_all_passes_but_the_last_are_run_in_the_callers_own_sync() -> None:
    quiet, forwards, backwards = [False], list[bool](), list[bool]()

    @contextmanager
    def sync() -> Iterator[None]:
        quiet[0] = True
        yield
        quiet[0] = False

    def backward(total: Tensor) -> None:
        backwards.append(quiet[0])
        total.backward()

    target = toy()
    target.model.register_forward_hook(lambda *_: forwards.append(quiet[0]))
    AdversarialTraining(perturber(), FreeLB(3), SymmetricKL()).step(target, toy_batch(), sync=sync, backward=backward)
    assert forwards == [True, True, True, False]
    assert backwards == [True, True, False]


@pytest.mark.parametrize("kind", [KL, SymmetricKL])
def test_only_the_positions_that_count_are_kept_steady(kind: type[KL] | type[SymmetricKL]) -> None:
    """A head over every token, as in masked language modelling: the batch says which are compared."""

    class Tagger(ToyModel):
        def forward(self, ids: Tensor, regions: Tensor, labels: Tensor, **masks: Tensor) -> dict[str, Tensor]:
            tags = self.head(torch.tanh(self.mix(self.words(ids) + self.project(regions).mean(1, keepdim=True))))
            return {"tags": tags, "loss": nn.functional.cross_entropy(tags[:, 0], labels, reduction="none")}

    batch, theirs, passes = toy_batch(), Tagger().double(), list[PassTrace]()
    ours = Adapter(Tagger().double(), toy_sites(), logits=lambda o: o["tags"], positions=lambda b: b["mask"])
    ours.model.load_state_dict(theirs.state_dict())
    AdversarialTraining(perturber(), FreeLB(2), kind(0.7)).step(ours, batch, trace=passes.append)
    other = Adapter(theirs, toy_sites())
    clean, kept = theirs(**batch)["tags"], batch["mask"]
    total = torch.zeros((), dtype=torch.float64)
    for seen in passes[1:]:
        with other.inject(seen.deltas):
            outputs = theirs(**batch)
        total = total + (outputs["loss"].mean() + kind(0.7)(clean[kept], outputs["tags"][kept])) / 2
    total.backward()
    for name, gradient in gradients(other).items():
        close(gradients(ours)[name], gradient)


@pytest.mark.parametrize("masks", ["fresh", "shared"])
def test_a_step_on_an_empty_batch_has_no_loss_and_no_gradient(masks: str) -> None:
    target = toy()
    method = AdversarialTraining(perturber(ball=L2(0.5)), FreeLB(2), SymmetricKL(), clean_weight=0.5, dropout=masks)  # type: ignore[arg-type]
    report = method.step(target, toy_batch(0))
    assert report.loss == 0
    assert not any(gradient.any() for gradient in gradients(target).values())


def test_gradients_add_to_what_was_there() -> None:
    batch, once, twice = toy_batch(), toy(), toy()
    method = AdversarialTraining(perturber(), FreeLB(2), SymmetricKL())
    method.step(once, batch)
    method.step(twice, batch)
    method.step(twice, batch)
    for name, gradient in gradients(once).items():
        close(gradients(twice)[name], 2 * gradient)


def test_free_at_updates_once_a_replay_and_carries_the_perturbation() -> None:
    target, theirs = toy(), toy()
    optimizer, other = (torch.optim.SGD(t.model.parameters(), lr=0.1) for t in (target, theirs))
    updates, state = [], AscentState()

    def update() -> None:
        updates.append(1)
        optimizer.step()
        optimizer.zero_grad()

    radius = 0.25
    method = AdversarialTraining(
        EmbeddingPerturber(image=Ascent(Linf(radius), step_size=radius, rule="sign")), FreeAT(3)
    )
    carried = torch.zeros_like(toy_batch()["regions"])
    for seed in range(3):
        batch = toy_batch(seed=seed)
        method.step(target, batch, update=update, state=state)
        for _ in range(3):
            leaf = carried.clone().requires_grad_()
            with theirs.inject({"image": leaf}):
                theirs.forward(batch)["loss"].mean().backward()
            carried = (carried + radius * leaf.grad.sign()).clamp(-radius, radius)
            carried = carried * batch["region_mask"].unsqueeze(-1)
            other.step()
            other.zero_grad()
    assert len(updates) == 9
    close(state.deltas["image"], carried)
    for ours, expected in zip(target.model.parameters(), theirs.model.parameters(), strict=True):
        close(ours.detach(), expected.detach())


def test_a_forward_within_update_is_clean() -> None:
    target, batch = toy(), toy_batch()
    with target.clean():
        expected = target.forward(batch)["logits"].detach()
    found = []

    def update() -> None:
        found.append(target.model(**batch)["logits"].detach())
        target.model.zero_grad()

    AdversarialTraining(perturber(), FreeLB(2), SymmetricKL()).step(target, batch, update=update)
    close(found[0], expected)


def test_free_at_recomputes_its_clean_branch_after_every_update() -> None:
    target = toy()
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)
    passes = list[PassTrace]()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    AdversarialTraining(perturber(), FreeAT(2, carry=False), SymmetricKL()).step(
        target, toy_batch(), update=update, trace=passes.append
    )
    clean = [seen.logits for seen in passes if not seen.modalities]
    assert len(clean) == 2
    assert not torch.equal(clean[0], clean[1])


def test_free_at_refuses_what_it_cannot_do_rightly() -> None:
    method = AdversarialTraining(perturber(), FreeAT(2))
    with pytest.raises(ConfigurationError, match="expected update="):
        method.step(toy(), toy_batch(), state=AscentState())
    with pytest.raises(ConfigurationError, match="expected state=AscentState"):
        method.step(toy(), toy_batch(), update=lambda: None)
    accumulating = toy()
    accumulating.model.require_backward_grad_sync = False  # as DDP has it inside its no_sync
    with pytest.raises(ConfigurationError, match="expected no gradient accumulation with 2 updates"):
        method.step(accumulating, toy_batch(), update=lambda: None, state=AscentState())


class Poisoned(ToyModel):
    """Its loss is of a kind whose gradient in row 1 is not a number."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        outputs = super().forward(*args, **kwargs)
        factor = torch.ones_like(outputs["loss"])
        factor[1] = math.nan
        return {**outputs, "loss": outputs["loss"] * factor}


def test_a_gradient_that_is_not_finite_is_an_error_naming_modality_and_rows() -> None:
    target = Adapter(Poisoned().double(), toy_sites())
    updates: list[int] = []
    with pytest.raises(NonFiniteError, match=r"'text' perturbation in rows \[1\].*\.grad is unusable"):
        AdversarialTraining(perturber(), FreeLB(2)).step(target, toy_batch(), update=lambda: updates.append(1))
    assert not updates


def test_kept_rows_do_not_move_and_are_counted() -> None:
    target, passes = Adapter(Poisoned().double(), toy_sites()), list[PassTrace]()
    report = AdversarialTraining(perturber(), FreeLB(3), nonfinite="keep").step(
        target, toy_batch(), trace=passes.append
    )
    assert {m: int(n) for m, n in report.nonfinite.items()} == {"text": 1, "image": 1}
    moved = passes[-1].deltas["image"].flatten(1).abs().amax(1)
    assert moved[1] == 0
    assert (moved[[0, 2]] > 0).all()


def test_a_model_that_raises_leaves_no_hook_and_nothing_bound() -> None:
    class Raises(ToyModel):
        passes = 0

        def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            Raises.passes += 1
            if Raises.passes == 3:
                raise ValueError("the third pass fails")
            return super().forward(*args, **kwargs)

    model = Raises().double()
    target = Adapter(model, toy_sites())
    with pytest.raises(ValueError, match="third pass"):
        AdversarialTraining(perturber(), FreeLB(3), SymmetricKL()).step(target, toy_batch())
    assert target._holder.binding is None
    target.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unregistered_model_must_be_adapted_by_hand() -> None:
    with pytest.raises(SiteError, match="registered adapter"):
        AdversarialTraining(perturber(), FreeLB(2)).step(ToyModel(), toy_batch())


def test_a_modality_without_a_site_is_an_error() -> None:
    sound = EmbeddingPerturber(audio=Ascent(L2(), step_size=0.1))
    with pytest.raises(SiteError, match=r"among \['image', 'text'\], got 'audio'"):
        AdversarialTraining(sound, FreeLB(2)).step(toy(), toy_batch())


class OwnDice(ToyModel):
    """Drops out by a generator of its own, which replaying torch's does not repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = torch.Generator().manual_seed(1)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        outputs = super().forward(*args, **kwargs)
        keep = torch.rand(outputs["logits"].shape, generator=self.dice, dtype=torch.float64)
        return {**outputs, "logits": outputs["logits"] * keep}


def test_randomness_that_cannot_be_replayed_is_refused() -> None:
    target = Adapter(OwnDice().double(), toy_sites())
    with pytest.raises(RandomnessError, match="use dropout='fresh'"):
        AdversarialTraining(perturber(), FreeLB(2), SymmetricKL(), dropout="shared").step(target, toy_batch())


class Normed(ToyModel):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.norm, self.checkpointed = nn.BatchNorm1d(8), checkpointed

    def forward(self, ids: Tensor, regions: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        outputs = super().forward(ids, regions, *args, **kwargs)
        words = nn.functional.embedding(ids, self.words.weight)
        normed = checkpoint(self.normed, words, use_reentrant=False) if self.checkpointed else self.normed(words)
        return {**outputs, "loss": outputs["loss"] + normed.square().mean((1, 2))}

    def normed(self, words: Tensor) -> Tensor:
        return self.norm(words.flatten(0, 1)).tanh().view(words.shape)  # type: ignore[no-any-return]


def normed(*, checkpointed: bool = False, sync: Any = None, **options: Any) -> Adapter:
    """After a step, in which the clean pass has a backward too."""
    torch.manual_seed(0)
    target = Adapter(Normed(checkpointed=checkpointed).double(), toy_sites())
    method = AdversarialTraining(perturber(), FreeLB(3), SymmetricKL(), clean_weight=0.5, **options)
    method.step(target, toy_batch(), sync=sync)
    return target


@pytest.mark.parametrize("dropout", ["fresh", "shared"])
@pytest.mark.parametrize(("track", "seen"), [("all", {"fresh": 4, "shared": 3}), ("clean", {"fresh": 1, "shared": 1})])
def test_running_statistics_see_the_configured_passes(track: str, seen: dict[str, int], dropout: str) -> None:
    norm = normed(track_stats=track, dropout=dropout).model.norm
    assert int(norm.num_batches_tracked) == seen[dropout]
    assert norm.track_running_stats


@pytest.mark.parametrize("dropout", ["fresh", "shared"])
@pytest.mark.parametrize("sync", [None, nullcontext], ids=["a backward each", "one backward"])
def test_statistics_of_the_clean_pass_are_those_without_checkpointing(dropout: Any, sync: Any) -> None:
    one, two = (normed(checkpointed=c, sync=sync, track_stats="clean", dropout=dropout) for c in (False, True))
    for name, buffer in one.model.named_buffers():
        assert torch.equal(dict(two.model.named_buffers())[name], buffer)
    for name, gradient in gradients(one).items():
        close(gradients(two)[name], gradient)


def test_statistics_of_all_passes_count_what_checkpointing_runs_again_as_torch_does() -> None:
    plain = Normed(checkpointed=True).double()
    plain(**toy_batch())["loss"].mean().backward()
    assert int(plain.norm.num_batches_tracked) == 2
    assert int(normed(checkpointed=True).model.norm.num_batches_tracked) == 2 * 4


class Buffered(ToyModel):
    """Frozen statistics and a scale, which backwards need, and a count, which every forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        self.calls = self.calls + 1
        outputs = super().forward(ids, *args, **kwargs)
        words = self.norm.eval()((nn.functional.embedding(ids, self.words.weight) * self.scale).flatten(0, 1)).view(
            *ids.shape, 8
        )
        return {**outputs, "loss": outputs["loss"] + words.square().mean((1, 2))}


def test_seeing_that_replay_works_leaves_buffers_as_they_are_and_usable_by_the_backward() -> None:
    fresh, shared = (Adapter(Buffered().double(), toy_sites()) for _ in range(2))
    shared.model.load_state_dict(fresh.model.state_dict())
    for target, dropout in ((fresh, "fresh"), (shared, "shared")):
        method = AdversarialTraining(perturber(), FreeLB(3), SymmetricKL(), dropout=dropout)  # type: ignore[arg-type]
        report = method.step(target, toy_batch())
        assert target.model.calls == report.passes
    for name, gradient in gradients(fresh).items():
        close(gradients(shared)[name], gradient)


@pytest.mark.parametrize("start", [0.0, 0.2])
def test_the_same_seed_gives_the_same_bits(start: float) -> None:
    def run() -> tuple[StepReport, dict[str, Tensor]]:
        target = toy(dropout=0.2)
        torch.manual_seed(3)
        options = {"start": Uniform(start)} if start else {}
        return AdversarialTraining(perturber(ball=L2(0.5), **options), FreeLB(3), SymmetricKL()).step(
            target, toy_batch()
        ), gradients(target)

    (one, first), (two, second) = run(), run()
    assert torch.equal(one.loss, two.loss)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_random_starts_leave_replayed_dropout_alone() -> None:
    target, passes = toy(dropout=0.4), list[PassTrace]()
    method = AdversarialTraining(perturber(start=Uniform(1e-9)), FreeLB(2), SymmetricKL(), dropout="shared")
    method.step(target, toy_batch(), trace=passes.append)
    torch.testing.assert_close(passes[0].logits, passes[1].logits, rtol=0, atol=1e-7)


def test_half_precision_reports_how_much_of_the_perturbation_survives_the_cast() -> None:
    batch = toy_batch(dtype=torch.bfloat16)
    tiny = EmbeddingPerturber(image=Ascent(L2(), step_size=1e-4, start=Uniform(1e-4)))
    report = AdversarialTraining(tiny, FreeLB(2)).step(toy(dtype=torch.bfloat16), batch)
    assert report.effective["image"].shape == (3,)
    assert float(report.effective["image"].min()) < 0.9
    assert not AdversarialTraining(tiny, FreeLB(2)).step(toy(), toy_batch()).effective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clean_weight": -1.0}, "finite clean_weight"),
        ({"dropout": "none"}, "expected dropout"),
        ({"nonfinite": "ignore"}, "expected nonfinite"),
        ({"track_stats": "clean"}, "expected a clean pass"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AdversarialTraining(perturber(), FreeLB(2), **options)


@pytest.mark.parametrize("kind", [AdversarialTraining, Attack])
def test_parts_in_each_others_places_are_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a perturber such as .*, got FreeLB\(steps=2"):
        kind(FreeLB(2), perturber())
    with pytest.raises(ConfigurationError, match=r"expected an inner maximiser such as .*, got L2"):
        kind(perturber(), L2())


def test_anything_but_a_regulariser_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a regulariser such as .*, got 'kl'"):
        AdversarialTraining(perturber(), FreeLB(2), "kl")  # type: ignore[arg-type]


@pytest.mark.parametrize(("what", "value"), [("mask", None), ("rows", [0, 1, 2])])
def test_a_mask_or_rows_that_are_no_tensor_are_refused(what: str, value: Any) -> None:
    site, kind = Site("words", **{what: lambda batch: value}), type(value).__name__
    with pytest.raises(ShapeError, match=f"expected {what} of the site of 'text' to be a tensor, got {kind}"):
        AdversarialTraining(perturber("text"), FreeLB(2)).step(
            Adapter(ToyModel().double(), {"text": site}), toy_batch()
        )


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_losses_of_some_rows_alone_are_refused(kept: int) -> None:
    def some(outputs: Any, batch: Any) -> Tensor:
        losses: Tensor = outputs["loss"][:kept]
        return losses

    with pytest.raises(ShapeError, match=f"expected one loss per row, got {kept} for 3 rows of logits"):
        AdversarialTraining(perturber(), FreeLB(2)).step(toy(), toy_batch(), loss=some)
    with pytest.raises(ShapeError, match=f"expected one loss per row, got {kept} for 3 rows of logits"):
        Attack(perturber(), PGD(2), loss=some)(toy(), toy_batch())


def test_losses_of_fewer_entries_than_rows_are_taken_if_the_logits_are_of_those_entries() -> None:
    """As of masked words, of which some rows may have none."""
    target = toy()
    target.call = lambda model, batch: {name: value[:2] for name, value in model(**batch).items()}
    AdversarialTraining(perturber(), FreeLB(2)).step(target, toy_batch())


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected a loss as a scalar tensor .*, got float"):
        AdversarialTraining(perturber(), FreeLB(2)).step(toy(), toy_batch(), loss=lambda outputs, batch: 3.0)  # type: ignore[arg-type,return-value]


def test_a_static_graph_is_refused_with_the_reason() -> None:
    target = toy()
    target.model.static_graph = True
    with pytest.raises(ConfigurationError, match="without static_graph"):
        AdversarialTraining(perturber(), FreeLB(2)).step(target, toy_batch())


def test_a_backward_that_differentiates_something_else_is_refused_with_a_remedy() -> None:
    with pytest.raises(SiteError, match=r"but it did not; call backward\(\) on it or a multiple"):
        AdversarialTraining(perturber(), FreeLB(2)).step(toy(), toy_batch(), backward=lambda loss: None)


def test_a_trace_does_without_logits_and_a_regulariser_does_not() -> None:
    target, passes = toy(), list[PassTrace]()
    bare = Adapter(target.model, toy_sites(), call=lambda model, batch: {"loss": model(**batch)["loss"]})
    target.close()
    AdversarialTraining(perturber(), FreeLB(2), clean_weight=0.5).step(bare, toy_batch(), trace=passes.append)
    assert [found.logits for found in passes] == [None] * 3
    assert passes[1].gradients.keys() == {"text", "image"}
    with pytest.raises(ConfigurationError, match="expected outputs with logits to compare"):
        AdversarialTraining(perturber(), FreeLB(2), SymmetricKL()).step(bare, toy_batch(), trace=passes.append)


def test_a_loss_that_ignores_the_perturbation_is_an_error() -> None:
    target = toy()
    with pytest.raises(SiteError, match="loss to depend on the perturbation of 'text'"):
        AdversarialTraining(perturber(), FreeLB(2)).step(
            target, toy_batch(), loss=lambda outputs, batch: target.model.head.weight.sum()
        )


def test_a_bare_registered_model_is_adapted_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from advvl.adapters import registry

    monkeypatch.setitem(registry._REGISTRY, f"{ToyModel.__module__}.{ToyModel.__qualname__}", "support.toy:adapt_toy")
    model = ToyModel().double()
    AdversarialTraining(perturber(), FreeLB(2)).step(model, toy_batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert adapt(model).sites.keys() == {"text", "image"}


def test_a_row_that_is_fooled_moves_no_further() -> None:
    passes = list[PassTrace]()
    fooled = lambda outputs, batch: torch.tensor([True, False, True])  # noqa: E731
    method = AdversarialTraining(perturber(ball=L2(0.5)), PGD(3, early_stop=True))
    method.step(toy(), toy_batch(), correct=fooled, trace=passes.append)
    sizes = passes[-1].deltas["image"].flatten(1).abs().amax(1)
    assert sizes[1] == 0
    assert (sizes[[0, 2]] > 0).all()


@pytest.mark.parametrize("zeroed", [True, False], ids=["to-none", "in-place"])
def test_several_updates_a_step_take_any_update_that_zeroes(zeroed: bool) -> None:
    target = toy()
    optimizer = torch.optim.SGD(target.model.head.parameters(), lr=0.1)  # of some parameters; the others' .grad stays

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=zeroed)

    AdversarialTraining(perturber(), FreeAT(2)).step(target, toy_batch(), update=update, state=AscentState())


def test_an_update_that_leaves_every_gradient_as_it_was_is_refused_where_a_step_has_several() -> None:
    target = toy()
    skipped: list[None] = []
    with pytest.raises(ConfigurationError, match=r"expected update to step .* let every call take effect"):
        AdversarialTraining(perturber(), FreeAT(2)).step(
            target, toy_batch(), update=lambda: skipped.append(None), state=AscentState()
        )
    assert len(skipped) == 1
    AdversarialTraining(perturber(), FreeLB(2)).step(target, toy_batch(), update=lambda: None)


def test_many_broken_rows_are_named_in_part_and_counted() -> None:
    batch = toy_batch(27)
    batch["regions"][:23] = math.nan
    with pytest.raises(NonFiniteError, match=r"rows \[0, 1, .*19\] and 3 more.*the batch is finite"):
        AdversarialTraining(perturber("text"), FreeLB(2)).step(toy(), batch)


def test_a_loss_without_a_gradient_is_named() -> None:
    method = AdversarialTraining(perturber(), FreeAT(2, carry=False))
    for call in (
        lambda loss: method.step(toy(), toy_batch(), loss=loss, update=lambda: None),
        lambda loss: Attack(perturber(), PGD(1), loss=loss)(toy(), toy_batch()),
    ):
        with pytest.raises(
            ConfigurationError, match=r"expected a loss that requires grad, .*Tensor\.detach in the loss"
        ):
            call(lambda outputs, batch: outputs["loss"].detach())


@pytest.mark.parametrize(("value", "got"), [(torch.ones(3), r"\(3,\)"), (0.5, "float")], ids=["vector", "number"])
def test_a_regulariser_that_gives_no_scalar_is_named(value: Any, got: str) -> None:
    class Odd(KL):
        def __call__(self, *args: Any) -> Any:
            return value

    with pytest.raises(ConfigurationError, match=rf"expected a scalar tensor from Odd, got {got}"):
        AdversarialTraining(perturber(), FreeLB(2), Odd()).step(toy(), toy_batch())


# --- what a step asks of the machine ---


@pytest.mark.parametrize("masks", ["fresh", "shared"])
@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize(("nonfinite", "reads"), [("raise", 1), ("keep", 0)])
def test_a_step_reads_one_number_from_the_device_at_most(
    nonfinite: Any, reads: int, order: Any, masks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops._BACKENDS, "cpu", ops._BACKENDS["reference"])  # on a CPU nothing waits, and it may read
    method = AdversarialTraining(
        perturber(ball=L2(0.4)), FreeLB(3, order), SymmetricKL(), clean_weight=0.5, dropout=masks, nonfinite=nonfinite
    )
    target, batch = toy(dropout=0.3), toy_batch()
    method.step(target, batch)  # with shared masks the first step sees whether replay works
    with HostReads() as seen:
        method.step(target, batch)
    assert seen.count == reads


@pytest.fixture(scope="module")
def compiled() -> Adapter:
    torch._dynamo.reset()
    target = toy()
    target.model.compile(backend="aot_eager")
    return target


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by dynamo itself
@pytest.mark.parametrize("maximizer", [FreeLB(3), FreeLB(2, "in turn"), PGD(2)], ids=repr)
def test_a_compiled_model_takes_the_same_step(compiled: Adapter, maximizer: Any) -> None:
    method, plain = AdversarialTraining(perturber(ball=L2(0.4)), maximizer, SymmetricKL(1.5)), toy()
    compiled.model.zero_grad()
    for target in (plain, compiled):
        for _ in range(2):
            method.step(target, toy_batch())
    close(gradients(compiled), gradients(plain))


def test_pixels_outside_their_box_are_refused_in_training_too() -> None:
    target, batch = toy(), toy_batch()
    method = AdversarialTraining(
        EmbeddingPerturber(image=Ascent(Linf(0.1), step_size=0.05, rule="sign", box=(0.0, 1.0))), PGD(1)
    )
    with pytest.raises(ConfigurationError, match=r"tensor of 'image' inside its box \[0, 1\], got .*%"):
        method.step(target, batch)
    method.step(target, batch | {"regions": batch["regions"].sigmoid()})
    assert target.boxes_verified == {"image"}
