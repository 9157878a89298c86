"""Perturbed weights: AWP and SAM written out, what they leave behind, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.loops import climbed, kl, linf, stepped
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels
from support.spawn import attempt, shared_results
from torch import Tensor, nn

from advvl import Adapter, AdversarialTraining, Attack, FreeLB, PassTrace, Site
from advvl.errors import ConfigurationError, NonFiniteError
from advvl.perturbers import WeightAscent
from advvl.recipes import awp, fgm, freelb, neftune, pgd, sam, trades, villa

RADIUS, SIZE, STEPS = 0.2, 0.06, 3
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.3])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def move_weights(model: nn.Module, steps: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(steps.get(name, torch.zeros_like(parameter)))


def matrices(model: nn.Module, gradients: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """AWP's steps: for each tensor of two axes or more, γ‖θ‖ g/‖g‖."""
    named = dict(model.named_parameters())
    return {
        name: gamma * named[name].detach().norm() * gradient / gradient.norm()
        for name, gradient in gradients.items()
        if named[name].ndim > 1
    }


@DROPOUTS
def test_sam(dropout: float) -> None:
    """The gradient at θ + ρ g/‖g‖ over all weights, at which the same loss is taken again."""
    batch, rho = pixels(), 0.3
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    before = weights_of(ours.model)
    torch.manual_seed(7)
    report = sam(rho=rho).step(ours, batch)

    torch.manual_seed(7)
    gradients = gradients_of(theirs(**batch)["loss"], theirs)
    size = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    move_weights(theirs, {name: rho * gradient / size for name, gradient in gradients.items()})
    loss = theirs(**batch)["loss"]
    agree_on_gradients(ours.model, gradients_of(loss, theirs))
    agree(report.loss, loss.detach())
    assert report.passes == 2
    assert all(torch.equal(value, before[name]) for name, value in ours.model.named_parameters())


@DROPOUTS
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_awp_of_pgd(box: Any, dropout: float) -> None:
    """Perturbations are found at θ, matrices moved along the gradient of the loss there, and the loss taught at θ + v."""
    batch, gamma = pixels(), 0.1
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    passes = stepped(awp(pgd(radius=RADIUS, step_size=SIZE, steps=STEPS, box=box), gamma=gamma), ours, batch)

    torch.manual_seed(7)
    move = linf(batch["x"], step_size=SIZE, radius=RADIUS, box=box)
    deltas = climbed(passes[0].deltas["image"], lambda delta: theirs(**batch, delta=delta)["loss"], move, STEPS)
    for seen, delta in zip(passes, [*deltas, deltas[-1]], strict=True):
        agree(seen.deltas["image"], delta)
    gradients = gradients_of(theirs(**batch, delta=deltas[-1])["loss"], theirs)
    move_weights(theirs, matrices(theirs, gradients, gamma))
    agree_on_gradients(ours.model, gradients_of(theirs(**batch, delta=deltas[-1])["loss"], theirs))


@DROPOUTS
def test_awp_of_trades(dropout: float) -> None:
    """The clean branch is of θ while δ climbs, and is run anew at θ + v, with its gradient."""
    batch, gamma, beta = pixels(), 0.1, 6.0
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    torch.manual_seed(7)
    method = awp(trades(radius=RADIUS, step_size=SIZE, steps=STEPS, beta=beta), gamma=gamma)
    report_loss: list[Tensor] = []
    passes: list[PassTrace] = []
    generator = torch.Generator().manual_seed(3)
    report_loss.append(method.step(ours, batch, generator=generator, trace=passes.append).loss)
    start = next(seen for seen in passes if seen.modalities).deltas["image"]

    torch.manual_seed(7)
    natural = theirs(**batch)
    fixed = natural["logits"].detach()
    move = linf(batch["x"], step_size=SIZE, radius=RADIUS, box=None)
    deltas = climbed(start, lambda delta: kl(fixed, theirs(**batch, delta=delta)["logits"]), move, STEPS)

    def taught(natural: dict[str, Tensor]) -> Tensor:
        perturbed = theirs(**batch, delta=deltas[-1])["logits"]
        return natural["loss"] + beta * kl(natural["logits"], perturbed)

    move_weights(theirs, matrices(theirs, gradients_of(taught(natural), theirs), gamma))
    loss = taught(theirs(**batch))
    agree_on_gradients(ours.model, gradients_of(loss, theirs))
    agree(report_loss[0], loss.detach())


