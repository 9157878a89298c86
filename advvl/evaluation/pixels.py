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
from advvl.errors import ConfigurationError
from advvl.evaluation.named_attacks import PixelAttack
from advvl.evaluation.objectives import as_scores, cross_entropy
from advvl.evaluation.pixel_checks import check_answers, checked_labels, checked_pixels, verified
from advvl.evaluation.replacements import places_of
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import Batch, Score, Targets, fresh
from advvl.evaluation.searches import Searched
from advvl.evaluation.verification import Untouched
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2, Ball, Linf
from advvl.perturbers.pixels import Normalised
from advvl.runtime.names import unwrapped
from advvl.runtime.randomness import derive_seed, preserved
from advvl.runtime.states import frozen, kept_buffers, kept_modes, kept_weights, only_user


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
        model: what `adapt(model)` gave, or a bare model; attacked in eval mode and left as it was. Its parameters require
            no grad during the attack.
        batch: its pixels in `field`, as the model takes them; everything else in it stays.
        labels: the right classes `(B,)`, whole numbers.
        ball: how far the pixels may go, in [0, 1]; the attack's own radius is its maker's.
        modality: of the adapter, whose name the perturbation gets.
        pixels: how the batch was normalised; None: it is in [0, 1] as it is.
        rows: from a batch and row numbers to the batch of those rows.
        one_by_one: attack each example by itself, for attacks that run the model on some of the images alone.
        seed: of torch's global random state, which such attacks draw from and which is put back.

    Returns:
        The perturbation of the tensor in `field`, and the examples still right in a fresh forward. What is outside the ball
        or [0, 1] by rounding alone is brought inside.

    Raises:
        ConfigurationError: an attack that leaves its ball or [0, 1], runs the model on some of the images, or writes to its
            weights.
        DataError: pixels outside [0, 1], labels that are no class ids of the model, or a result that is no such images.
        SiteError: a modality that the adapter lacks.
    """
    check_functions(make=make, rows=rows)
    check_seed(seed)
    if not isinstance(ball, L2 | Linf):
        raise ConfigurationError(f"expected a ball L2(…) or Linf(…) of pixels, got {type(ball).__name__}")
    with adapted(model) as adapter:
        adapter.check_modalities((modality,))
        pictures = _Pictures.of(adapter, batch, labels, field, pixels, rows)
        site = pictures.attacked(make, ball, one_by_one=one_by_one, seed=seed).site
        with _judging(adapter, seed):
            logits = adapter.logits(pictures.outputs(site))
        check_answers(logits, pictures.largest)
    return AttackResult({modality: site}, None, logits.argmax(dim=-1) == pictures.labels)


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
    pictures = _Pictures.of(adapter, batch, labels, attack.field, ascent.pixels, rows)
    radius = float(getattr(ascent.ball, "radius", torch.inf))
    found = pictures.attacked(
        lambda images: attack.make(images, radius),
        ascent.ball,
        name=attack.name,
        one_by_one=attack.one_by_one,
        seed=seed,
    )
    with _judging(adapter, seed):
        outputs = pictures.outputs(found.site)
        logits = adapter.logits(outputs)
        seen, losses = score(outputs, batch), cross_entropy(logits, as_scores(given, logits)).double()
    deltas, asked = {attack.modality: found.site}, found.by_gradients
    still = {attack.modality: ~found.moved} if asked else {}
    nonfinite = {attack.modality: found.nonfinite} if asked else {}
    return Searched(deltas, deltas, seen, losses, still, nonfinite, asked)


@contextmanager
def _attacking(adapter: Adapter, seed: int, name: str | None) -> Iterator[None]:
    """Around an attack of others: the model in eval mode, frozen and without perturbations; all is left as found.

    Torch's random state comes from the seed. An attack that writes to the weights is refused, by its name if it has one.
    """
    untouched = Untouched(adapter.model)
    with ExitStack() as stack:
        stack.enter_context(only_user(unwrapped(adapter.model), shares=False))
        for kept in (preserved, kept_modes, kept_weights, kept_buffers, frozen):
            stack.enter_context(kept(adapter.model))
        stack.enter_context(adapter.clean())
        adapter.model.eval()
        torch.manual_seed(seed)
        yield
    untouched.check(name)


@contextmanager
def _judging(adapter: Adapter, seed: int) -> Iterator[None]:
    """Around a forward that no attack had a hand in, without perturbations."""
    with fresh(adapter.model, derive_seed(seed, "judged")), kept_weights(adapter.model), adapter.clean():
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
    """The pixels of a batch, as the model takes them in `x` and in [0, 1] in `clean`, and the largest of its labels."""

    adapter: Adapter
    batch: Batch
    labels: Tensor
    field: str
    pixels: Normalised | None
    rows: Callable[[Batch, Tensor], Batch]
    x: Tensor
    clean: Tensor
    largest: int

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
        x, clean = checked_pixels(batch, field, pixels)
        labels = checked_labels(labels, x)
        largest = int(labels.max()) if len(labels) else -1
        return cls(adapter, batch, labels, field, pixels, rows, x, clean, largest)

    def attacked(
        self, make: Callable[[nn.Module], Any], ball: Ball, *, name: str | None = None, one_by_one: bool, seed: int
    ) -> _Attacked:
        """Make the attack, and verify what it returns; its name is for messages."""
        count = len(self.x)
        none = torch.zeros(count, dtype=torch.bool, device=self.x.device)
        if not count:  # attacks of others need not take an empty batch
            return _Attacked(torch.zeros_like(self.clean), False, none, none)
        parts = torch.arange(count, device=self.x.device).chunk(count if one_by_one else 1)
        found, watched = [], []
        with _attacking(self.adapter, seed, name):
            for part in parts:
                batch = self.rows(self.batch, part) if one_by_one else self.batch
                images = _Images(self, batch, self.clean[part])
                with torch.enable_grad():
                    found.append(make(images.eval())(self.clean[part].clamp(0, 1), self.labels[part]))
                watched.append(images)
        delta = verified(found, self.clean, ball, "" if name is None else f" {name!r}")
        return _Attacked(
            delta if self.pixels is None else self.pixels.per_pixel(delta),
            any(images.by_gradients for images in watched),
            torch.cat([images.moved for images in watched]),
            torch.cat([images.nonfinite for images in watched]),
        )

    def outputs(self, site: Tensor) -> Any:
        """The model's outputs under a perturbation of the tensor in the batch."""
        return self.adapter.forward({**self.batch, self.field: (self.x + site).to(self.x.dtype)})


