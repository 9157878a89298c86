"""Bounds of a network's outputs: they hold, and they are exact where they can be."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.words_and_regions import drawn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from advvl import L2, Ball, Linf
from advvl.errors import ConfigurationError, DataError, NonFiniteError
from advvl.evaluation import bounds
from advvl.evaluation.bounds import certified_margins, output_bounds
from advvl.evaluation.objectives import as_scores, margin
from advvl.perturbers.places import Place

METHODS = ("interval", "linear")


def perturbed(x: Tensor, ball: Ball, mask: Tensor | None, box: tuple[float, float] | None, count: int) -> Tensor:
    """Points of the region `(count, *x.shape)`: far corners and random directions, brought into ball and box."""
    place = Place(x, mask)
    points = []
    for i in range(count):
        direction = torch.randn_like(x)
        far = (direction.sign() if i % 2 else direction) * 10.0 ** (i % 3 - 1)
        points.append(x + ball.project(place.masked(far), place, box=box))
    return torch.stack(points)


BALLS = (L2(0.7), L2(0.3, per="token"), Linf(0.2), L2(0.2, relative=True), Linf(0.0))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), text=st.sampled_from(BALLS), image=st.sampled_from((*BALLS, None)), boxed=st.booleans()
)
def test_no_perturbation_within_the_budget_leaves_the_bounds(
    seed: int, text: Ball, image: Ball | None, boxed: bool
) -> None:
    network, inputs = drawn(seed)
    mask = inputs["text_mask"]
    budget = {"text": text} if image is None else {"text": text, "image": image}
    limits = (inputs["text"].min().item() - 0.05, inputs["text"].max().item() + 0.05)
    boxes = {"text": limits} if boxed else {}
    targets = network(**inputs).argmax(1)
    words = perturbed(inputs["text"], text, mask, limits if boxed else None, 30)
    regions = [inputs["image"]] * 30 if image is None else perturbed(inputs["image"], image, None, None, 30)
    outputs = torch.stack([network(w, r, mask) for w, r in zip(words, regions, strict=True)])
    margins = torch.stack([-margin(each, as_scores(targets, each)) for each in outputs])
    for method in METHODS:
        found = output_bounds(network, inputs, budget, masks={"text": mask}, boxes=boxes, method=method)
        assert (found.lower <= outputs).all()
        assert (outputs <= found.upper).all()
        least = certified_margins(network, inputs, targets, budget, masks={"text": mask}, boxes=boxes, method=method)
        assert (least <= margins).all()


@pytest.mark.parametrize("seed", range(10))
def test_linear_bounds_lie_inside_interval_bounds(seed: int) -> None:
    network, inputs = drawn(seed)
    budget = {"text": L2(0.5), "image": Linf(0.1)}
    loose, tight = (output_bounds(network, inputs, budget, method=method) for method in METHODS)
    assert (tight.lower >= loose.lower).all()
    assert (tight.upper <= loose.upper).all()
    assert (tight.upper - tight.lower).mean() < 0.8 * (loose.upper - loose.lower).mean()
    margins = [certified_margins(network, inputs, torch.zeros(3).long(), budget, method=method) for method in METHODS]
    assert (margins[1] >= margins[0]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("ball", "reach"),
    [
        pytest.param(Linf(0.3), lambda w: 0.3 * w.abs().sum(dim=(1, 2)), id="Linf"),
        pytest.param(L2(0.3), lambda w: 0.3 * w.square().sum(dim=(1, 2)).sqrt(), id="L2"),
        pytest.param(L2(0.3, per="token"), lambda w: 0.3 * w.square().sum(-1).sqrt().sum(-1), id="L2-per-token"),
    ],
)
def test_bounds_of_a_linear_network_are_exact(ball: Ball, reach: Any, method: str) -> None:
    """The last of three words is masked; L2 by intervals is that of the box around the ball, which is larger."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, 2)).double()
    x, mask = torch.randn(1, 3, 4).double(), torch.tensor([[True, True, False]])
    weight = (network[2].weight @ network[1].weight).view(2, 3, 4)[:, :2]
    found = output_bounds(network, {"input": x}, {"input": ball}, masks={"input": mask}, method=method)  # type: ignore[arg-type]
    exact = network(x) + reach(weight)
    if method == "linear":
        torch.testing.assert_close(found.upper, exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.lower, 2 * network(x) - exact, rtol=1e-12, atol=0)
    assert (found.upper >= exact).all()


