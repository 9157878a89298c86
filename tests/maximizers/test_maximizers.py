"""Inner maximisers, driven without any model: which passes they ask for, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.toy import toy, toy_batch
from torch import Tensor

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    AscentState,
    Attack,
    EmbeddingPerturber,
    Feedback,
    FreeAT,
    FreeLB,
    Given,
    InnerMaximizer,
    Linf,
    Place,
    Probe,
    Start,
    Uniform,
    Zero,
)
from advvl.errors import ConfigurationError, ShapeError
from advvl.maximizers.probes import Probes
from advvl.perturbers import Decay, Momentum
from advvl.perturbers.starts import Carried

SHAPES = {"text": (3, 5, 2), "image": (3, 4, 7)}
STEP = 0.5


def perturber(*modalities: str, start: Start | None = None, radius: float = math.inf) -> EmbeddingPerturber:
    modalities = modalities or ("text", "image")
    return EmbeddingPerturber(
        **{m: Ascent(Linf(radius), step_size=STEP, rule="sign", start=start or Zero()) for m in modalities}
    )


class Recorder:
    """Answers probes: gradients of +1 everywhere, losses and verdicts as it is told for each pass."""

    def __init__(
        self,
        who: EmbeddingPerturber,
        *,
        losses: list[list[float]] | None = None,
        correct: list[list[bool]] | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        masks: dict[str, Tensor] | None = None,
        segments: dict[str, Tensor] | None = None,
        examples: dict[str, Tensor] | None = None,
        gradient: Callable[[str, int], float] = lambda modality, count: 1.0,
    ) -> None:
        self.who, self.losses, self.correct, self.gradient = who, losses, correct, gradient
        self.places = {
            modality: Place(
                torch.zeros(shape, dtype=torch.float64),
                *((given or {}).get(modality) for given in (masks, segments, examples)),
            )
            for modality, shape in (shapes or SHAPES).items()
        }
        self.probes: list[Probe] = []
        self.deltas: list[dict[str, Tensor]] = []

    def answer(self, probe: Probe) -> Feedback:
        count = len(self.probes)
        self.probes.append(probe)
        made = {
            modality: self.who.begin(modality, value, self.places[modality], torch.Generator().manual_seed(count))
            if isinstance(value, Start)
            else value
            for modality, value in probe.deltas.items()
        }
        self.deltas.append(made)
        gradients = {m: torch.full_like(delta, self.gradient(m, count)) for m, delta in made.items()}
        return Feedback(
            deltas=made,
            gradients=gradients if probe.delta_gradients else {},
            places={modality: self.places[modality] for modality in made},
            losses=None if self.losses is None else torch.tensor(self.losses[count], dtype=torch.float64),
            correct=None if self.correct is None else torch.tensor(self.correct[count]),
        )

    def run(self, maximizer: InnerMaximizer, *, state: AscentState | None = None) -> dict[str, Tensor]:
        generator = maximizer.probes(self.who, state=state)
        probe = next(generator)
        while True:
            try:
                probe = generator.send(self.answer(probe))
            except StopIteration as stop:
                return stop.value

    @property
    def modalities(self) -> list[tuple[str, ...]]:
        return [tuple(probe.deltas) for probe in self.probes]

    @property
    def weights(self) -> list[float]:
        return [probe.weight for probe in self.probes]

    @property
    def heights(self) -> list[dict[str, float]]:
        """The value of each pass's perturbations, which are constant here."""
        return [{modality: delta.flatten()[0].item() for modality, delta in made.items()} for made in self.deltas]


# --- FreeLB ---


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_freelb_runs_k_passes_and_makes_one_move_fewer(steps: int) -> None:
    recorder = Recorder(perturber(start=Uniform(0.0)))
    ends = recorder.run(FreeLB(steps))
    assert recorder.heights == [{"text": k * STEP, "image": k * STEP} for k in range(steps)]
    assert [probe.delta_gradients for probe in recorder.probes] == [True] * (steps - 1) + [False]
    assert [probe.update for probe in recorder.probes] == [False] * (steps - 1) + [True]
    assert ends["text"].shape == SHAPES["text"]
    assert (ends["image"] == (steps - 1) * STEP).all()


@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_freelbs_weights_are_equal_and_add_up_to_one(order: str, steps: int) -> None:
    recorder = Recorder(perturber())
    recorder.run(FreeLB(steps, order))
    assert sum(recorder.weights) == pytest.approx(1, abs=1e-12)
    assert len(set(recorder.weights)) == 1
    assert FreeLB(steps, order).updates == sum(probe.update for probe in recorder.probes) == 1


