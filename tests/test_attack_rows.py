"""An attack hides no row that it could not attack: those without a usable gradient are flagged, and fp16 loses none."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.draws import randn
from support.toy import ToyModel, perturber, toy, toy_batch, toy_sites
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    DiscretePerturber,
    EmbeddingPerturber,
    FreeLB,
    Linf,
    Paired,
    Site,
    Uniform,
    UniversalPerturber,
    adapt,
)
from advvl.errors import ConfigurationError, NonFiniteError, WeakAttackWarning
from advvl.evaluation.robustness import WorstCase, robustness_curve


class Classifier(nn.Module):
    """Logits of a linear map; rows whose first input is above 90 have a NaN gradient, above 50 none."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.head = nn.Identity(), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.site(x)
        rows = [self._of(row, float(value)) for row, value in zip(h, x[:, 0], strict=True)]
        return {"logits": self.head(torch.stack(rows))}

    def _of(self, row: Tensor, value: float) -> Tensor:
        if value > 90:
            return row + (row - row.detach()).square().sum().sqrt()
        return row.detach() if value > 50 else row


def classifier() -> Adapter:
    torch.manual_seed(0)
    return adapt(
        Classifier(),
        {"image": "site"},
        loss=lambda outputs, batch: F.cross_entropy(outputs["logits"], batch["labels"], reduction="none"),
    )


def classified(rows: int = 4) -> dict[str, Tensor]:
    x = randn(rows, 6, dtype=torch.float32)
    return {"x": x, "labels": classifier().model(x)["logits"].argmax(1)}


def l2(radius: float = 1.0, **options: Any) -> EmbeddingPerturber:
    return EmbeddingPerturber(image=Ascent(L2(radius), step_size=radius, **options))


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_rows_without_a_usable_gradient_are_flagged_and_no_others(start: float) -> None:
    batch = classified()
    batch["x"][1, 0], batch["x"][3, 0] = 99.0, 60.0
    options = {"start": Uniform(start)} if start else {}
    result = Attack(l2(**options), PGD(3))(classifier(), batch)
    assert result.nonfinite["image"].tolist() == [False, True, False, False]
    assert result.unmoved["image"].tolist() == [False, True, False, True]
    assert repr(result).endswith("2 of 4 unmoved in image, 1 of 4 nonfinite in image)")


def test_a_row_that_moved_once_is_not_called_unmoved() -> None:
    passes = [0]

    def loss(outputs: Any, batch: Any) -> Tensor:
        passes[0] += 1
        return F.cross_entropy(outputs["logits"], batch["labels"], reduction="none") * (passes[0] == 2)

    result = Attack(l2(), PGD(3), loss=loss)(classifier(), classified())
    assert not result.unmoved["image"].any()


@pytest.mark.parametrize("wrapped", ["alone", "paired", "discrete"])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_a_row_whose_relative_ball_has_no_extent_is_called_unmoved(per: Any, wrapped: str) -> None:
    """As of a soft prompt at a padding token, whose embedding is zero."""
    batch = toy_batch()
    batch["regions"] = batch["regions"].clone()
    batch["regions"][1] = 0
    ascents = {"image": Ascent(L2(1.0, relative=True, per=per), step_size=0.5)}
    inner = EmbeddingPerturber(**ascents)
    found = {"alone": inner, "paired": Paired(inner), "discrete": DiscretePerturber(torch.clone, **ascents)}[wrapped]
    if wrapped == "paired":
        batch = {name: torch.cat([value, value]) for name, value in batch.items()}
    result = Attack(found, PGD(3))(toy(), batch)
    assert result.unmoved["image"][:3].tolist() == [False, True, False]  # of pairs, the rows that have the gradient
    assert not result.deltas["image"][1].any()


def test_a_row_that_is_all_padding_is_not_called_unmoved() -> None:
    batch = toy_batch()
    batch["region_mask"][1] = False
    result = Attack(perturber(ball=L2(0.5)), PGD(2))(toy(), batch)
    assert not result.unmoved["image"].any()
    assert (result.deltas["image"][1] == 0).all()


def curve(batch: dict[str, Tensor]) -> Any:
    target, attacks = classifier(), WorstCase(steps=3, restarts=1)
    return robustness_curve(
        target,
        [batch],
        modality="image",
        radii=(0.1, 5.0),
        attacks=attacks,
        targets=lambda batch: F.one_hot(batch["labels"], 3).float(),
    )


def test_a_curve_refuses_rows_whose_gradients_are_not_finite() -> None:
    batch = classified()
    batch["x"][1, 0] = 99.0
    batch["labels"] = classifier().model(batch["x"])["logits"].argmax(1)
    with pytest.raises(NonFiniteError, match=r"got none in 1 rows of a batch, \[1\]"):
        curve(batch)


def test_a_curve_counts_the_rows_left_that_no_attack_moved() -> None:
    batch = classified()
    batch["x"][3, 0] = 60.0
    batch["labels"] = classifier().model(batch["x"])["logits"].argmax(1)
    found = curve(batch)
    assert found.unmoved[:, 3].all()
    assert not found.unmoved[:, :3].any()


