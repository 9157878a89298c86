"""Random search climbs without gradients, stays where it may, and draws from its generator alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.linear import correct_of, linear, linear_batch, margin_of
from support.toy import perturber, toy, toy_batch
from torch import Tensor, nn

from advvl import L2, PGD, Adapter, Ascent, Attack, EmbeddingPerturber, Linf, RandomSearch
from advvl.errors import ConfigurationError


def search(ball: Any, queries: int, *modalities: str, seed: int = 0, **options: Any) -> Attack:
    size = 2 * ball.radius if isinstance(ball, Linf) else ball.radius
    ascent = Ascent(ball, step_size=size, **options)
    parts = EmbeddingPerturber(**dict.fromkeys(modalities or ("text", "image"), ascent))
    return Attack(parts, RandomSearch(queries), loss=margin_of, correct=correct_of, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("per", ["sample", "token"])
@pytest.mark.parametrize(("kind", "share"), [(L2, 0.8), (Linf, 0.9)])
def test_it_reaches_most_of_the_optimum_of_a_linear_model(kind: Any, share: float, per: Any) -> None:
    model, batch, ball = linear(), linear_batch(), kind(0.5, per=per)
    before = margin_of(model.model(**batch), batch)
    best = Attack(
        EmbeddingPerturber(**dict.fromkeys(("text", "image"), Ascent(ball, step_size=0.5))), PGD(2), loss=margin_of
    )
    optimum = best(model, batch).losses - before
    found = search(ball, 600)(model, batch).losses - before
    assert (found >= share * optimum).all()
    assert (found <= optimum + 1e-9).all()


def test_it_asks_for_no_gradient_and_runs_as_many_passes_as_queries() -> None:
    passes = []

    def counted(outputs: Tensor, batch: Any) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return margin_of(outputs, batch)

    ascent = Ascent(Linf(0.1), step_size=0.2)
    attack = Attack(EmbeddingPerturber(text=ascent), RandomSearch(7), loss=counted, end_pass=False)
    attack(linear(), linear_batch())
    assert passes == [False] * 7


def test_the_loss_never_falls_and_more_queries_find_no_less() -> None:
    model, batch = linear(), linear_batch()
    last = margin_of(model.model(**batch), batch)
    for queries in (1, 2, 3):  # the same draws from the start
        found = search(L2(0.5), queries)(model, batch).losses
        assert (found >= last - 1e-12).all()
        last = found


@pytest.mark.parametrize("ball", [L2(0.6), Linf(0.1), L2(0.3, per="token"), Linf(0.1, per="token")], ids=repr)
def test_it_stays_in_ball_and_box_and_off_the_padding(ball: Any) -> None:
    batch = linear_batch()
    batch["words"] = batch["words"].clamp(-1, 1)
    result = search(ball, 40, "text", box=(-1, 1))(linear(), batch)
    delta = result.deltas["text"]
    rows = delta.flatten(1) if ball.per == "sample" else delta
    norms = rows.norm(dim=-1) if isinstance(ball, L2) else rows.abs().amax(-1)
    assert (norms <= ball.radius).all()
    assert norms.amax() > 0.5 * ball.radius
    assert ((batch["words"] + delta).abs() <= 1).all()
    assert not delta[~batch["mask"]].any()


def test_one_seed_gives_one_result_and_leaves_the_global_generator() -> None:
    batch = linear_batch()
    state = torch.get_rng_state()
    first, again = (search(L2(0.5), 20)(linear(), batch).deltas["text"] for _ in range(2))
    other = search(L2(0.5), 20, seed=1)(linear(), batch).deltas["text"]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Seen(nn.Module):
    """Keeps the pictures that it is shown; its loss rises with the number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.weight, self.shown = nn.Identity(), nn.Parameter(torch.ones(())), []

    def forward(self, pixels: Tensor) -> Tensor:
        self.shown.append(self.pixels(pixels).detach())
        return self.weight * torch.full((len(pixels),), float(len(self.shown)))