def test_freelb_in_turn_runs_a_text_pass_and_an_image_pass_in_every_step() -> None:
    recorder = Recorder(perturber())
    ends = recorder.run(FreeLB(3, "in turn"))
    assert recorder.modalities == [("text",), ("image",)] * 3
    assert recorder.weights == [1 / 6] * 6
    assert recorder.heights == [{m: k * STEP} for k in range(3) for m in ("text", "image")]
    assert [probe.delta_gradients for probe in recorder.probes] == [True] * 4 + [False] * 2
    assert [probe.update for probe in recorder.probes] == [False] * 5 + [True]
    assert set(ends) == {"text", "image"}


def test_freelb_of_one_step_from_zero_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"expected FreeLB\(steps=2\) or more.*got steps=1 with Zero\(\)"):
        FreeLB(1).check(perturber())
    FreeLB(1).check(perturber(start=Uniform(0.1)))
    FreeLB(2).check(perturber())


# --- PGD ---


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_pgd_moves_s_times_and_learns_at_the_last_point_only(steps: int) -> None:
    recorder = Recorder(perturber())
    ends = recorder.run(PGD(steps))
    assert recorder.heights == [{"text": k * STEP, "image": k * STEP} for k in range(steps + 1)]
    assert recorder.weights == [0.0] * steps + [1.0]
    assert [probe.delta_gradients for probe in recorder.probes] == [True] * steps + [False]
    assert [probe.update for probe in recorder.probes] == [False] * steps + [True]
    assert (ends["text"] == steps * STEP).all()


def test_pgd_in_turn_moves_each_modality_alone_and_updates_once() -> None:
    recorder = Recorder(perturber())
    ends = recorder.run(PGD(2, "in turn"))
    assert recorder.modalities == [("text",)] * 3 + [("image",)] * 3
    assert recorder.weights == [0.0, 0.0, 0.5] * 2
    assert recorder.heights == [{m: k * STEP} for m in ("text", "image") for k in range(3)]
    assert [probe.update for probe in recorder.probes] == [False] * 5 + [True]
    assert {m: d.flatten()[0].item() for m, d in ends.items()} == {"text": 1.0, "image": 1.0}


def test_the_best_of_pgd_ends_for_each_row_at_its_highest_loss() -> None:
    losses = [[9.0, 1.0, 1.0], [1.0, 9.0, 2.0], [1.0, 1.0, 3.0], [0.0, 0.0, 0.0]]
    recorder = Recorder(perturber(), losses=losses)
    ends = recorder.run(PGD(2, keep="best"))
    for delta in ends.values():
        assert delta.flatten(1).amin(1).tolist() == delta.flatten(1).amax(1).tolist() == [0.0, STEP, 2 * STEP]
    assert recorder.weights == [0.0, 0.0, 0.0, 1.0]
    assert torch.equal(recorder.deltas[-1]["text"], ends["text"])


def test_the_best_of_equal_losses_is_the_first() -> None:
    recorder = Recorder(perturber(), losses=[[1.0] * 3] * 4)
    assert not recorder.run(PGD(2, keep="best"))["text"].any()


def test_the_best_in_turn_is_each_modalitys_own() -> None:
    losses = [[1.0] * 3, [2.0] * 3, [0.0] * 3, [9.0] * 3, [8.0] * 3, [0.0] * 3]
    ends = Recorder(perturber(), losses=losses).run(PGD(1, "in turn", keep="best"))
    assert (ends["text"] == STEP).all()
    assert not ends["image"].any()


def test_a_row_that_is_no_longer_correct_moves_no_further() -> None:
    correct = [[True, True, False], [True, False, False], [True, False, False], [False] * 3]
    ends = Recorder(perturber(), correct=correct).run(PGD(3, early_stop=True))
    for delta in ends.values():
        assert delta.flatten(1).amin(1).tolist() == delta.flatten(1).amax(1).tolist() == [3 * STEP, STEP, 0.0]


def test_packed_rows_stop_with_their_sample() -> None:
    shapes, segments = {"image": (5, 2)}, {"image": torch.tensor([0, 0, 1, 2, 2])}
    recorder = Recorder(perturber("image"), correct=[[True, False, True]] * 2, shapes=shapes, segments=segments)
    assert recorder.run(PGD(1, early_stop=True))["image"][:, 0].tolist() == [STEP, STEP, 0.0, STEP, STEP]


