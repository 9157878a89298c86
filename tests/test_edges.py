"""Laws at the edges of the core: refilled buffers, shared state, coincidences of shapes, nothing to perturb."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.toy import ToyModel, toy_batch, toy_sites
from torch import nn

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Site,
    SymmetricKL,
    sites,
)
from advvl.errors import ConfigurationError, ShapeError
from advvl.maximizers.base import AscentState, InnerMaximizer
from advvl.maximizers.eot import EOT
from advvl.maximizers.held import Held
from advvl.maximizers.probes import Probe, Probes
from advvl.maximizers.random_search import RandomSearch
from advvl.passes.scaling import scaled
from advvl.perturbers.base import Perturber
from advvl.perturbers.discrete import DiscretePerturber
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.places import Place
from advvl.perturbers.rules import Momentum
from advvl.perturbers.starts import Given, Sometimes
from advvl.perturbers.universal import UniversalPerturber
from advvl.perturbers.unperturbed import Unperturbed
from advvl.perturbers.weights import WeightAscent
from advvl.runtime.processes import global_mean

ASCENT = Ascent(L2(1.0), step_size=0.4)


def toy(**options: Any) -> Adapter:
    torch.manual_seed(0)
    return Adapter(ToyModel(**options).double(), toy_sites())


def both() -> EmbeddingPerturber:
    return EmbeddingPerturber(text=ASCENT, image=ASCENT)


def test_codes_are_of_this_batch_where_a_loader_refills_one_buffer() -> None:
    """The buffer is written by numpy, which torch's version counter does not see."""
    buffer, seen = np.zeros((2, 3), dtype=np.float64), []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.head = nn.Identity(), nn.Linear(3, 2).double()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            inside = self.inside(x)
            seen.append(inside.detach().clone())
            return {"logits": self.head(inside), "loss": self.head(inside).pow(2).sum(1)}

    method = AdversarialTraining(DiscretePerturber(torch.round, x=replace(ASCENT, step_size=0.1)), PGD(1))
    target = Adapter(Model(), {"x": Site("inside", at="input")})
    for value in (1.2, 5.4):
        buffer[:] = value
        seen.clear()
        method.step(target, {"x": torch.from_numpy(buffer)})
        assert torch.equal(seen[0].round(), torch.full((2, 3), round(value), dtype=torch.float64))


def test_methods_of_other_modalities_share_the_state_that_free_at_carries() -> None:
    target, state = toy(), AscentState()
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    kept = {}
    for modality in ("text", "image", "text"):
        method = AdversarialTraining(EmbeddingPerturber(**{modality: ASCENT}), FreeAT(2))
        report = method.step(target, toy_batch(), update=update, state=state)
        assert set(report.delta_norms) == {modality}
        kept[modality] = state.deltas[modality]
        assert all(torch.equal(state.deltas[name], delta) for name, delta in kept.items())


@dataclass(frozen=True)
class Forgetful(InnerMaximizer):
    """A pass to learn from that says of no update."""

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        feedback = yield Probe(perturber.starts())
        deltas, _ = feedback.move(perturber, {})
        feedback = yield Probe(deltas, weight=1.0, delta_gradients=False)
        return feedback.deltas


def test_a_maximiser_that_forgets_the_update_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="update=True in the last Probe"):
        AdversarialTraining(both(), Forgetful(), SymmetricKL(5.0)).step(toy(), toy_batch())


@pytest.mark.parametrize("count", [4, 5, 6])
def test_losses_of_tokens_may_be_as_many_as_positions(count: int) -> None:
    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return outputs["loss"].repeat(2)[:count]

    AdversarialTraining(EmbeddingPerturber(text=ASCENT), PGD(1)).step(toy(), toy_batch(3, length=5), loss=loss)


def test_padding_asks_for_no_other_loss_scale() -> None:
    calls = []

    def differentiate(scale: float) -> list[torch.Tensor]:
        calls.append(scale)
        return [scale * torch.tensor([[[1.0]], [[0.0]]])]

    scaled(differentiate, {"text": Place(torch.zeros(2, 1, 1), mask=torch.tensor([[True], [False]]))})
    assert len(calls) == 1
    calls.clear()
    scaled(differentiate, {"text": Place(torch.zeros(2, 1, 1))})
    assert len(calls) > 1


