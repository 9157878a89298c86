"""Pixel attacks of others, such as torchattacks', on a model that takes pixels beside a text that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapted
from advvl.attacks import AttackResult
from advvl.checks import check_functions, check_seed
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.named_attacks import PixelAttack
from advvl.evaluation.objectives import as_scores, cross_entropy
from advvl.evaluation.replacements import places_of
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import Batch, Score, Targets
from advvl.evaluation.searches import Searched
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.pixels import Normalised
from advvl.perturbers.places import Place
from advvl.runtime.randomness import preserved
from advvl.runtime.states import kept_buffers, kept_modes, kept_weights

_TOLERANCE = 1e-5  # of the radius and the box, for attacks that add x and δ in fp32


def attack_pixels(
    make: Callable[[nn.Module], Any],
    model: Adapter | nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor,
    ball: Ball,
    *,
    field: str = "pixel_values",
    modality: str = "image",
    pixels: Normalised | None = None,
    rows: Callable[[Mapping[str, Any], Tensor], Mapping[str, Any]] = take_rows,
    one_by_one: bool = False,
    seed: int = 0,
) -> AttackResult:
    """Attack the pixels of a batch by any attack that takes a model of images, and verify what it returns.

        attack_pixels(lambda model: torchattacks.PGD(model, eps=8 / 255), clip, batch, labels, Linf(8 / 255), pixels=norm)

    Arguments:
        make: from a module, images `(B, C, H, W)` in [0, 1] to logits `(B, A)`, to an attack of images and labels.
        model: what `adapt(model)` gave, or a bare model; attacked in eval mode and left as it was.
        batch: its pixels in `field`, as the model takes them; everything else in it stays.
        labels: the right classes `(B,)`.
        ball: how far the pixels may go, in [0, 1]; the attack's own radius is its maker's.
        pixels: how the batch was normalised; None: it is in [0, 1] as it is.
        rows: from a batch and row numbers to the batch of those rows.
        one_by_one: attack each example by itself, for attacks that run the model on some of the images alone.
        seed: of torch's global random state, which such attacks draw from and which is put back.

    Returns:
        The perturbation of the tensor in `field`, and the examples still right in a fresh forward. What is outside the ball
        or [0, 1] by rounding alone is brought inside.

    Raises:
        ConfigurationError: an attack that leaves its ball or [0, 1], or runs the model on some of the images.
        DataError: pixels outside [0, 1], or an attack's result that is no such images.
    """
    check_functions(make=make, rows=rows)
    check_seed(seed)
    if not isinstance(ball, L2 | Linf):
        raise ConfigurationError(f"expected a ball L2(…) or Linf(…) of pixels, got {type(ball).__name__}")
    with adapted(model) as adapter, _attacking(adapter, seed):
        pictures = _Pictures.of(adapter, batch, labels, field, pixels, rows)
        site = pictures.attacked(make, ball, one_by_one=one_by_one).site
        logits = pictures.logits(site)
    return AttackResult({modality: site}, None, logits.argmax(dim=-1) == labels)


def search_pixels(
    adapter: Adapter,
    batch: Batch,
    attack: PixelAttack,
    ascent: Ascent,
    targets: Targets,
    score: Score,
    *,
    rows: Callable[[Batch, Tensor], Batch] = take_rows,
    seed: int,
) -> Searched:
    """Make an attack on pixels as `searches.search` makes others.

    Arguments:
        ascent: the ball of the pixels, and their normalisation.
        targets, score: what attacks on a batch know and try to take away.
        rows: from a batch and row numbers to the batch of those rows.
        seed: of torch's global random state, which is put back.

    Raises:
        ConfigurationError: as `attack_pixels`; a site that takes something else than these pixels.
        DataError: as `attack_pixels`.
    """
    given = targets(batch)
    labels = given if given.ndim == 1 else given.argmax(dim=1)
    x = batch.get(attack.field)
    site = places_of(adapter, batch, [attack.modality])[attack.modality].x
    if not isinstance(x, Tensor) or site.shape != x.shape or not torch.equal(site, x.to(site)):
        raise ConfigurationError(
            f"expected the site of {attack.modality!r} to take the pixels in {attack.field!r}, got {tuple(site.shape)} "
            "there; give Site(…, at='input') of a layer of advvl.sites"
        )
    with _attacking(adapter, seed):
        pictures = _Pictures.of(adapter, batch, labels, attack.field, ascent.pixels, rows)
        radius = float(getattr(ascent.ball, "radius", torch.inf))
        found = pictures.attacked(
            lambda images: attack.make(images, radius), ascent.ball, name=attack.name, one_by_one=attack.one_by_one
        )
        with torch.no_grad():
            outputs = pictures.outputs(found.site)
            logits = adapter.logits(outputs)
            seen, losses = score(outputs, batch), cross_entropy(logits, as_scores(given, logits)).double()
    deltas, asked = {attack.modality: found.site}, found.by_gradients
    still = {attack.modality: ~found.moved} if asked else {}
    nonfinite = {attack.modality: found.nonfinite} if asked else {}
    return Searched(deltas, deltas, seen, losses, still, nonfinite, asked)


@contextmanager
def _attacking(adapter: Adapter, seed: int) -> Iterator[None]:
    """The model in eval mode without perturbations, and torch's random state from a seed; all is left as found."""
    with ExitStack() as stack:
        for kept in (preserved, kept_modes, kept_weights, kept_buffers):
            stack.enter_context(kept(adapter.model))
        stack.enter_context(adapter.clean())
        adapter.model.eval()
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class _Attacked:
    """An attack's perturbation of the tensor in the batch, and the gradients that it asked for, by row `(B,)`, bool."""

    site: Tensor
    by_gradients: bool
    moved: Tensor
    nonfinite: Tensor