class _Images(nn.Module):
    """A model of images `(n, C, H, W)` in [0, 1] that gives logits, the rest of its batch as it is.

    It notes whether gradients by the images are asked for, and the rows that have one that is not zero, or not finite.
    """

    def __init__(self, pictures: _Pictures, batch: Batch, clean: Tensor) -> None:
        super().__init__()
        self.model = pictures.adapter.model
        self._pictures, self._batch, self._clean = pictures, batch, clean
        self.by_gradients = False
        self.moved, self.nonfinite = (torch.zeros(len(clean), dtype=torch.bool, device=clean.device) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        of, batch, clean = self._pictures, self._batch, self._clean
        x = batch[of.field]
        if len(images) != len(x):
            if len(x) != 1:
                raise ConfigurationError(
                    f"expected an attack that runs all {len(x)} images at a time, got {len(images)}; pass one_by_one=True"
                )
            same = torch.zeros(len(images), dtype=torch.long, device=x.device)
            batch, x, clean = of.rows(batch, same), x[same], clean[same]
        moved = images - clean
        if moved.requires_grad:
            moved.register_hook(self._note)  # type: ignore[no-untyped-call]  # of torch
        moved = moved if of.pixels is None else of.pixels.per_pixel(moved)
        logits = of.adapter.logits(of.adapter.forward({**batch, of.field: (x + moved).to(x.dtype)}))
        check_answers(logits, of.largest)
        return logits

    def _note(self, gradient: Tensor) -> None:
        rows = gradient.flatten(1)
        moves, breaks = (rows != 0).any(dim=1), ~rows.isfinite().all(dim=1)
        alone = len(self.moved) == 1
        self.by_gradients = True
        self.moved |= moves.any() if alone else moves
        self.nonfinite |= breaks.any() if alone else breaks