def test_a_random_start_is_the_same_at_both_weights() -> None:
    passes = stepped(replace(neftune(modality="image"), weights=WeightAscent(0.1)), pixel_net(), pixels())
    assert [seen.weight for seen in passes] == [0.0, 1.0]
    assert torch.equal(passes[0].deltas["image"], passes[1].deltas["image"])
    assert passes[0].deltas["image"].any()


def test_shared_masks_are_those_of_both_weights() -> None:
    """With dropout shared, a move of nothing gives the very logits again."""
    net = pixel_net(dropout=0.5)
    passes = stepped(awp(replace(trades(radius=RADIUS, step_size=SIZE), dropout="shared"), gamma=1e-300), net, pixels())
    assert passes[-2].logits is not None
    assert torch.equal(passes[-2].logits, passes[-1].logits)  # type: ignore[arg-type]


# ---- what is left behind ----------------------------------------------------------------------------------------------


class Trouble(BaseException):
    """As a keyboard interrupt is."""


@pytest.mark.parametrize("method", [sam(), awp(trades(radius=0.1, step_size=0.1, steps=1))], ids=["sam", "awp"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Trouble])
def test_whatever_is_raised_the_weights_are_as_they_were(error: Any, method: AdversarialTraining) -> None:
    """At every forward and loss of the step, and in its backward."""
    for where in range(1, 12):
        target, calls = pixel_net(), []
        before = weights_of(target.model)

        def trouble(*_: object, at: int = where, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == at:
                raise error

        target.model.head.register_forward_hook(trouble)
        target.model.head.weight.register_hook(trouble)

        def loss(outputs: Any, batch: Any, trouble: Callable[..., None] = trouble) -> Tensor:
            trouble()
            return outputs["loss"]  # type: ignore[no-any-return]

        try:
            method.step(target, pixels(), loss=loss)
        except error:
            pass
        else:
            assert len(calls) < where
        assert all(torch.equal(value, before[name]) for name, value in target.model.named_parameters())


def test_an_update_sees_the_weights_that_were_and_gradients_add_up() -> None:
    target, seen = pixel_net(), []
    before = weights_of(target.model)
    sam(rho=0.3).step(target, pixels(), update=lambda: seen.append(weights_of(target.model)))
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())
    once = {name: p.grad.clone() for name, p in target.model.named_parameters() if p.grad is not None}
    sam(rho=0.3).step(target, pixels())
    for name, parameter in target.model.named_parameters():
        agree(parameter.grad, 2 * once[name])


def test_a_loss_scale_changes_the_gradient_by_itself_alone() -> None:
    plain, scaled = pixel_net(), pixel_net()
    method = awp(pgd(radius=0.1, step_size=0.1, steps=1))
    for target, backward in ((plain, None), (scaled, lambda total: (1024 * total).backward())):
        method.step(target, pixels(), backward=backward, generator=torch.Generator().manual_seed(0))
    for one, other in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        agree(other.grad, 1024 * one.grad)  # type: ignore[operator]


def test_an_attack_ignores_moved_weights() -> None:
    target, method = pixel_net(), awp(pgd(radius=0.1, step_size=0.1, steps=1))
    before = weights_of(target.model)
    Attack(method.perturber, method.maximizer)(target, pixels())
    assert all(torch.equal(value, before[name]) for name, value in target.model.named_parameters())