class Words(nn.Module):
    """Words `(B, T, 4)` with a mask of any dtype, pooled by a mean, written by shapes: logits `(B, 2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        whole = (words * mask).view(words.size(0), -1)
        parts = (words * mask.to(words.dtype)).reshape(words.shape[0], words.shape[1] * words.shape[2])
        return self.head(input=whole + parts) / words.size(1) - words.ndim


@pytest.mark.parametrize("method", METHODS)
def test_shapes_dtypes_and_bool_masks_are_constants(method: Any) -> None:
    torch.manual_seed(0)
    network, words = Words().double(), torch.randn(2, 3, 4).double()
    mask = torch.tensor([[[True], [True], [False]], [[True], [False], [True]]])
    found = output_bounds(network, {"words": words, "mask": mask}, {"words": Linf(0.1)}, method=method)
    reach = 0.1 * (network.head.weight.view(1, 2, 3, 4) * 2 / 3 * mask.unsqueeze(1)).abs().flatten(2).sum(2)
    torch.testing.assert_close(found.upper, network(words, mask) + reach, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.lower, network(words, mask) - reach, rtol=1e-12, atol=0)


def test_a_ball_per_token_of_inputs_without_tokens_is_that_of_the_sample() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double(), torch.randn(3, 4).double()
    found, expected = (output_bounds(network, {"input": x}, {"input": L2(0.3, per=per)}) for per in ("token", "sample"))
    torch.testing.assert_close((found.lower, found.upper), (expected.lower, expected.upper), rtol=1e-12, atol=0)


def test_what_cancels_has_no_width() -> None:
    class Cancels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (-x) / 1.0

    x = torch.ones(2, 3)
    found = output_bounds(Cancels(), {"x": x}, {"x": Linf(5.0)})
    assert (found.upper - found.lower).abs().max() < 1e-12
    assert (output_bounds(Cancels(), {"x": x}, {"x": Linf(5.0)}, method="interval").upper >= 10).all()


def test_a_box_cuts_the_region() -> None:
    network = nn.Linear(2, 1, bias=False).double()
    network.weight.data = torch.tensor([[1.0, -1.0]]).double()
    x = torch.tensor([[0.9, 0.05]], dtype=torch.float64)
    found = output_bounds(network, {"input": x}, {"input": Linf(0.3)}, boxes={"input": (0, 1)})
    torch.testing.assert_close(found.upper, torch.tensor([[1.0]]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.lower, torch.tensor([[0.6 - 0.35]]).double(), rtol=0, atol=1e-12)
    found = output_bounds(network, {"input": x}, {"input": L2(10.0)}, boxes={"input": (0, 1)})
    assert found.upper.item() == pytest.approx(1)


def test_convolutions_are_bounded_as_the_linear_maps_that_they_are() -> None:
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Flatten()).double()
    x = torch.rand(2, 2, 8, 8).double()
    weight = torch.func.jacrev(lambda image: convolutions(image[None])[0])(x[0]).flatten(1)
    found = output_bounds(convolutions, {"input": x}, {"input": Linf(0.1)})
    reach = (0.1 * weight.abs().sum(1)).expand(2, -1)
    torch.testing.assert_close(found.upper, convolutions(x) + reach, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_rounding_does_not_take_an_output_out_of_its_bounds(method: str) -> None:
    """Without a radius the bounds are the output itself, summed in another order: sums of 10,000 that cancel."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10_000, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(3, 10_000).double() * 1e6
    found = output_bounds(network, {"input": x}, {"input": Linf(0.0)}, method=method)  # type: ignore[arg-type]
    orders = [torch.randperm(10_000) for _ in range(20)]
    for order in orders:
        hidden = F.relu(F.linear(x[:, order], network[0].weight[:, order], network[0].bias))
        outputs = network[2](hidden)
        assert (found.lower <= outputs).all()
        assert (outputs <= found.upper).all()
    assert (found.upper - found.lower).max() < 1e-5 * found.upper.abs().max()


def test_the_network_and_its_inputs_are_left_as_they_are() -> None:
    network, inputs = drawn(0)
    network.float().train()
    inputs["text"] = inputs["text"].float().requires_grad_()
    before, kept = copy.deepcopy(network.state_dict()), {name: x.clone() for name, x in inputs.items()}
    found = output_bounds(network, inputs, {"text": L2(0.5)})
    assert network.training
    assert found.lower.dtype == torch.float64
    assert not found.lower.requires_grad
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(kept[name], x) for name, x in inputs.items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_the_rows_at_a_time_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = drawn(0)
    whole = output_bounds(network, inputs, {"text": L2(0.5), "image": L2(0.5)})
    monkeypatch.setattr(bounds, "_ENTRIES", 1)
    parts = output_bounds(network, inputs, {"text": L2(0.5), "image": L2(0.5)})
    torch.testing.assert_close(whole.lower, parts.lower, rtol=1e-12, atol=1e-12)