def test_several_rows_of_an_example_follow_its_losses_and_verdicts() -> None:
    kwargs: dict[str, Any] = {"shapes": {"image": (4, 2)}, "examples": {"image": torch.tensor([0, 0, 1, 1])}}
    stopped = Recorder(perturber("image"), correct=[[True, False]] * 2, **kwargs)
    assert stopped.run(PGD(1, early_stop=True))["image"][:, 0].tolist() == [STEP, STEP, 0.0, 0.0]
    best = Recorder(perturber("image"), losses=[[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]], **kwargs)
    assert best.run(PGD(1, keep="best"))["image"][:, 0].tolist() == [STEP, STEP, 0.0, 0.0]


@pytest.mark.parametrize(
    ("maximizer", "message"),
    [
        (PGD(2, keep="best"), "expected a loss for each row to keep the best of, got none"),
        (PGD(2, early_stop=True), "expected correct=… to stop early by.*, got None"),
    ],
    ids=["best", "early-stop"],
)
def test_pgd_says_what_it_lacks(maximizer: PGD, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Recorder(perturber()).run(maximizer)


def test_a_verdict_a_row_is_needed_for_every_row() -> None:
    expected = r"expected one loss or verdict for each of the 3 rows of 'text', got \(2,\); .*Site\(…, examples=…\)"
    with pytest.raises(ShapeError, match=expected):
        Recorder(perturber(), correct=[[True, False]]).run(PGD(1, early_stop=True))


# --- FreeAT ---


def test_free_at_moves_and_updates_in_every_replay() -> None:
    recorder, state = Recorder(perturber()), AscentState()
    ends = recorder.run(FreeAT(4), state=state)
    assert recorder.heights == [{"text": k * STEP, "image": k * STEP} for k in range(4)]
    assert recorder.weights == [1.0] * 4
    assert all(probe.update and probe.delta_gradients for probe in recorder.probes)
    assert (ends["text"] == 4 * STEP).all()
    assert FreeAT(4).updates == 4


def test_free_at_carries_its_perturbation_to_the_next_batch() -> None:
    who, state = perturber(), AscentState()
    Recorder(who).run(FreeAT(2), state=state)
    second = Recorder(who)
    second.run(FreeAT(2), state=state)
    assert isinstance(second.probes[0].deltas["text"], Carried)
    assert second.heights[0] == {"text": 2 * STEP, "image": 2 * STEP}
    assert (state.deltas["text"] == 4 * STEP).all()


@pytest.mark.parametrize(("rows", "length"), [(2, 5), (3, 2), (3, 9), (5, 5), (1, 1)], ids=lambda n: str(n))
def test_a_carried_perturbation_fits_the_next_batchs_shape_and_mask(rows: int, length: int) -> None:
    who, state = perturber("text"), AscentState()
    first = Recorder(who, shapes={"text": (3, 5, 2)}, masks={"text": torch.tensor([[1, 1, 1, 0, 0]] * 3).bool()})
    first.run(FreeAT(2), state=state)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, -1] = length == 1
    second = Recorder(who, shapes={"text": (rows, length, 2)}, masks={"text": mask})
    second.run(FreeAT(1), state=state)
    expected = torch.zeros(rows, length, 2, dtype=torch.float64)
    expected[:3, :3] = 2 * STEP
    expected[~mask] = 0
    assert torch.equal(second.deltas[0]["text"], expected)


def test_a_carried_perturbation_stays_inside_the_ball() -> None:
    who, state = perturber(radius=0.75), AscentState()
    for _ in range(2):
        Recorder(who).run(FreeAT(3), state=state)
    assert (state.deltas["text"] == 0.75).all()


@pytest.mark.parametrize(
    ("message", "state"),
    [
        ("got the keys .'model', 'state'.; give the entry", {"model": {}, "state": {"deltas": {}}}),
        ("got the keys .'deltas', 'model'.; give the entry", {"model": {}, "deltas": {}}),
        ("got list; give the entry", []),
        ("expected a tensor for each modality, got {'text': 'list'}", {"deltas": {"text": [0.0]}}),
    ],
    ids=["checkpoint", "more", "list", "numbers"],
)
def test_free_ats_state_takes_up_nothing_else(message: str, state: Any) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AscentState().load_state_dict(state)


def test_free_ats_state_shows_shapes() -> None:
    assert repr(AscentState({"text": torch.zeros(2, 3)})) == "AscentState({'text': (2, 3)})"


