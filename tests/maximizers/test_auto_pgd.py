"""Auto-PGD against a plain transcription of its paper's Algorithm 1, and where its rows end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.linear import correct_of, linear, linear_batch
from support.scripted import driven
from support.toy import ToyModel, perturber, toy, toy_batch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    L2,
    PGD,
    Adam,
    Ascent,
    Attack,
    AutoPGD,
    EmbeddingPerturber,
    Given,
    Linf,
    MinimumNorm,
    Momentum,
    RandomSearch,
    Site,
    Uniform,
    UniversalPerturber,
    adapt,
)
from advvl.errors import ConfigurationError
from advvl.maximizers.auto_pgd import checkpoints
from advvl.perturbers import Decay

RADIUS = 0.8


def loss_of(model: ToyModel, batch: dict[str, Tensor], features: Tensor) -> Tensor:
    outputs = model(**(batch | {"regions": features}))
    return F.cross_entropy(outputs["logits"], batch["labels"], reduction="none")


def transcribed(
    model: ToyModel, batch: dict[str, Tensor], start: Tensor, steps: int, norm: str, radius: float
) -> tuple[Tensor, Tensor, int]:
    """Algorithm 1 on the regions, one row after another: the best points, their losses, and how often a row restarted."""
    mask = batch["region_mask"].unsqueeze(-1).double()
    ends, losses, restarts = [], [], 0
    for row in range(len(start)):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        x0 = one["regions"]

        def project(x: Tensor, x0: Tensor = x0) -> Tensor:
            d = x - x0
            return x0 + (d.clamp(-radius, radius) if norm == "linf" else d * min(1.0, radius / float(d.norm())))

        def climb(x: Tensor, one: dict[str, Tensor] = one) -> tuple[float, Tensor]:
            x = x.clone().requires_grad_()
            loss = loss_of(model, one, x).sum()
            (gradient,) = torch.autograd.grad(loss, x)
            return loss.item(), gradient

        def way(g: Tensor, real: Tensor = mask[row : row + 1]) -> Tensor:
            return (g.sign() if norm == "linf" else g / g.norm()) * real

        eta, x_old, x = 2 * radius, None, x0 + start[row : row + 1]
        f, g = climb(x)
        f_max, x_max, g_max = f, x, g
        history, eta_at_check, f_at_check, w = [f], eta, f, 0
        checks = sorted(checkpoints(steps))
        rises = 0
        for k in range(1, steps + 1):
            z = project(x + eta * way(g))
            new = z if x_old is None else project(x + 0.75 * (z - x) + 0.25 * (x - x_old))
            x_old, x = x, new
            f_new, g = climb(x)
            rises += f_new > f
            f = f_new
            history.append(f)
            if f > f_max:
                f_max, x_max, g_max = f, x, g
            if k in checks:
                before = eta
                if rises < 0.75 * (k - w) or (eta_at_check == eta and f_at_check >= f_max):
                    eta, x, f, g, restarts = eta / 2, x_max, f_max, g_max, restarts + 1
                eta_at_check, f_at_check, w, rises = before, f_max, k, 0
        ends.append(x_max - x0)
        losses.append(f_max)
    return torch.cat(ends), torch.tensor(losses, dtype=torch.float64), restarts


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_auto_pgd_is_algorithm_1_of_its_paper(norm: str, steps: int) -> None:
    adapter, batch = toy(), toy_batch(5)
    start = torch.rand(5, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    start = start * 0.2 * batch["region_mask"].unsqueeze(-1)
    ball = (L2 if norm == "l2" else Linf)(RADIUS)
    ascent = Ascent(ball, step_size=2 * RADIUS, start=Given(start))
    result = Attack(EmbeddingPerturber(image=ascent), AutoPGD(steps))(adapter, batch)
    ends, losses, restarts = transcribed(adapter.model, batch, start, steps, norm, RADIUS)
    torch.testing.assert_close(result.deltas["image"], ends, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.losses, losses, rtol=1e-9, atol=1e-9)
    assert restarts > 5 or norm == "l2" or steps == 1  # the rule was at work


def test_near_a_maximum_it_finds_the_same_loss() -> None:
    """There equal losses differ by rounding, so that restarts part ways."""
    adapter, batch, start = toy(), toy_batch(5), torch.zeros(5, 4, 5, dtype=torch.float64)
    ascent = Ascent(L2(RADIUS), step_size=2 * RADIUS)
    result = Attack(EmbeddingPerturber(image=ascent), AutoPGD(40))(adapter, batch)
    _, losses, restarts = transcribed(adapter.model, batch, start, 40, "l2", RADIUS)
    torch.testing.assert_close(result.losses, losses, rtol=1e-9, atol=1e-9)
    assert restarts > 5


FREE = Ascent(L2(1e6), step_size=1.0)  # of 20 moves, step sizes are looked at after 5, 9, 12, 14, 16, 18 and 19


def test_a_row_whose_loss_rises_but_not_its_best_goes_back() -> None:
    """It rises in 4 of 5 moves and then in 4 of 4, but from a drop, so that the best one stays that of move 4."""
    points, _ = driven(AutoPGD(20), FREE, [0, 10, 20, 30, 40, 1, 2, 3, 4, 5, *[0.0] * 11])
    assert points[:10] == pytest.approx(list(range(10)))
    assert points[10] == pytest.approx(4 + 0.75 * 0.5 + 0.25 * (4 - 8))


def test_a_row_that_went_back_is_given_its_new_step_size_before_it_goes_back_again() -> None:
    """After move 5 it goes back; then it drops and rises in 3 of 4 moves, below its best loss."""
    points, _ = driven(AutoPGD(20), FREE, [0, 40, 1, 2, 0, 1, 0.5, 1, 2, 3, *[0.0] * 11])
    assert points[6] == pytest.approx(1 + 0.75 * 0.5 + 0.25 * (1 - 4))
    step = 0.75 * 0.5 + 0.25 * (points[9] - points[8])
    assert points[10] == pytest.approx(points[9] + step)


def test_checkpoints_are_the_papers() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert sorted(checkpoints(10)) == [3, 5, 6, 7, 8, 9]
    assert checkpoints(1) == set()


def test_rows_do_not_depend_on_each_other() -> None:
    batch = toy_batch(5)
    attack = Attack(perturber(ball=L2(RADIUS), step_size=2 * RADIUS), AutoPGD(20))
    whole = attack(toy(), batch)
    for row in range(5):
        alone = attack(toy(), {name: value[row : row + 1] for name, value in batch.items()})
        for modality in ("text", "image"):
            torch.testing.assert_close(alone.deltas[modality][0], whole.deltas[modality][row], rtol=1e-9, atol=1e-12)


def test_no_step_size_to_choose_finds_at_least_what_a_bad_one_does_not() -> None:
    batch = toy_batch(32)
    auto = Attack(perturber(ball=L2(2.0), step_size=4.0), AutoPGD(30))(toy(), batch)
    for size in (0.08, 8.0):
        plain = Attack(perturber(ball=L2(2.0), step_size=size), PGD(30, keep="best"))(toy(), batch)
        assert auto.losses.mean() >= plain.losses.mean() - 1e-6


@pytest.mark.parametrize("maximizer", [AutoPGD(6), RandomSearch(30)], ids=repr)
def test_a_point_that_flips_a_row_is_kept_over_one_of_higher_loss(maximizer: Any) -> None:
    batch, seen = linear_batch(), []

    def upside_down(outputs: Tensor, batch: Any) -> Tensor:  # the more flipped, the lower
        return -torch.where(outputs.argmax(1) == batch["labels"], 0.0, 1.0) + 0.01 * outputs[:, 0]

    def correct(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(correct_of(outputs, batch))
        return seen[-1]

    ascent = Ascent(L2(20.0), step_size=40.0, start=Uniform(40.0))
    result = Attack(EmbeddingPerturber(image=ascent), maximizer, loss=upside_down, correct=correct)(linear(), batch)
    ever = ~torch.stack(seen[:-1]).all(0)
    assert ever.any()
    assert torch.equal(~result.correct, ever)


def test_packed_samples_move_as_those_of_a_batch_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.Identity(), nn.Linear(3, 4)

        def forward(self, x: Tensor, owner: Tensor) -> Tensor:
            hidden = torch.tanh(self.rows(x))
            pooled = torch.zeros(2, 3, dtype=x.dtype).index_add(0, owner, hidden)
            return self.head(pooled * 3)

    torch.manual_seed(0)
    model = Packed().double()
    x, owner = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1])
    adapter = adapt(
        model,
        sites={"rows": Site("rows", rows=lambda batch: batch["owner"])},
        loss=lambda outputs, batch: F.cross_entropy(outputs, torch.tensor([0, 1])[: len(outputs)], reduction="none"),
    )
    for maximizer in (AutoPGD(12), MinimumNorm(12), RandomSearch(12)):
        margin = {"loss": lambda o, b: o[:, 3] - 9.0, "correct": lambda o, b: torch.ones(2, dtype=torch.bool)}
        options = margin if isinstance(maximizer, MinimumNorm) else {}
        ascent = Ascent(L2(RADIUS), step_size=RADIUS)
        result = Attack(EmbeddingPerturber(rows=ascent), maximizer, **options)(adapter, {"x": x, "owner": owner})
        norms = torch.stack([result.deltas["rows"][:3].norm(), result.deltas["rows"][3:].norm()])
        assert (norms <= RADIUS).all()
        assert (norms > 0.1).all()
    whole = Attack(EmbeddingPerturber(rows=ascent), AutoPGD(12))(adapter, {"x": x, "owner": owner})
    other = Attack(EmbeddingPerturber(rows=ascent), AutoPGD(12))(
        adapter, {"x": torch.cat([x[:3], x[3:] + 1]), "owner": owner}
    )
    torch.testing.assert_close(whole.deltas["rows"][:3], other.deltas["rows"][:3])


@pytest.mark.parametrize("maximizer", [AutoPGD(2), MinimumNorm(2), RandomSearch(2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (UniversalPerturber(text=Ascent(L2(1.0), step_size=1.0)), "expected an EmbeddingPerturber"),
        (perturber("text", ball=L2(1.0), rule=Momentum()), "expected a rule of 'text' without a state"),
        (perturber("text", ball=L2(1.0), rule=Adam()), "expected a rule of 'text' without a state"),
        (perturber("text", ball=L2(1.0), step_size=Decay(0.1, rate=0.5)), "expected a number as step size of 'text'"),
    ],
    ids=["universal", "momentum", "adam", "schedule"],
)
def test_a_perturber_that_does_not_fit_is_refused(maximizer: Any, given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        maximizer.check(given)
    with pytest.raises(ConfigurationError, match=message):
        next(maximizer.probes(given))


@pytest.mark.parametrize("maximizer", [AutoPGD(2), RandomSearch(2)], ids=lambda m: type(m).__name__)
def test_a_ball_without_a_bound_is_refused(maximizer: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a finite radius of 'text'"):
        maximizer.check(perturber("text"))


@pytest.mark.parametrize("maximizer", [AutoPGD(2), RandomSearch(2)], ids=lambda m: type(m).__name__)
def test_a_loss_for_the_whole_batch_is_refused(maximizer: Any) -> None:
    mean = Attack(perturber(ball=L2(1.0)), maximizer, loss=lambda outputs, batch: outputs["loss"].mean())
    with pytest.raises(ConfigurationError, match="expected a loss for each row"):
        mean(toy(), toy_batch())


def test_deltas_of_another_model_are_evaluated_by_given_starts() -> None:
    ours, theirs, batch = toy(seed=0), toy(seed=1), toy_batch(16)
    ball = L2(2.0)
    found = Attack(perturber(ball=ball), PGD(10))(theirs, batch).deltas
    start = {name: Ascent(ball, step_size=0.1, start=Given(delta)) for name, delta in found.items()}
    transferred = Attack(EmbeddingPerturber(**start), RandomSearch(1))(ours, batch)
    for name, delta in found.items():
        torch.testing.assert_close(transferred.deltas[name], delta, rtol=0, atol=0)
    clean = ours.model(**batch)["loss"]
    assert (transferred.losses != clean).all()
    with ours.inject(found):
        torch.testing.assert_close(transferred.losses, ours.model(**batch)["loss"], rtol=1e-12, atol=0)


def test_one_step_of_pgd_is_fgsm() -> None:
    adapter, batch = toy(), toy_batch(5)
    result = Attack(EmbeddingPerturber(image=Ascent(Linf(0.3), step_size=0.3)), PGD(1))(adapter, batch)
    features = batch["regions"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(adapter.model, batch, features).sum(), features)
    expected = 0.3 * gradient.sign() * batch["region_mask"].unsqueeze(-1)
    torch.testing.assert_close(result.deltas["image"], expected, rtol=1e-9, atol=1e-9)
