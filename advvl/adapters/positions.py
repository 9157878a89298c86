"""Positions: which of a site's are real, and whose they are, as its mask, rows and examples read them from a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from advvl.adapters.injection import Batch, Site
from advvl.errors import ConfigurationError, ShapeError, SiteError, more
from advvl.perturbers.places import Place


def read_positions(
    modality: str, site: Site, batch: Batch, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Read the mask `(B, T)`, bool, and `rows` and `examples` `(N,)` of the tensor `x` at a site; None for what it lacks.

    Raises:
        SiteError: a field that the batch lacks.
        ShapeError: something else than a mask, rows or examples of that tensor.
    """
    mask = _read("mask", modality, site.mask, batch, x.device)
    rows = _read("rows", modality, site.rows, batch, x.device)
    examples = _read("examples", modality, site.examples, batch, x.device)
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        raise ShapeError(
            f"expected a mask of {modality!r} of bool or of whole numbers 0/1, got {mask.dtype}; "
            f"pass mask.bool(), or of an additive mask mask == 0{more('masks')}"
        )
    if mask is not None and tuple(mask.shape) != tuple(x.shape[: mask.ndim]):
        raise ShapeError(
            f"expected a mask of {modality!r} over the leading axes of {tuple(x.shape)}, got "
            f"{tuple(mask.shape)}; the site's mask must give one entry per position"
        )
    for name, owner, of in (("rows", "sample", rows), ("examples", "example", examples)):
        if of is not None and (of.shape != x.shape[:1] or of.dtype == torch.bool or of.is_floating_point()):
            raise ShapeError(
                f"expected {name} of {modality!r} to be the {owner}, a whole number, of each of the {len(x)} rows of "
                f"{tuple(x.shape)}, got {tuple(of.shape)} of {of.dtype}; give those from the batch, or no {name}"
            )
    return None if mask is None else mask.bool(), rows, examples


def check_rows(places: Mapping[str, Place], losses: Tensor | None, logits: Callable[[], Tensor | None]) -> None:
    """Raise ShapeError for a packed tensor whose site lacks rows, and for losses of some samples alone.

    Arguments:
        losses: one per sample; None where the loss is a scalar.
        logits: reads those of the outputs, with a row per sample; asked where the losses do not settle it.
    """
    if losses is not None:
        _check_losses(places, len(losses), logits)
    for modality, place in places.items():
        if place.x.ndim != 2 or any(of is not None for of in (place.mask, place.segments, place.examples)):
            continue
        of, what = (losses, "losses") if losses is not None else (logits(), "rows of logits")
        if of is not None and of.ndim and len(of) != len(place.x):
            raise ShapeError(
                f"expected a row for each of {len(of)} {what} at the site of {modality!r}, got a tensor of "
                f"{tuple(place.x.shape)}; for a packed one give Site(…, rows=…){more('packed-rows')}"
            )


def _check_losses(places: Mapping[str, Place], count: int, logits: Callable[[], Tensor | None]) -> None:
    """Refuse fewer losses than both the logits and every site have rows: the rest would neither be trained nor move."""
    rows = [len(place.x) for place in places.values() if place.owners is None and place.x.ndim > 2]
    if not rows or count >= min(rows):
        return
    found = logits()
    if found is not None and found.ndim > 1 and count < len(found):
        raise ShapeError(
            f"expected one loss per row, got {count} for {len(found)} rows of logits and {min(rows)} at the sites; "
            "keep those of all rows, or give their mean"
        )


def check_inside(modality: str, place: Place, box: tuple[float | Tensor, float | Tensor]) -> None:
    """Raise ConfigurationError if real entries are outside a box by more than rounding; reads from the device."""
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device=place.x.device) for bound in box)
    rounding = 4 * torch.finfo(place.x.dtype).eps
    beyond = (place.x < low - rounding * low.abs()) | (place.x > high + rounding * high.abs())
    outside, entries = place.masked(beyond).sum().item(), place.masked(torch.ones_like(beyond)).sum().item()
    if outside:
        got = f"{outside / entries:.2%} of its entries outside"
        raise ConfigurationError(
            f"expected the tensor of {modality!r} inside its box [{low.amin():.4g}, {high.amax():.4g}], got {got}; for "
            "pixels give pixels=Normalised(mean, std)"
        )


def matters(modality: str, place: Place, gradient: Tensor) -> bool:
    """True if a perturbation's gradient, `(B, T, …)`, is anything but zero at real positions; reads from the device.

    Raises:
        SiteError: it is zero there and not at those that the mask leaves out, so that nothing would ever move.
    """
    if place.mask is None:
        return True
    hit = gradient != 0
    if hit.ndim > place.mask.ndim:
        hit = hit.flatten(place.mask.ndim).any(-1)
    real, beyond = torch.stack([(hit & place.mask).any(), (hit & ~place.mask).any()]).tolist()
    if beyond and not real:
        raise SiteError(
            f"expected the loss to depend on the real positions of {modality!r}, got only masked ones; "
            f"for a key_padding_mask pass ~mask{more('masks')}"
        )
    return bool(real)


def _read(
    what: str, modality: str, read: Callable[[Batch], Tensor] | None, batch: Batch, device: torch.device
) -> Tensor | None:
    if read is None:
        return None
    try:
        value = read(batch)
    except KeyError as error:
        got = f", which has {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise SiteError(
            f"expected {what} of the site of {modality!r} to find its field in the batch{got}, got no {error}; "
            f"correct the site's {what}, or give the batch that field"
        ) from error
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"expected {what} of the site of {modality!r} to be a tensor, got {type(value).__name__}; "
            f"for a site without any, leave {what} out of it"
        )
    return value.to(device)