def test_free_ats_state_makes_the_round_trip_through_its_state_dict() -> None:
    who, state, restored = perturber(), AscentState(), AscentState()
    Recorder(who).run(FreeAT(2), state=state)
    saved = {"deltas": {name: delta.clone() for name, delta in state.state_dict()["deltas"].items()}}
    restored.load_state_dict(saved)
    one, two = Recorder(who), Recorder(who)
    one.run(FreeAT(2), state=state)
    two.run(FreeAT(2), state=restored)
    for a, b in zip(one.deltas, two.deltas, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert (saved["deltas"]["text"] == 2 * STEP).all()


def test_an_interrupted_batch_leaves_the_carried_perturbation_as_it_was() -> None:
    who, state = perturber(), AscentState()
    Recorder(who).run(FreeAT(2), state=state)
    before = dict(state.deltas)
    probes = FreeAT(2).probes(who, state=state)
    probes.send(Recorder(who).answer(next(probes)))
    probes.close()
    assert state.deltas == before


def test_free_at_without_carrying_starts_again_and_divides_by_one_more_than_its_replays() -> None:
    who, state = perturber(start=Uniform(0.1)), AscentState()
    recorder = Recorder(who)
    recorder.run(FreeAT(3, carry=False), state=state)
    assert recorder.weights == [1 / 4] * 3
    assert [probe.delta_gradients for probe in recorder.probes] == [True, True, False]
    assert all(probe.update for probe in recorder.probes)
    assert state.deltas == {}
    again = Recorder(who)
    again.run(FreeAT(3, carry=False))
    assert again.probes[0].deltas["text"] == Uniform(0.1)


@pytest.mark.parametrize(("carry", "weight"), [(True, 1 / 2), (False, 1 / 6)], ids=["carry", "fresh"])
def test_free_at_in_turn_updates_after_the_last_modality_of_each_replay(carry: bool, weight: float) -> None:
    recorder = Recorder(perturber())
    recorder.run(FreeAT(2, "in turn", carry=carry), state=AscentState())
    assert recorder.modalities == [("text",), ("image",)] * 2
    assert recorder.weights == [weight] * 4
    assert [probe.update for probe in recorder.probes] == [False, True] * 2
    assert [height for pair in recorder.heights for height in pair.values()] == [0.0, 0.0, STEP, STEP]


def test_free_at_that_carries_needs_a_state() -> None:
    with pytest.raises(ConfigurationError, match=r"expected state=AscentState\(\) for FreeAT\(carry=True\), got None"):
        next(FreeAT(2).probes(perturber()))


# --- all of them ---

EVERY = [FreeLB(3), FreeLB(3, "in turn"), PGD(3), PGD(3, "in turn"), FreeAT(3), FreeAT(3, carry=False)]


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_a_maximiser_starts_where_the_perturber_says(maximizer: InnerMaximizer) -> None:
    start = Given(torch.full(SHAPES["text"], 7.0, dtype=torch.float64))
    recorder = Recorder(perturber("text", start=start))
    recorder.run(maximizer, state=AscentState())
    assert recorder.heights[0] == {"text": 7.0}


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_a_maximiser_climbs_along_the_gradient(maximizer: InnerMaximizer) -> None:
    recorder = Recorder(perturber("text"), gradient=lambda modality, count: -1.0)
    recorder.run(maximizer, state=AscentState())
    assert [height["text"] for height in recorder.heights][:3] == [0.0, -STEP, -2 * STEP]


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_a_maximiser_hands_the_memory_of_rules_from_move_to_move(maximizer: InnerMaximizer) -> None:
    """A gradient in each modality's first pass alone: by momentum it goes on, by steps that halve."""
    first = 2 if "in turn" in repr(maximizer) and isinstance(maximizer, FreeLB) else 1
    ascent = Ascent(Linf(), step_size=Decay(STEP, rate=0.5), rule=Momentum())
    who = EmbeddingPerturber(text=ascent, image=ascent)

    def gradient(modality: str, count: int) -> float:
        alone = "in turn" in repr(maximizer) and isinstance(maximizer, PGD)
        return float(count == 4 if alone and modality == "image" else count < first)

    recorder = Recorder(who, gradient=gradient)
    recorder.run(maximizer, state=AscentState())
    for modality in SHAPES:
        heights = [height[modality] for height in recorder.heights if modality in height]
        assert heights[:3] == [0.0, STEP, 1.5 * STEP]


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_a_maximiser_closes_when_its_driver_fails(maximizer: InnerMaximizer) -> None:
    recorder = Recorder(perturber())
    probes = maximizer.probes(recorder.who, state=AscentState())
    feedback = recorder.answer(next(probes))
    probes.send(feedback)
    probes.close()
    with pytest.raises(StopIteration):
        probes.send(feedback)


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_a_maximiser_leaves_torchs_own_generator_alone(maximizer: InnerMaximizer) -> None:
    before = torch.get_rng_state()
    Recorder(perturber()).run(maximizer, state=AscentState())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("maximizer", EVERY, ids=repr)
def test_where_a_maximiser_goes_does_not_depend_on_the_weight_of_a_probe(maximizer: InnerMaximizer) -> None:
    class Reweighted(Recorder):
        def answer(self, probe: Probe) -> Feedback:
            return super().answer(replace(probe, weight=0.0, update=False))

    plain, reweighted = Recorder(perturber()), Reweighted(perturber())
    one, two = plain.run(maximizer, state=AscentState()), reweighted.run(maximizer, state=AscentState())
    assert plain.heights == reweighted.heights
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("weight", [1.0, 1 / 3, 1e-3])
def test_what_a_maximiser_is_sent_depends_neither_on_the_weight_nor_on_the_loss_scale(
    weight: float, loss_scale: float
) -> None:
    class Weighed(InnerMaximizer):
        def __init__(self, weight: float) -> None:
            self.weight, self.sent = weight, []

        def probes(self, perturber: EmbeddingPerturber, **options: object) -> Probes:
            deltas = dict(perturber.starts())
            for last in (False, True):
                feedback = yield Probe(deltas, weight=self.weight, update=last)
                self.sent.append(feedback)
                deltas = feedback.move(perturber).deltas
            return deltas

    step = Ascent(L2(), step_size=1.0, floor=100.0)  # far above the gradient's norm: the move is the gradient
    who = EmbeddingPerturber(text=step, image=step)
    plain, weighed = Weighed(0.5), Weighed(weight)
    AdversarialTraining(who, plain).step(toy(), toy_batch())
    AdversarialTraining(who, weighed).step(toy(), toy_batch(), backward=lambda loss: (loss_scale * loss).backward())
    for one, two in zip(plain.sent, weighed.sent, strict=True):
        assert one.gradients.keys() == two.gradients.keys() == {"text", "image"}
        for name in one.gradients:
            torch.testing.assert_close(two.gradients[name], one.gradients[name], rtol=1e-12, atol=1e-18)
            torch.testing.assert_close(two.deltas[name], one.deltas[name], rtol=1e-12, atol=1e-18)
        torch.testing.assert_close(two.losses, one.losses, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", [FreeLB, PGD, FreeAT])
@pytest.mark.parametrize("count", [0, -1, 2.0, True, None], ids=repr)
def test_a_count_below_one_is_refused(kind: type[InnerMaximizer], count: object) -> None:
    with pytest.raises(
        ConfigurationError, match=f"expected (steps|replays) to be a whole number of 1 or more, got {count}"
    ):
        kind(count)


@pytest.mark.parametrize("kind", [FreeLB, PGD, FreeAT])
def test_an_unknown_order_is_refused(kind: type[InnerMaximizer]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"expected modalities to be one of \('together', 'in turn'\), got 'alter'"
    ):
        kind(2, modalities="alter")


def test_an_unknown_end_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected keep to be 'last' or 'best', got 'worst'"):
        PGD(2, keep="worst")


def test_a_move_is_returned_and_leaves_the_feedback_as_it_was() -> None:
    who = EmbeddingPerturber(text=Ascent(L2(), step_size=0.1))
    feedback = Recorder(who).answer(Probe({"text": Zero()}))
    moved = feedback.move(who)
    assert not feedback.deltas["text"].any()
    norms = who.norms(moved.deltas, feedback.places)["text"]
    torch.testing.assert_close(norms, torch.full((3,), 0.1, dtype=torch.float64))
    assert moved.memory["text"].steps == 1


def test_keeping_the_best_says_how_to_get_a_loss_a_row() -> None:
    target = toy()
    target.loss = lambda outputs, batch: outputs["loss"].mean()
    with pytest.raises(ConfigurationError, match="with reduction='none'"):
        Attack(perturber(), PGD(1, keep="best"))(target, toy_batch())