# --- fp16 ---


class Confident(nn.Module):
    """Logits of a linear map with a mean loss of its own, as transformers' models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.head = nn.Identity(), nn.Linear(16, 3, bias=False)
        self.head.weight.data.copy_(randn(3, 16, dtype=torch.float32))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = 4 * self.head(self.site(x))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 128])
def test_in_fp16_every_row_moves_where_fp32_moves_it_whatever_the_batch(size: int) -> None:
    x = randn(128, 16, seed=1, dtype=torch.float32)
    labels = Confident()(x, torch.zeros(128).long())["logits"].argmax(1)
    found: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.float16: []}
    for dtype, deltas in found.items():
        target = adapt(Confident().to(dtype), {"image": "site"})
        for rows in torch.arange(128).split(size):
            result = Attack(l2(0.5), PGD(1))(target, {"x": x[rows].to(dtype), "labels": labels[rows]})
            assert not result.unmoved["image"].any()
            deltas.append(result.deltas["image"])
    single, half = (torch.cat(deltas) for deltas in found.values())
    assert F.cosine_similarity(single, half).min() > 0.999


def test_a_loss_scale_suits_every_row_of_a_batch() -> None:
    """Row losses that span more than fp16 holds, the largest of which overflows at any scale that serves the least."""
    x = randn(6, 16, dtype=torch.float32)
    weights = torch.tensor([1e-12, 1e-6, 1e-3, 1.0, 1e3, 3e4])

    def loss(outputs: Any, batch: Any) -> Tensor:
        return (outputs["logits"].float() * weights[:, None]).square().sum()

    batch = {"x": x, "labels": torch.zeros(6).long()}
    single, half = (
        Attack(l2(0.5), PGD(1), loss=loss)(
            adapt(Confident().to(dtype), {"image": "site"}), batch | {"x": x.to(dtype)}
        ).deltas["image"]
        for dtype in (torch.float32, torch.float16)
    )
    assert F.cosine_similarity(single, half).min() > 0.999


def test_autocast_inside_the_call_is_seen_though_the_logits_are_wide() -> None:
    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.float16):
            return {"logits": model(**batch)["logits"].float()}

    def loss(outputs: Any, batch: Any) -> Tensor:
        return 1e-9 * F.cross_entropy(outputs["logits"].float(), batch["labels"], reduction="none")

    x = randn(6, 16, dtype=torch.float32)
    batch = {"x": x, "labels": Confident()(x, torch.zeros(6).long())["logits"].argmin(1)}
    single, half = (
        Attack(l2(0.5), PGD(1), loss=loss)(adapt(Confident(), {"image": "site"}, call=how), batch).deltas["image"]
        for how in (None, call)
    )
    assert F.cosine_similarity(single, half).min() > 0.99


# --- attacks that are weaker than their ball ---


def test_an_attack_that_cannot_reach_the_edge_of_its_ball_warns() -> None:
    short = EmbeddingPerturber(text=Ascent(L2(1.0), step_size=0.3))
    with pytest.warns(WeakAttackWarning, match=r"ball of 'text', got 3 of 0\.3 in L2"):
        Attack(short, PGD(3))
    with pytest.warns(WeakAttackWarning):
        Attack(EmbeddingPerturber(image=Ascent(Linf(0.1), step_size=0.01)), FreeLB(5))


@pytest.mark.parametrize(
    "ascent",
    [Ascent(L2(1.0), step_size=0.1), Ascent(L2(), step_size=0.01), Ascent(L2(1.0), step_size=0.01, rule="sign")],
    ids=repr,
)
@pytest.mark.filterwarnings("error")
def test_an_attack_that_can_says_nothing(ascent: Ascent) -> None:
    Attack(EmbeddingPerturber(text=ascent), PGD(10))


# --- threads ---


def beside(other: Any, model: nn.Module | None = None) -> Any:
    """What `other` gives while an attack of another thread on the same model is between two of its forwards."""
    model = (ToyModel() if model is None else model).double().eval()
    ready, go, passes = threading.Event(), threading.Event(), [0]
    errors: list[Exception] = []

    def waits(model: nn.Module, batch: Any) -> Any:
        passes[0] += 1
        if passes[0] == 2:
            ready.set()
            go.wait(20)
        return model(**batch)

    def work() -> None:
        try:
            Attack(perturber(ball=L2(0.5)), PGD(3))(adapt(model, toy_sites(), call=waits), toy_batch())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(20)
    try:
        return other(model)
    finally:
        go.set()
        thread.join()
        for error in errors:
            raise error


def test_attacks_of_two_threads_on_one_model_are_apart() -> None:
    def attacked(model: nn.Module) -> Tensor:
        return Attack(perturber(ball=L2(0.5)), PGD(3))(adapt(model, toy_sites()), toy_batch(seed=1)).deltas["text"]

    torch.manual_seed(0)
    found = beside(attacked)
    torch.manual_seed(0)
    assert torch.equal(found, attacked(ToyModel().double().eval()))


def test_a_forward_of_another_thread_is_clean() -> None:
    torch.manual_seed(0)
    found = beside(lambda model: model(**toy_batch(seed=1))["logits"])
    torch.manual_seed(0)
    assert torch.equal(found, ToyModel().double().eval()(**toy_batch(seed=1))["logits"])


def test_a_step_beside_an_attack_of_another_thread_is_refused() -> None:
    def stepped(model: nn.Module) -> Any:
        return AdversarialTraining(perturber(), FreeLB(2)).step(adapt(model, toy_sites()), toy_batch())

    with pytest.raises(ConfigurationError, match="one thread on a ToyModel"):
        beside(stepped)


class Counting(ToyModel):
    """The toy with a buffer that every forward writes, or replaces, and the next one reads."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, **fields: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(**fields)
        if self.replaces:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return outputs | {"loss": outputs["loss"] * self.calls.clone()}