class Forward(nn.Module):
    """A network whose forward is a function of one input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[no-any-return]


class Halved(nn.Module):
    """A parametrization that is no weight of torch's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "parametrized",
    [
        pytest.param(parametrizations.weight_norm, id="weight-norm"),
        pytest.param(parametrizations.spectral_norm, id="spectral-norm"),
        pytest.param(lambda layer: parametrize.register_parametrization(layer, "bias", Halved()), id="bias"),
    ],
)
def test_parametrized_weights_are_bounded_as_their_values(parametrized: Any, method: Any) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)]
    network = nn.Sequential(*(parametrized(one) if isinstance(one, nn.Linear) else one for one in layers)).double()
    network.eval()  # where a spectral norm is no longer estimated
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    plain.load_state_dict({name: getattr(network[int(name[0])], name[2:]) for name in plain.state_dict()})
    x = torch.randn(3, 4).double()
    expected = output_bounds(plain, {"input": x}, {"input": Linf(0.3)}, method=method)
    found = output_bounds(network, {"input": x}, {"input": Linf(0.3)}, method=method)
    torch.testing.assert_close((found.lower, found.upper), (expected.lower, expected.upper), rtol=1e-12, atol=0)
    assert parametrize.is_parametrized(network[0])
    torch.testing.assert_close(network(x), plain(x))  # it is left as it is


def multiplied_in_place(x: Tensor) -> Tensor:
    """torch.fx sees a product that leaves `y` as it was; at 0 the two are the same."""
    y = x = 2 * x
    x *= 2.0
    return x + y


def overwritten(x: Tensor, step: Any) -> Tensor:
    """The step's result is thrown away, and what it overwrote is used."""
    x = 2 * x
    step(x)
    return x + 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(
            lambda x: (y := 2 * x).relu_() + y, "of ReLUs whose input is not used again, got 'relu_'", id="method"
        ),
        pytest.param(lambda x: F.relu(y := 2 * x, inplace=True) + y, "not used again, got 'relu'", id="function"),
        pytest.param(lambda x: (y := 2 * x).view(-1, 3).relu_() + y, "not used again, got 'relu_'", id="view"),
        pytest.param(lambda x: overwritten(x, torch.relu_), "not used again, got 'relu_'", id="relu-thrown-away"),
        pytest.param(lambda x: overwritten(x, lambda y: y.mul_(0)), "in-place steps only .*, got 'mul_'", id="product"),
        pytest.param(lambda x: overwritten(x, lambda y: torch.neg(y, out=y)), "in-place steps only .*'neg'", id="out"),
        pytest.param(multiplied_in_place, "whose torch.fx graph gives its outputs, got others", id="multiplied"),
    ],
)
@pytest.mark.parametrize("x", [torch.ones(3, 3), torch.zeros(3, 3)], ids=["ones", "zeros"])
def test_what_is_overwritten_and_used_again_is_refused(function: Any, message: str, x: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=message):
        output_bounds(Forward(function), {"x": x}, {"x": Linf(0.1)})


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), torch.relu_, lambda x: F.relu(x, inplace=True)])
def test_a_relu_in_place_of_what_is_not_used_again_is_bounded_and_leaves_the_inputs(relu: Any) -> None:
    x, scale = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    before = x.clone(), scale.clone()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = relu

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return 1 + 2 * self.relu(x) * self.relu(scale)  # type: ignore[no-any-return]

    found = output_bounds(Twice(), {"x": x, "scale": scale}, {"x": Linf(0.0)})
    torch.testing.assert_close(found.upper, 1 + 2 * x.relu() * scale.relu())
    assert torch.equal(x, before[0])
    assert torch.equal(scale, before[1])


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("name", ["", "1"])
def test_hooks_are_refused(name: str, register: str) -> None:
    network = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
    getattr(network.get_submodule(name), register)(lambda module, *_: None)
    with pytest.raises(ConfigurationError, match=rf"without hooks, got one on '{name or 'Sequential'}'; remove it"):
        output_bounds(network, {"input": torch.ones(3, 3)}, {"input": Linf(0.1)})


def test_a_forward_set_on_a_layer_and_a_layer_of_another_class_are_refused() -> None:
    class Doubled(nn.Linear):
        __module__ = "torch.nn.ours"  # so that torch.fx takes it for a layer

        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    network = nn.Sequential(nn.Linear(3, 2))
    network[0].forward = lambda input: 2 * input
    with pytest.raises(ConfigurationError, match="without hooks, got one on '0'"):
        output_bounds(network, {"input": torch.ones(3, 3)}, {"input": Linf(0.1)})
    with pytest.raises(ConfigurationError, match="got Doubled"):
        output_bounds(nn.Sequential(Doubled(3, 2)), {"input": torch.ones(3, 3)}, {"input": Linf(0.1)})