@pytest.mark.parametrize("size", [(2, 3, 9, 9), (1, 1, 5, 12), (2, 3, 2, 1)], ids=str)
def test_of_pixels_it_tries_squares_with_one_sign_per_channel(size: tuple[int, ...]) -> None:
    model = Seen()
    adapter = Adapter(model, {"image": "pixels"}, call=lambda model, batch: model(batch))
    ascent = Ascent(Linf(0.1), step_size=0.2)
    Attack(EmbeddingPerturber(image=ascent), RandomSearch(200, share=0.3), loss=lambda outputs, batch: outputs)(
        adapter, torch.zeros(size)
    )
    changes = [after - before for before, after in zip(model.shown[:-2], model.shown[1:-1], strict=True)]
    for change in changes:
        for row in change:
            held = (row != 0).any(0)
            area, down, across = int(held.sum()), int(held.any(1).sum()), int(held.any(0).sum())
            if area:
                for channel in row:
                    entries = channel[channel != 0]
                    assert entries.numel() == 0 or entries.sign().abs().sum() == entries.numel()
                assert down <= max(round((0.3 * size[2] * size[3]) ** 0.5), 1)
                assert across <= max(round((0.3 * size[2] * size[3]) ** 0.5), 1)
    for channel in model.shown[1].flatten(0, 1):
        assert len(set(channel[channel != 0].sign().tolist())) <= 1


def first_block(adapter: Adapter, batch: Any, modality: str, share: float) -> Tensor:
    """The block of the first query, which is kept, since the loss rises with each pass."""
    passes = []

    def rising(outputs: Tensor, batch: Any) -> Tensor:
        passes.append(len(passes))
        return torch.full((len(outputs),), float(len(passes)), dtype=torch.float64)

    ascent = Ascent(Linf(0.1), step_size=0.2)
    attack = Attack(EmbeddingPerturber(**{modality: ascent}), RandomSearch(2, share=share), loss=rising)
    return attack(adapter, batch).deltas[modality]


def test_each_channel_of_a_square_has_a_sign_of_its_own_and_both_signs_are_as_likely() -> None:
    adapter = Adapter(Seen(), {"image": "pixels"}, call=lambda model, batch: model(batch))
    signs = first_block(adapter, torch.zeros(400, 3, 4, 4), "image", 0.3).sign().sum((2, 3)).sign()
    assert signs.abs().all()
    assert signs.mean().abs() < 0.1
    assert 0.6 < (signs != signs[:, :1]).any(1).double().mean() < 0.9  # three in four


def test_blocks_fall_on_real_positions() -> None:
    batch = linear_batch(words=(12, 3))
    batch["mask"] = torch.arange(12) == torch.arange(len(batch["words"]))[:, None]
    block = first_block(linear(words=(12, 3)), batch, "text", 0.01)
    assert torch.equal((block != 0).any(2), batch["mask"])


def test_it_breaks_what_hides_its_gradient() -> None:
    model, batch = toy(), toy_batch(24)
    batch["labels"] = model.model(**batch)["logits"].argmax(1)

    def hidden(outputs: Any, batch: Any) -> Tensor:
        return (margin_of(outputs["logits"], batch) * 1e3).round() / 1e3 + 0 * outputs["logits"].sum(1)

    def correct(outputs: Any, batch: Any) -> Tensor:
        return outputs["logits"].argmax(1) == batch["labels"]

    blind = Attack(perturber(ball=L2(2.0), step_size=2.0), PGD(20), loss=hidden, correct=correct)(model, batch)
    found = Attack(perturber(ball=L2(2.0), step_size=2.0), RandomSearch(200), loss=hidden, correct=correct)(
        model, batch
    )
    assert blind.correct.all()
    assert not found.correct.all()


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "half", True])
def test_a_share_outside_0_and_1_is_refused(share: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected share to be a number in \(0, 1\]"):
        RandomSearch(2, share=share)