def test_statistics_of_a_norm_see_every_pass_or_the_clean_ones_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    rows = {"x": torch.randn(5, 6, dtype=torch.float64), "y": torch.tensor([0, 1, 2, 0, 1])}
    counted = {}
    for stats in ("all", "clean"):
        target = Adapter(
            model,
            {"image": Site("0", at="input")},
            call=lambda model, batch: model(batch["x"]),
            loss=lambda logits, batch: nn.functional.cross_entropy(logits, batch["y"]),
        )
        before = int(model[1].num_batches_tracked)  # type: ignore[arg-type]
        method = replace(awp(trades(radius=0.1, step_size=0.1, steps=1)), track_stats=stats)  # type: ignore[arg-type]
        method.step(target, rows)
        counted[stats] = int(model[1].num_batches_tracked) - before  # type: ignore[arg-type]
    assert counted == {"all": 5, "clean": 2}  # clean and perturbed at each of both weights, and a move


# ---- the step itself --------------------------------------------------------------------------------------------------


def test_no_gradient_is_no_step_and_a_tiny_one_goes_as_far_as_any() -> None:
    weights = {"a": torch.ones(3), "b": torch.full((2, 2), 2.0)}
    zero = {name: torch.zeros_like(value) for name, value in weights.items()}
    assert not any(step.any() for step in WeightAscent(0.5).steps(weights, zero).steps.values())
    for size in (1e-30, 1.0, 1e30):
        steps, finite = WeightAscent(0.5).steps(weights, {name: size * value for name, value in weights.items()})
        assert finite
        total = torch.stack([step.square().sum() for step in steps.values()]).sum().sqrt()
        torch.testing.assert_close(total, torch.tensor(0.5))


@given(st.integers(0, 10_000), st.sampled_from(["all", "tensor"]), st.booleans())
def test_a_move_is_as_long_as_it_should_be(seed: int, per: Any, relative: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = (
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in (("a", (3,)), ("b", (2, 4)))}
        for _ in range(2)
    )
    steps, _ = WeightAscent(0.5, per=per, relative=relative).steps(weights, gradients)
    groups = [["a", "b"]] if per == "all" else [["a"], ["b"]]
    for names in groups:
        length, of_weights, along, of_gradients = (
            sum((x * y).sum() for x, y in ((left[n], right[n]) for n in names))
            for left, right in ((steps, steps), (weights, weights), (steps, gradients), (gradients, gradients))
        )
        radius = 0.5 * (math.sqrt(of_weights) if relative else 1)
        assert math.sqrt(length) == pytest.approx(radius, rel=1e-12)
        assert along == pytest.approx(math.sqrt(length * of_gradients), rel=1e-12)  # along the gradient