@pytest.mark.parametrize(
    ("network", "message"),
    [
        pytest.param(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), "a network of Linear, .*; got Tanh at '_1'", id="Tanh"),
        pytest.param(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "got BatchNorm1d", id="BatchNorm"),
        pytest.param(Forward(torch.sigmoid), "got sigmoid", id="sigmoid"),
        pytest.param(Forward(lambda x: x * x), "got mul", id="square"),
        pytest.param(Forward(lambda x: 1 / x), "got truediv", id="reciprocal"),
        pytest.param(Forward(lambda x: x + 2 if x.sum() > 0 else x), "torch.fx can trace", id="branch"),
        pytest.param(Forward(lambda x: x - x.mean(0)), "keep the 3 examples apart .*, got 'mean'", id="batch-mean"),
        pytest.param(Forward(lambda x: x.unsqueeze(1) + x), "keep the 3 examples apart", id="pairs"),
        pytest.param(Forward(lambda x: x.sum()), "keep the 3 examples apart", id="scalar"),
        pytest.param(Forward(lambda x: (x, x)), "one tensor of outputs", id="tuple"),
        pytest.param(Forward(lambda x: x.unsqueeze(1)), r"expected outputs \(B, K\), got \(3, 1, 3\)", id="shape"),
        pytest.param(Forward(lambda x: torch.ones(3, 3)), "depend on", id="constant"),
    ],
)
def test_a_network_that_cannot_be_bounded_is_refused(network: nn.Module, message: str) -> None:
    name = "x" if isinstance(network, Forward) else "input"
    with pytest.raises(ConfigurationError, match=message):
        output_bounds(network, {name: torch.ones(3, 3)}, {name: Linf(0.1)})


LINEAR = nn.Linear(3, 2)
ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("inputs", "budget", "options", "message"),
    [
        pytest.param({"x": ONES}, {"x": Linf(0.1)}, {}, r"expected inputs among \['input'\], got \['x'\]", id="name"),
        pytest.param({"input": ONES}, {"text": Linf(0.1)}, {}, r"budget of inputs \['input'\]", id="budget"),
        pytest.param({"input": ONES}, {}, {}, "a ball for one input", id="no-budget"),
        pytest.param({"input": ONES}, {"input": L2(math.inf)}, {}, "finite radius", id="radius"),
        pytest.param({"input": ONES}, {"input": 0.1}, {}, "finite radius", id="no-ball"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"boxes": {"x": (0, 1)}}, "expected a box of", id="box-name"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"boxes": {"input": (2, 3)}}, "inside its box", id="box"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"masks": {"input": ONES}}, "expected a bool mask", id="mask"),
        pytest.param({"input": ONES * math.nan}, {"input": L2(1)}, {}, "finite numbers in 'input'", id="nan"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"method": "alpha"}, "expected method", id="method"),
        pytest.param({"input": torch.tensor(1.0)}, {"input": L2(1)}, {}, "one row per example", id="scalar"),
        pytest.param({"input": ONES[:0]}, {"input": L2(1)}, {}, "one row per example, one or more", id="empty"),
        pytest.param(ONES, {"input": L2(1)}, {}, "expected inputs as a dict", id="inputs-alone"),
        pytest.param({"input": ONES}, L2(1), {}, "expected budget as a dict", id="ball-alone"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"masks": ONES}, "expected masks as a dict", id="mask-alone"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"boxes": (0, 1)}, "expected boxes as a dict", id="box-alone"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"masks": {"input": [True]}}, "a bool mask", id="list-mask"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"boxes": {"input": 1}}, "expected a box", id="no-box"),
        pytest.param({"input": ONES}, {"input": L2(1)}, {"boxes": {"input": "ab"}}, "expected a box", id="text-box"),
        pytest.param({"input": ONES.long()}, {"input": L2(1)}, {}, "floating-point numbers to perturb", id="ids"),
    ],
)
def test_what_cannot_be_bounded_is_refused(inputs: Any, budget: Any, options: Any, message: str) -> None:
    with pytest.raises((ConfigurationError, DataError), match=message):
        output_bounds(LINEAR, inputs, budget, **options)


def test_what_is_no_network_and_an_input_that_is_missing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"an nn\.Module, got <"):
        output_bounds(torch.relu, {"input": ONES}, {"input": L2(1)})  # type: ignore[arg-type]
    network, inputs = drawn(0)
    with pytest.raises(ConfigurationError, match=r"all inputs without a default, got none for \['text_mask'\]"):
        output_bounds(network, {"text": inputs["text"], "image": inputs["image"]}, {"text": L2(1)})


@pytest.mark.parametrize("targets", [torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([0.0, 1.0]), [0, 1], None])
def test_targets_that_are_no_classes_are_refused(targets: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        certified_margins(LINEAR, {"input": ONES}, targets, {"input": L2(1)})


def test_weights_that_are_not_finite_are_refused() -> None:
    network = copy.deepcopy(LINEAR)
    network.weight.data[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match="finite weights"):
        output_bounds(network, {"input": ONES}, {"input": L2(1)})
