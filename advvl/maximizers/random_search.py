"""Random search: an attack that uses losses only, so that vanishing gradients cannot mislead it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from advvl.checks import is_number
from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, check_count
from advvl.maximizers.geometry import plain_ascents
from advvl.maximizers.probes import Probe, Probes
from advvl.maximizers.rows import Best
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import Linf
from advvl.perturbers.base import Perturber
from advvl.perturbers.places import Place
from advvl.runtime.randomness import on_device

HALVINGS = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)
"""The shares of all queries after which blocks become half as large."""


@dataclass(frozen=True)
class RandomSearch(InnerMaximizer):
    """Square-like random search without gradients: a row keeps a block of random signs if its loss rises.

    In a tensor `(B, C, H, W)` a block is a square of pixels, with one sign per channel; in any other tensor it is some
    real positions and some channels of the row, with a sign per entry. Under Linf the ascent's step size is the size of
    a block's entries; twice the radius takes each to an edge of the ball. Under L2 it is the length of a block that
    covers the whole row, for which the radius is a good choice; a smaller block is shorter by the root of its share.
    Each query tries a block in every modality at once. A row ends at its highest loss; where the attack has
    `correct=…`, at the highest loss that flips it, if any does. No gradients are computed, so the result counts no rows
    as unmoved.

    Arguments:
        queries: forwards.
        share: of a row's entries in the first blocks; halved after 0.1, 0.5, 2, 10, 20, 40, 60 and 80 % of the queries.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search",
    ECCV 2020, generalised from images; its schedule, with the share of AutoAttack (0.8). Under L2 a block is added to the
    perturbation, which is simpler than the published exchange of mass between two squares.

    Raises:
        ConfigurationError: queries below 1; a share outside (0, 1]; without a loss per row; a perturber that `AutoPGD`
            would refuse.
    """

    queries: int
    _: KW_ONLY
    share: float = 0.8

    def __post_init__(self) -> None:
        check_count("queries", self.queries)
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise ConfigurationError(f"expected share to be a number in (0, 1], got {self.share!r}")

    @property
    def gradients(self) -> bool:
        return False

    def check(self, perturber: Perturber) -> None:
        plain_ascents(self, perturber, bounded=True)

    def probes(
        self, perturber: Perturber, *, generator: torch.Generator | None = None, state: AscentState | None = None
    ) -> Probes:
        del state
        ascents = plain_ascents(self, perturber, bounded=True)
        best, end, draws = Best(), Best(flips_first=True), dict[torch.device, torch.Generator]()
        point = yield Probe(perturber.starts(), delta_gradients=False)
        best.see(point)
        end.see(point)
        for query in range(1, self.queries):
            share = self.share / 2 ** sum(query > part * self.queries for part in HALVINGS)
            tried = {}
            for modality, delta in best.deltas.items():
                if generator is not None and delta.device not in draws:  # once: one on another device is seeded by it
                    draws[delta.device] = on_device(generator, delta.device)
                tried[modality] = _tried(
                    ascents[modality], delta, point.places[modality], share, draws.get(delta.device)
                )
            point = yield Probe(tried, delta_gradients=False)
            best.see(point)
            end.see(point)
        feedback = yield Probe(end.deltas, weight=1.0, delta_gradients=False, update=True)
        return feedback.deltas


def _tried(ascent: Ascent, delta: Tensor, place: Place, share: float, generator: torch.Generator | None) -> Tensor:
    """The perturbation with a block added to it, inside the ball and the box."""
    block = _square(delta, share, generator) if delta.ndim == 4 else _positions(delta, place, share, generator)
    assert not callable(ascent.step_size)
    size = ascent.step_size if isinstance(ascent.ball, Linf) else ascent.step_size * share**0.5
    return ascent.project(delta + size * ascent.direction(block, place), place)


def _square(like: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """A square of random signs, one per channel, in each row of a tensor `(B, C, H, W)`; zero elsewhere."""
    rows, channels, *sides = like.shape
    length = max(round((share * sides[0] * sides[1]) ** 0.5), 1)
    inside = []
    for axis, side in enumerate(sides):
        free = max(side - length, 0) + 1
        first = (_draw(like, (rows, 1), generator) * free).long()
        at = torch.arange(side, device=like.device)
        held = (at >= first) & (at < first + length)
        inside.append(held.view(rows, 1, side, 1) if axis == 0 else held.view(rows, 1, 1, side))
    return torch.where(inside[0] & inside[1], _signs(like, (rows, channels, 1, 1), generator), 0.0)


def _positions(like: Tensor, place: Place, share: float, generator: torch.Generator | None) -> Tensor:
    """Random signs in some positions and channels of each row; zero elsewhere."""
    signs = _signs(like, tuple(like.shape), generator)
    if like.ndim == 2:  # positions are rows of their own, or there are none
        return torch.where(_some(_draw(like, tuple(like.shape), generator), share), signs, 0.0)
    noise = _draw(like, tuple(like.shape[:2]), generator)
    if place.mask is not None and place.mask.shape == noise.shape:
        noise = noise.masked_fill(~place.mask, 2.0)
    chosen = _some(noise, share**0.5).view(*noise.shape, *[1] * (like.ndim - 2))
    channels = _some(_draw(like, (len(like), like.shape[-1]), generator), share**0.5)
    return torch.where(chosen & channels.view(len(like), *[1] * (like.ndim - 2), like.shape[-1]), signs, 0.0)


def _some(noise: Tensor, share: float) -> Tensor:
    """The entries with the smallest noise in each row: a `share` of those below 1, and at least one."""
    count = ((noise < 1).sum(1, keepdim=True) * share).round().clamp(min=1)
    return noise.argsort(1).argsort(1) < count


def _draw(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)


def _signs(like: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.where(_draw(like, shape, generator) < 0.5, -1.0, 1.0).to(like.dtype)
