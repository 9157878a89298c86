"""Pixel attacks of others, such as torchattacks', on a model that takes pixels beside a text that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapted
from advvl.attacks import AttackResult
from advvl.checks import check_functions, check_seed
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.rows import take_rows
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
    x = batch.get(field)
    if not isinstance(x, Tensor) or len(labels) != len(x):
        raise DataError(f"expected pixels in {field!r} with a label for each row, got {type(x).__name__}; see field=…")
    clean = x if pixels is None else pixels.pixels(x)
    if not (clean.min() >= -_TOLERANCE and clean.max() <= 1 + _TOLERANCE):
        raise DataError(f"expected pixels in [0, 1], got {clean.min():g} to {clean.max():g}; give pixels=Normalised(…)")
    with adapted(model) as adapter, ExitStack() as stack:
        for kept in (preserved, kept_modes, kept_weights, kept_buffers):
            stack.enter_context(kept(adapter.model))
        stack.enter_context(adapter.clean())
        adapter.model.eval()
        torch.manual_seed(seed)
        parts = [torch.tensor([row], device=x.device) for row in range(len(x))] if one_by_one else [None]
        found = []
        for part in parts:
            some = batch if part is None else rows(batch, part)
            chosen = slice(None) if part is None else part
            images = _Images(adapter, some, field, clean[chosen], pixels, rows).eval()
            found.append(make(images)(clean[chosen].clamp(0, 1), labels[chosen]))
        delta = _verified(found, clean, ball)
        site = delta if pixels is None else pixels.per_pixel(delta)
        with torch.no_grad():
            logits = adapter.logits(adapter.forward({**batch, field: (x + site).to(x.dtype)}))
    return AttackResult({modality: site}, None, logits.argmax(dim=-1) == labels)


def _verified(found: list[Any], clean: Tensor, ball: Ball) -> Tensor:
    """The perturbation in pixels, measured from the attacked images."""
    if not all(isinstance(one, Tensor) for one in found) or torch.cat(found).shape != clean.shape:
        raise DataError(f"expected attacked images {tuple(clean.shape)}, got something else; see the attack")
    attacked = torch.cat(found).detach().to(clean)
    if not attacked.isfinite().all():
        raise DataError("expected finite attacked images, got some that are not; see the attack")
    place, radius = Place(clean), float(getattr(ball, "radius", torch.inf))
    norms = ball.norms(attacked - clean, place)
    # Of an L2 ball, rounding of x + δ grows with the number of pixels, not with the radius.
    rounding = _TOLERANCE * radius + torch.finfo(clean.dtype).eps * clean[0].numel() ** 0.5
    if not (norms <= radius + rounding).all():
        raise ConfigurationError(
            f"expected an attack within {ball}, got a norm of {norms.max():g}; give it that radius"
        )
    if attacked.min() < -_TOLERANCE or attacked.max() > 1 + _TOLERANCE:
        raise ConfigurationError(
            f"expected attacked pixels in [0, 1], got {attacked.min():g} to {attacked.max():g}; see the attack"
        )
    return ball.project(attacked - clean, Place(clean.clamp(0, 1)), box=(0.0, 1.0))


class _Images(nn.Module):
    """A model of images `(n, C, H, W)` in [0, 1] that gives logits, the rest of its batch as it is."""

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
        moved = moved if self._pixels is None else self._pixels.per_pixel(moved)
        return self._adapter.logits(self._adapter.forward({**batch, self._field: (x + moved).to(x.dtype)}))