def test_looking_for_sites_renormalises_no_embedding() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4, max_norm=0.1), nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.words(ids).mean(1))
            return found

    model = Model()
    before = model.words.weight.detach().clone()
    sites(model, {"ids": torch.tensor([[0, 1]])}, call=lambda model, batch: model(batch["ids"]))
    assert torch.equal(model.words.weight, before)


def test_rows_that_half_precision_swallows_are_counted_without_the_end_pass_too() -> None:
    target = Adapter(ToyModel().bfloat16().eval(), toy_sites())
    small = EmbeddingPerturber(text=Ascent(L2(1e-6), step_size=1e-6))
    batch = toy_batch(2, dtype=torch.bfloat16)
    ended, skipped = (Attack(small, PGD(1), end_pass=end)(target, batch) for end in (True, False))
    assert ended.unmoved["text"].all()
    assert torch.equal(ended.unmoved["text"], skipped.unmoved["text"])


def test_a_start_that_is_given_sometimes_is_in_the_units_of_the_site() -> None:
    place, pixels = Place(torch.zeros(1, 1, 2, 2)), Normalised((0.5,), (0.25,))
    ascent, given = Ascent(L2(9.0), step_size=1.0, pixels=pixels), Given(torch.full((1, 1, 2, 2), 0.4))
    sometimes = Sometimes(given, probability=1.0)
    found = ascent.begin(sometimes, place, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, ascent.begin(given, place, None))
    torch.testing.assert_close(found, given.delta)


def test_a_universal_perturbation_that_is_injected_is_sent_to_every_row() -> None:
    target, delta = toy(), torch.zeros(1, 5, 8, dtype=torch.float64)
    expected = r"repeat it by delta.repeat_interleave\(3, 0\), and zero"
    with pytest.raises(ShapeError, match=expected), target.inject({"text": delta}):
        target.forward(toy_batch())


@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize("maximizer", [PGD, FreeLB])
def test_nothing_to_perturb_is_plain_training(maximizer: Any, order: Any) -> None:
    target, plain = toy(), toy()
    method = AdversarialTraining(Unperturbed(), maximizer(2, order), SymmetricKL(), dropout="shared")
    method.step(target, toy_batch())
    plain.model(**toy_batch())["loss"].mean().backward()
    for one, other in zip(target.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_search_over_no_rows_finds_nothing() -> None:
    batch = {name: field[:0] for name, field in toy_batch().items()}
    found = Attack(both(), RandomSearch(2))(Adapter(ToyModel().double().eval(), toy_sites()), batch)
    assert found.deltas["text"].shape == (0, 5, 8)


def test_maximisers_that_teach_on_their_way_are_not_held() -> None:
    with pytest.raises(ConfigurationError, match="teaches at its end alone"):
        AdversarialTraining(both(), Held(EOT(PGD(2, "in turn"), 2), 3))
    with pytest.raises(ConfigurationError, match=r"beside weights=|once an update"):
        AdversarialTraining(both(), FreeAT(2, modalities="in turn"), weights=WeightAscent(0.1))


def test_a_mean_of_many_losses_in_half_precision_is_counted_in_full() -> None:
    assert global_mean(torch.ones(70_000, dtype=torch.float16)).item() == 1


def test_a_floor_beside_a_rule_with_a_memory_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="floor=0 beside Momentum"):
        Ascent(L2(1.0), step_size=0.1, rule=Momentum(0.9), floor=1e-3)


def test_a_universal_perturbation_is_floored_by_the_share_of_the_batch() -> None:
    whole = UniversalPerturber(text=replace(ASCENT, floor=1e-3))
    assert repr(whole.for_part(0.25)) == repr(UniversalPerturber(text=replace(ASCENT, floor=4e-3)))


def test_a_report_counts_the_rows_of_the_perturbation() -> None:
    method = AdversarialTraining(UniversalPerturber(text=ASCENT), PGD(1))
    assert method.step(toy(), toy_batch()).rows == {"text": 1}


def test_weights_with_sparse_gradients_are_refused_by_name() -> None:
    target = toy()
    target.model.words.sparse = True
    with pytest.raises(
        ConfigurationError, match=r"dense gradients of the weights to move, got sparse ones of \['words"
    ):
        AdversarialTraining(both(), PGD(1), weights=WeightAscent(0.1)).step(target, toy_batch())