def test_gradients_that_are_not_finite_raise_or_move_no_weight() -> None:
    target = pixel_net()
    rows = {**pixels(), "x": pixels()["x"].clone()}
    before = weights_of(target.model)

    def loss(outputs: Any, batch: Any) -> Tensor:  # finite, with a gradient that is not
        return outputs["loss"] + 0 * (outputs["logits"] - outputs["logits"].detach()).sum().sqrt()  # type: ignore[no-any-return]

    with pytest.raises(NonFiniteError, match="the gradient that weights move along"):
        sam().step(target, rows, loss=loss)
    passes: list[PassTrace] = []
    replace(sam(), nonfinite="keep").step(target, rows, loss=loss, trace=passes.append)
    assert torch.equal(passes[0].logits, passes[1].logits)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in target.model.named_parameters())


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": 0.0}, "finite radius above 0"),
        ({"radius": math.inf}, "finite radius above 0"),
        ({"radius": 1.0, "per": "row"}, "expected per to be one of"),
        ({"radius": 1.0, "chosen": "all"}, "chosen as a function"),
    ],
)
def test_an_ascent_of_weights_that_makes_no_sense(options: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        WeightAscent(**options)


@pytest.mark.parametrize(
    "method",
    [freelb({"image": 0.1}), villa({"image": 0.1}), fgm(modality="image")],
    ids=["freelb", "villa", "fgm"],
)
def test_several_passes_that_teach_before_one_update_are_refused(method: AdversarialTraining) -> None:
    with pytest.raises(ConfigurationError, match="teaches once an update beside weights"):
        sam(method)
    with pytest.raises(ConfigurationError, match="teaches once an update beside weights"):
        replace(sam(), perturber=method.perturber, maximizer=method.maximizer)


def test_a_maximiser_that_does_not_say_what_it_teaches_is_refused_in_the_step() -> None:
    class Unsaid(FreeLB):
        def lessons(self, perturber: object) -> int:
            return 1

    method = sam(replace(pgd(radius=0.1, step_size=0.1), maximizer=Unsaid(2)))
    with pytest.raises(ConfigurationError, match="teaches once an update beside weights"):
        method.step(pixel_net(), pixels())


def test_what_is_no_ascent_and_weights_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="weights as a WeightAscent"):
        replace(sam(), weights=0.1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a parameter to move"):
        replace(sam(), weights=WeightAscent(0.1, chosen=lambda name, _: False)).step(pixel_net(), pixels())
    target = pixel_net()
    target.model.register_parameter("idle", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ConfigurationError, match="that the loss depends on"):
        replace(sam(), weights=WeightAscent(0.1, chosen=lambda name, _: name == "idle")).step(target, pixels())


def test_an_optimiser_in_the_backward_is_refused_and_leaves_no_moved_weights() -> None:
    target = pixel_net()
    before = weights_of(target.model)

    def descend(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)  # type: ignore[arg-type]

    target.model.head.weight.register_post_accumulate_grad_hook(descend)
    with pytest.raises(ConfigurationError, match="updates after a step's last backward"):
        sam().step(target, pixels())
    assert all(torch.equal(value, before[name]) for name, value in target.model.named_parameters())


# ---- several processes ------------------------------------------------------------------------------------------------


def rows_of(rank: int) -> dict[str, Tensor]:
    return {name: value[4 * rank : 4 * rank + 4] for name, value in pixels(rows=8).items()}


def in_processes(rank: int, folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    del folder

    def under_ddp() -> dict[str, Tensor]:
        net = pixel_net()
        target = net.through(DistributedDataParallel(net.model))
        before = weights_of(net.model)
        generator = torch.Generator().manual_seed(3)
        awp(trades(radius=RADIUS, step_size=SIZE, steps=STEPS)).step(target, rows_of(rank), generator=generator)
        assert all(torch.equal(value, before[name]) for name, value in net.model.named_parameters())
        return {name: p.grad for name, p in net.model.named_parameters() if p.grad is not None}

    def sharded() -> str:
        net = pixel_net()
        fully_shard(net.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        try:
            sam().step(net, rows_of(rank))
        except ConfigurationError as error:
            return str(error)
        return "went through"

    return {"ddp": attempt(under_ddp), "sharded": attempt(sharded)}


found = shared_results("passes.test_weights:in_processes", 2)


@pytest.mark.slow
def test_under_ddp_each_process_moves_its_own_copy_and_gradients_are_averaged_once(found: list[dict[str, Any]]) -> None:
    alone = []
    for rank in range(2):
        net = pixel_net()
        generator = torch.Generator().manual_seed(3)
        awp(trades(radius=RADIUS, step_size=SIZE, steps=STEPS)).step(net, rows_of(rank), generator=generator)
        alone.append({name: p.grad for name, p in net.model.named_parameters()})
    for name in alone[0]:
        mean = (alone[0][name] + alone[1][name]) / 2  # type: ignore[operator]
        for rank in range(2):
            agree(found[rank]["ddp"][name], mean)


@pytest.mark.slow
def test_sharded_parameters_are_refused(found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert "sharded over processes" in found[rank]["sharded"]