@dataclass(frozen=True, eq=False)
class _Pictures:
    """The pixels of a batch, as the model takes them in `x` and in [0, 1] in `clean`."""

    adapter: Adapter
    batch: Batch
    labels: Tensor
    field: str
    pixels: Normalised | None
    rows: Callable[[Batch, Tensor], Batch]
    x: Tensor
    clean: Tensor

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        batch: Batch,
        labels: Tensor,
        field: str,
        pixels: Normalised | None,
        rows: Callable[[Batch, Tensor], Batch],
    ) -> _Pictures:
        x = batch.get(field)
        if not isinstance(x, Tensor) or len(labels) != len(x):
            raise DataError(
                f"expected pixels in {field!r} with a label for each row, got {type(x).__name__}; see field=…"
            )
        clean = x if pixels is None else pixels.pixels(x)
        if not (clean.min() >= -_TOLERANCE and clean.max() <= 1 + _TOLERANCE):
            raise DataError(
                f"expected pixels in [0, 1], got {clean.min():g} to {clean.max():g}; give pixels=Normalised(…)"
            )
        return cls(adapter, batch, labels, field, pixels, rows, x, clean)

    def attacked(
        self, make: Callable[[nn.Module], Any], ball: Ball, *, name: str | None = None, one_by_one: bool
    ) -> _Attacked:
        """Make the attack, and verify what it returns; its name is for messages."""
        count = range(len(self.x))
        parts = [torch.tensor([row], device=self.x.device) for row in count] if one_by_one else [None]
        found, watched = [], []
        for part in parts:
            batch = self.batch if part is None else self.rows(self.batch, part)
            chosen = slice(None) if part is None else part
            images = _Images(self.adapter, batch, self.field, self.clean[chosen], self.pixels, self.rows)
            found.append(make(images.eval())(self.clean[chosen].clamp(0, 1), self.labels[chosen]))
            watched.append(images)
        delta = _verified(found, self.clean, ball, "" if name is None else f" {name!r}")
        return _Attacked(
            delta if self.pixels is None else self.pixels.per_pixel(delta),
            any(images.by_gradients for images in watched),
            torch.cat([images.moved for images in watched]),
            torch.cat([images.nonfinite for images in watched]),
        )

    def outputs(self, site: Tensor) -> Any:
        """The model's outputs under a perturbation of the tensor in the batch."""
        return self.adapter.forward({**self.batch, self.field: (self.x + site).to(self.x.dtype)})

    def logits(self, site: Tensor) -> Tensor:
        with torch.no_grad():
            return self.adapter.logits(self.outputs(site))