@pytest.mark.parametrize("replaces", [False, True])
def test_attacks_of_two_threads_on_a_model_that_writes_its_buffers_are_refused(replaces: bool) -> None:
    model, found = Counting(replaces=replaces), []

    def attacked(model: nn.Module) -> Any:
        return Attack(perturber(ball=L2(0.5)), PGD(3))(adapt(model, toy_sites()), toy_batch(seed=1))

    def refused(model: nn.Module) -> None:
        with pytest.raises(ConfigurationError, match="whose forward writes no buffer to attack it from two threads"):
            attacked(model)
        found.append(True)

    with pytest.raises(ConfigurationError, match="writes no buffer"):  # the other thread's, which waited
        beside(refused, model)
    assert found
    assert not model.calls
    attacked(model)  # alone it may
    assert not model.calls


def test_an_attack_that_would_switch_modes_beside_another_is_refused() -> None:
    def attacked(model: nn.Module) -> Any:
        return Attack(perturber(ball=L2(0.5)), PGD(3))(adapt(model.train(), toy_sites()), toy_batch())

    with pytest.raises(ConfigurationError, match="one thread on a ToyModel"):
        beside(attacked)


# --- found by trying: siblings of the above ---


def test_a_model_whose_lower_part_is_kept_serves_other_threads_as_it_is() -> None:
    """A declared pure model computes what lies below a site once: for the attack's own passes alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Identity(), nn.Linear(6, 3)).eval()
    batches, clean = [randn(3, 4, seed=seed, dtype=torch.float32) for seed in (0, 1)], []
    expected = model(batches[1]).detach()

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        outputs = model(batch)
        thread = threading.Thread(target=lambda: clean.append(model(batches[1]).detach()))
        thread.start()
        thread.join()
        return outputs

    target = adapt(model, {"hidden": "2"}, call=call, loss=lambda outputs, batch: outputs.square().sum(1), pure=True)
    Attack(EmbeddingPerturber(hidden=Ascent(L2(1.0), step_size=0.5)), PGD(3))(target, batches[0])
    assert len(clean) > 2
    assert all(torch.equal(one, expected) for one in clean)


def test_rows_whose_perturbation_half_precision_swallows_count_as_unmoved() -> None:
    x = torch.full((2, 16), 1024.0)
    x[1] = 0.01
    target = adapt(
        nn.Sequential(nn.Identity(), nn.Linear(16, 3, bias=False)).to(torch.bfloat16),
        {"image": "0"},
        loss=lambda outputs, batch: outputs.float().square().sum(1),
    )
    result = Attack(l2(0.1), PGD(2))(target, x.bfloat16())
    assert result.unmoved["image"].tolist() == [True, False]


def test_padding_beside_a_row_without_a_gradient_moves_no_example() -> None:
    """Two images per example: one whose gradient vanishes, and an empty slot."""
    mask = torch.tensor([[True], [False], [True], [False]]).expand(4, 5)
    batch = {"x": randn(4, 5, 6, dtype=torch.float32), "mask": mask, "of": torch.tensor([0, 0, 1, 1])}
    target = adapt(
        nn.Sequential(nn.Identity()),
        {"image": Site("0", mask=lambda batch: batch["mask"], examples=lambda batch: batch["of"])},
        call=lambda model, batch: model(batch["x"]),
        logits=lambda outputs: outputs.flatten(1)[::2, :3],
        loss=lambda outputs, batch: (outputs * torch.tensor([0.0, 0, 1, 1])[:, None, None]).flatten(1).sum(1)[::2],
    )
    result = Attack(l2(), PGD(2))(target, batch)
    still, moved = (result.of_examples("image", rows["image"], 2) for rows in (result.unmoved, result.moved))
    assert (still & ~moved).tolist() == [True, False]


def test_one_perturbation_for_a_batch_works_in_fp16_with_a_mask() -> None:
    model = ToyModel().half().eval()
    batch = toy_batch(dtype=torch.float16)
    result = Attack(UniversalPerturber(image=Ascent(L2(1.0), step_size=0.5)), PGD(2))(adapt(model, toy_sites()), batch)
    assert result.deltas["image"].shape[0] == 1
    assert result.deltas["image"].norm() > 0.1
