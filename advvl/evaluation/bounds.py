"""Bounds: how far a small ReLU network's outputs can move under any perturbation within a budget.

An attack gives an upper bound of robust accuracy; a certified margin above 0 gives a lower one, since then no perturbation
changes the answer. Two methods: *interval* bounds go forward once and are loose; *linear* ones (CROWN) go back from every
ReLU to the inputs, are exact on linear networks, and are never looser, since the better of both is kept.

Rounding. All is computed in fp64, on a copy of the network. Every bound is widened by more than rounding can have changed,
in the bound or in a forward in fp64: a sum of n terms is off by less than n ulp of the sum of their sizes, and those sizes
are followed through the network. So a bound holds for the network in exact arithmetic and in fp64. A forward in fp32 has
errors of its own, which no bound here knows: compare with the network in fp64.

Legend: B examples, K outputs, R bounds that are computed at a time, `*S` the shape of a tensor of one example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Node

from advvl.checks import is_choice, shown
from advvl.errors import ConfigurationError, DataError, NonFiniteError
from advvl.evaluation.measurement import Budget
from advvl.evaluation.networks import Network
from advvl.evaluation.regions import Region

Method = Literal["interval", "linear"]

_ENTRIES: Final = 2**24
"""Of the tensors that go back through the network at a time, 128 MiB."""

_ULP: Final = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of each output, `(B, K)` fp64: no perturbation within the budget takes it outside.

    Arguments:
        lower, upper: sound in exact arithmetic and in fp64.
    """

    lower: Tensor
    upper: Tensor


def output_bounds(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    budget: Budget,
    *,
    masks: Mapping[str, Tensor] | None = None,
    boxes: Mapping[str, tuple[float, float]] | None = None,
    method: Method = "linear",
) -> Bounds:
    """Bound the outputs `(B, K)` of a network under every perturbation of its inputs within a budget.

        output_bounds(network, {"text": words, "image": regions}, {"text": L2(0.5), "image": Linf(0.1)})

    Arguments:
        network: of affine layers and ReLUs, in eval mode (docs/bounds.md lists what it may hold); left as it is.
        inputs: the arguments of its forward by name, `(B, *S)`; `nn.Sequential` calls its own "input".
        budget: the ball of each input that is perturbed, all at once; others stay as they are.
        masks: `(B, T)` bool, True at positions that may be perturbed; an input that is not named may be everywhere.
        boxes: lower and upper bound of the perturbed input, such as (0, 1) for pixels.
        method: `"linear"`, or `"interval"`, which is far cheaper on wide networks.

    Raises:
        ConfigurationError: a part of the network that is not supported; a budget, mask or box of no input; a ball without
            radius.
        DataError: inputs that are not finite, lie outside their box, or have other numbers of rows.
        NonFiniteError: a bound that is not a number.

    Source: Gowal et al., arXiv:1810.12715 (interval); Zhang et al., NeurIPS 2018 (CROWN, with adaptive lower slopes).
    """
    sweep = _Sweep(network, inputs, budget, masks, boxes, method)
    return Bounds(sweep.lower[sweep.output], sweep.upper[sweep.output])


def certified_margins(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    targets: Tensor,
    budget: Budget,
    *,
    masks: Mapping[str, Tensor] | None = None,
    boxes: Mapping[str, tuple[float, float]] | None = None,
    method: Method = "linear",
) -> Tensor:
    """Bound from below the margin of each example, `(B,)` fp64: the right logit minus the largest other one.

    Above 0 no perturbation within the budget changes the answer. At or below 0 nothing is known.

    Arguments:
        targets: classes `(B,)`, whole numbers.
        network, inputs, budget, masks, boxes, method: as in `output_bounds`.

    Raises:
        DataError: targets that are no classes of the outputs.
        ConfigurationError, NonFiniteError: as `output_bounds`.
    """
    sweep = _Sweep(network, inputs, budget, masks, boxes, method)
    lower, upper = sweep.lower[sweep.output], sweep.upper[sweep.output]
    count = lower.shape[1]
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool
    if not whole or targets.shape != lower.shape[:1]:
        raise DataError(f"expected a tensor with a class for each of {len(lower)} examples, got {shown(targets)}")
    if count < 2 or not ((targets >= 0) & (targets < count)).all():
        raise DataError(f"expected classes in 0..{count - 1} of two or more, got {shown(targets.tolist())}")
    right = nn.functional.one_hot(targets.long().to(lower.device), count).bool()
    gaps = lower[right].unsqueeze(1) - upper
    if method == "linear":
        every = torch.eye(count, dtype=lower.dtype, device=lower.device)
        gaps = torch.maximum(gaps, sweep.lowest(sweep.output, right.to(every) - every[:, None]).T)
    return gaps.masked_fill(right, torch.inf).amin(dim=1)


