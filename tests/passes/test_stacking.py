"""Passes that do not depend on each other, run as one batch: the same numbers by fewer forwards, and only where exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.compare import close
from support.toy import ToyModel, gradients, perturber, repeat, toy_batch, toy_sites
from support.uniter_batches import uniter_batch
from torch import Tensor, nn

from advvl import L2, Adapter, AdversarialTraining, AscentState, FreeAT, FreeLB, PassTrace, SymmetricKL, Uniform, adapt
from advvl.errors import ConfigurationError, SiteError
from advvl.models.uniter.adapter import repeat as repeat_uniter
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.vqa import UniterForVQA


def target(*, stacks: bool, model: nn.Module | None = None, dropout: float = 0.0, **options: Any) -> Adapter:
    torch.manual_seed(0)
    model = model or ToyModel(dropout=dropout)
    return Adapter(model.double(), toy_sites(), repeat=repeat if stacks else None, **options)


METHODS = {
    "villa": AdversarialTraining(perturber(), FreeLB(3, "in turn"), SymmetricKL(1.5)),
    "villa, projected": AdversarialTraining(perturber(ball=L2(0.4)), FreeLB(3, "in turn"), SymmetricKL(1.5)),
    "villa, clean term": AdversarialTraining(perturber(), FreeLB(3, "in turn"), SymmetricKL(1.5), clean_weight=0.5),
    "detached": AdversarialTraining(perturber(), FreeLB(2, "in turn"), SymmetricKL(detach_clean=True)),
    "random starts": AdversarialTraining(
        perturber(ball=L2(1.0), start=Uniform(0.5)), FreeLB(3, "in turn"), SymmetricKL(1.5)
    ),
    "free AT": AdversarialTraining(perturber(), FreeAT(2, "in turn"), SymmetricKL()),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_batch_gives_what_two_passes_give(name: str) -> None:
    found = []
    for stacks in (False, True):
        ours, passes, seen = target(stacks=stacks), list[PassTrace](), list[dict[str, Tensor]]()

        def update(ours: Adapter = ours, seen: list[dict[str, Tensor]] = seen) -> None:
            seen.append(gradients(ours))
            ours.model.zero_grad()

        report = METHODS[name].step(
            ours,
            toy_batch(),
            trace=passes.append,
            update=update,
            state=AscentState(),
            generator=torch.Generator().manual_seed(0),
        )
        found.append((report, passes, seen))
    (apart, ones, before), (stacked, twos, after) = found
    assert stacked.passes < apart.passes
    close(stacked.loss, apart.loss)
    assert len(ones) == len(twos)
    for one, two in zip(ones, twos, strict=True):
        assert one.modalities == two.modalities
        close(two.logits, one.logits)
        close(two.task_loss, one.task_loss)
        for kind in ("deltas", "gradients"):
            assert getattr(one, kind).keys() == getattr(two, kind).keys()
            for modality, tensor in getattr(one, kind).items():
                close(getattr(two, kind)[modality], tensor)
    for one, two in zip(before, after, strict=True):
        assert one.keys() == two.keys()
        for parameter, gradient in one.items():
            close(two[parameter], gradient)


def forwards(ours: Adapter, dropout: Any = "fresh", loss: Any = None) -> int:
    method = AdversarialTraining(perturber(), FreeLB(3, "in turn"), SymmetricKL(), dropout=dropout)
    return method.step(ours, toy_batch(), loss=loss).passes


class Normed(ToyModel):
    """Rows coupled by the statistics of their batch, when training."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(5, 8), nn.Flatten(0, 1), nn.BatchNorm1d(8, **options))

    def forward(self, ids: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor) -> Any:
        self.project.append(nn.Unflatten(0, regions.shape[:2]))
        try:
            return super().forward(ids, regions, mask, region_mask, labels)
        finally:
            self.project.pop(-1)


def test_it_is_done_only_where_it_is_exact() -> None:
    assert forwards(target(stacks=True)) == 1 + 3
    assert forwards(target(stacks=False)) == 1 + 6, "the model does not say that its rows are independent"
    assert forwards(target(stacks=True), "shared") == 5, "another batch would draw other masks"
    scalar = lambda outputs, batch: outputs["loss"].mean()  # noqa: E731
    assert forwards(target(stacks=True), loss=scalar) == 1 + 6, "a mean over both copies is no mean of either"
    assert forwards(target(stacks=True, model=Normed())) == 1 + 6, "BatchNorm couples the rows"
    assert forwards(target(stacks=True, model=Normed().eval())) == 1 + 3
    assert forwards(target(stacks=True, model=Normed(track_running_stats=False).eval())) == 1 + 6


def test_a_field_that_is_not_repeated_is_named_as_what_to_look_for() -> None:
    def loss(outputs: Any, batch: Any) -> Tensor:
        return outputs["loss"][: len(batch["labels"]) if len(batch["labels"]) < 6 else 5]

    with pytest.raises(ConfigurationError, match="expected 2 x 3 losses from a batch repeated 2 times, got 5"):
        forwards(target(stacks=True), loss=loss)


def test_an_empty_batch_is_stacked_too() -> None:
    method = AdversarialTraining(perturber(), FreeLB(2, "in turn"), SymmetricKL())
    assert method.step(target(stacks=True), toy_batch(rows=0)).loss == 0


def test_a_batch_that_is_not_repeated_is_refused() -> None:
    ours = target(stacks=True)
    ours.repeat = lambda batch, count: batch
    with pytest.raises(SiteError, match="expected 2 copies of the batch at the site of 'text', got 3 rows"):
        forwards(ours)


@pytest.mark.parametrize("loss", [None, lambda outputs, batch: outputs["loss"].mean()], ids=["rows", "scalar"])
@pytest.mark.parametrize("maximizer", [FreeLB(3, "in turn"), FreeAT(2, "in turn", carry=False)], ids=repr)
def test_one_modality_in_turn_is_one_modality(maximizer: Any, loss: Any) -> None:
    found = []
    for order in ("in turn", "together"):
        ours = target(stacks=True)
        method = AdversarialTraining(perturber("text"), replace(maximizer, modalities=order))
        method.step(
            ours, toy_batch(), loss=loss, update=lambda ours=ours: [p.grad.mul_(1) for p in ours.model.parameters()]
        )
        found.append(gradients(ours))
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


def test_a_uniter_repeats_what_has_a_row_for_each_example() -> None:
    batch = {**uniter_batch(), "targets": torch.rand(4, 5), "feat_targets": torch.rand(7, 3), "note": "kept"}
    twice = repeat_uniter(batch, 2)
    assert twice.keys() == batch.keys()
    for name, value in batch.items():
        if name in ("position_ids", "note"):
            assert twice[name] is value
        else:
            assert torch.equal(twice[name], torch.cat([value, value])), name


def test_a_villa_update_in_turn_on_uniter_stacks_to_the_same_gradient() -> None:
    found = []
    batch = {**uniter_batch(), "targets": torch.rand(4, 5, dtype=torch.float64)}
    for stacks in (True, False):
        torch.manual_seed(0)
        ours = adapt(UniterForVQA(UniterConfig.tiny(), num_answers=5).double().eval())
        ours.repeat = ours.repeat if stacks else None
        method = AdversarialTraining(perturber(), FreeLB(3, "in turn"), SymmetricKL(1.5))
        report = method.step(ours, batch)
        found.append((report.passes, gradients(ours)))
    (few, stacked), (many, apart) = found
    assert (few, many) == (1 + 3, 1 + 6)
    for name, gradient in apart.items():
        close(stacked[name], gradient)