def _verified(found: list[Any], clean: Tensor, ball: Ball, attack: str) -> Tensor:
    """The perturbation in pixels, measured from the attacked images."""
    if not all(isinstance(one, Tensor) for one in found) or torch.cat(found).shape != clean.shape:
        raise DataError(f"expected attacked images {tuple(clean.shape)}, got something else; see the attack{attack}")
    attacked = torch.cat(found).detach().to(clean)
    if not attacked.isfinite().all():
        raise DataError(f"expected finite attacked images, got some that are not; see the attack{attack}")
    place, radius = Place(clean), float(getattr(ball, "radius", torch.inf))
    norms = ball.norms(attacked - clean, place)
    # Of an L2 ball, rounding of x + δ grows with the number of pixels, not with the radius.
    rounding = _TOLERANCE * radius + torch.finfo(clean.dtype).eps * clean[0].numel() ** 0.5
    if not (norms <= radius + rounding).all():
        raise ConfigurationError(
            f"expected the attack{attack} within {ball}, got a norm of {norms.max():g}; give it that radius, or a budget "
            "in its own norm"
        )
    if attacked.min() < -_TOLERANCE or attacked.max() > 1 + _TOLERANCE:
        raise ConfigurationError(
            f"expected attacked pixels in [0, 1], got {attacked.min():g} to {attacked.max():g}; see the attack{attack}"
        )
    return ball.project(attacked - clean, Place(clean.clamp(0, 1)), box=(0.0, 1.0))


class _Images(nn.Module):
    """A model of images `(n, C, H, W)` in [0, 1] that gives logits, the rest of its batch as it is.

    It notes whether gradients by the images are asked for, and the rows that have one that is not zero, or not finite.
    """

    def __init__(
        self,
        adapter: Adapter,
        batch: Mapping[str, Any],
        field: str,
        clean: Tensor,
        pixels: Normalised | None,
        rows: Callable[[Mapping[str, Any], Tensor], Mapping[str, Any]],
    ) -> None:
        super().__init__()
        self.model = adapter.model
        self._adapter, self._batch, self._field = adapter, batch, field
        self._clean, self._pixels, self._rows = clean, pixels, rows
        self.by_gradients = False
        self.moved, self.nonfinite = (torch.zeros(len(clean), dtype=torch.bool, device=clean.device) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        batch, x, clean = self._batch, self._batch[self._field], self._clean
        if len(images) != len(x):
            if len(x) != 1:
                raise ConfigurationError(
                    f"expected an attack that runs all {len(x)} images at a time, got {len(images)}; pass one_by_one=True"
                )
            same = torch.zeros(len(images), dtype=torch.long, device=x.device)
            batch, x, clean = self._rows(batch, same), x[same], clean[same]
        moved = images - clean
        if moved.requires_grad:
            moved.register_hook(self._note)  # type: ignore[no-untyped-call]  # of torch
        moved = moved if self._pixels is None else self._pixels.per_pixel(moved)
        return self._adapter.logits(self._adapter.forward({**batch, self._field: (x + moved).to(x.dtype)}))

    def _note(self, gradient: Tensor) -> None:
        rows = gradient.flatten(1)
        moves, breaks = (rows != 0).any(dim=1), ~rows.isfinite().all(dim=1)
        alone = len(self.moved) == 1
        self.by_gradients = True
        self.moved |= moves.any() if alone else moves
        self.nonfinite |= breaks.any() if alone else breaks