class _Sweep:
    """Bounds of every tensor of a network that depends on a perturbed input, in the order in which it computes them."""

    def __init__(
        self,
        network: nn.Module,
        inputs: Mapping[str, Tensor],
        budget: Budget,
        masks: Mapping[str, Tensor] | None,
        boxes: Mapping[str, tuple[float, float]] | None,
        method: Method,
    ) -> None:
        if not is_choice(method, get_args(Method)):
            raise ConfigurationError(f"expected method to be one of {get_args(Method)}, got {shown(method)}")
        for name, given in (("inputs", inputs), ("budget", budget), ("masks", masks), ("boxes", boxes)):
            is_named = given is None or isinstance(given, Mapping)
            if not is_named:
                raise ConfigurationError(f"expected {name} as a dict by the name of the input, got {shown(given)}")
        self.network = Network(network, inputs, perturbed=tuple(budget))
        self.output = self.network.output
        self.regions = {
            self.network.placeholders[name]: region
            for name, region in Region.of(self.network.inputs, budget, masks or {}, boxes or {}).items()
        }
        self.lower: dict[Node, Tensor] = {}
        self.upper: dict[Node, Tensor] = {}
        self.size: dict[Node, Tensor] = {}  # a bound of every entry's size, and of all sums that lead to it
        with torch.no_grad():
            for node in self.network.affected:
                self._bound(node)
                if method == "linear" and (node is self.output or self.network.feeds_relu(node)):
                    self._tighten(node, whole=node is self.output)
        if not (self.lower[self.output].isfinite() & self.upper[self.output].isfinite()).all():
            raise NonFiniteError("expected finite bounds, got some that are not; see the network's weights")

    def _bound(self, node: Node) -> None:
        """Bound a tensor by intervals, from those that it is computed from."""
        if node in self.regions:
            region = self.regions[node]
            slack = 4 * _ULP * region.size
            self.lower[node], self.upper[node], self.size[node] = (
                region.lower - slack,
                region.upper + slack,
                region.size,
            )
            return
        sources = self.network.sources(node)
        lower, upper, size = ({one: of[one] for one in sources} for of in (self.lower, self.upper, self.size))
        if self.network.is_relu(node):
            (source,) = sources
            self.lower[node], self.upper[node] = lower[source].clamp(min=0), upper[source].clamp(min=0)
            self.size[node] = size[source]
            return
        centre = self.network.run(node, {one: (lower[one] + upper[one]) / 2 for one in sources})
        radius = self.network.spread(node, {one: (upper[one] - lower[one]) / 2 for one in sources})
        offset = self.network.run(node, {one: torch.zeros_like(lower[one]) for one in sources}).abs()
        self.size[node] = self.network.spread(node, size) + offset
        slack = self._slack(node, *sources) * self.size[node]
        self.lower[node], self.upper[node] = centre - radius - slack, centre + radius + slack

    def _tighten(self, node: Node, *, whole: bool) -> None:
        """Bound the entries of a tensor by linear functions of the inputs, those alone that a ReLU's sign depends on."""
        lower, upper = self.lower[node].flatten(1), self.upper[node].flatten(1)
        count = lower.shape[1]
        wanted = torch.ones(count, dtype=torch.bool) if whole else ((lower < 0) & (upper > 0)).any(dim=0)
        if not wanted.any():
            return
        for entries in torch.split(wanted.nonzero().flatten(), self._rows(len(lower))):
            rows = nn.functional.one_hot(entries, count).to(lower)[:, None].expand(-1, *lower.shape)
            rows = rows.view(len(entries), *self.lower[node].shape)
            lower[:, entries] = torch.maximum(lower[:, entries], self.lowest(node, rows).T)
            upper[:, entries] = torch.minimum(upper[:, entries], -self.lowest(node, -rows).T)
        self.lower[node], self.upper[node] = (one.view_as(self.lower[node]) for one in (lower, upper))

    def lowest(self, node: Node, rows: Tensor) -> Tensor:
        """Bound from below R sums of the entries of a tensor, weighted by `rows` `(R, B, *S)`: `(R, B)`."""
        total = -self._slack(*self.lower) * (rows.abs() * self.size[node]).flatten(2).sum(2)
        weights = {node: rows}
        for one in reversed(self.network.affected):
            if one not in weights:
                continue
            rows = weights.pop(one)
            if one in self.regions:
                total = total + self.regions[one].lowest(rows)
                continue
            if self.network.is_relu(one):
                (source,) = self.network.sources(one)
                rows, constant = _relaxed(rows, self.lower[source], self.upper[source])
                back = {source: rows}
            else:
                back, constant = self.network.back(one, rows)
            total = total + constant
            for source, more in back.items():
                weights[source] = weights[source] + more if source in weights else more
        return total

    def _slack(self, *nodes: Node) -> float:
        """The relative rounding error of a computation that goes through these tensors, forward and back."""
        return 4 * _ULP * sum(self.lower[one][0].numel() + 4 for one in nodes if one in self.lower)

    def _rows(self, examples: int) -> int:
        largest = max(one[0].numel() for one in self.lower.values())
        return max(1, _ENTRIES // (examples * largest))


def _relaxed(rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Carry `rows` `(R, B, *S)` back through a ReLU whose input has these bounds; also the constant `(R, B)`.

    Where the sign is open, a ReLU lies below the chord and above the line through 0 of slope 0 or 1 that encloses less.
    """
    is_open = (lower < 0) & (upper > 0)
    chord = torch.where(is_open, upper / torch.where(is_open, upper - lower, 1), (lower >= 0).to(upper))
    below = torch.where(is_open, (upper > -lower).to(upper), chord)
    negative = rows.clamp(max=0)
    intercept = torch.where(is_open, -chord * lower, 0)
    return rows.clamp(min=0) * below + negative * chord, (negative * intercept).flatten(2).sum(2)
