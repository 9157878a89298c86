"""Positions of a site: the real ones, and the sample and example of each, read from a batch by mask, rows and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from advvl.adapters.injection import Batch, Site
from advvl.errors import ConfigurationError, ShapeError, SiteError, more
from advvl.perturbers.places import Place

IGNORED: Final = -100
"""The label of a token that is not predicted, as of torch's cross_entropy."""


def read_positions(
    modality: str, site: Site, batch: Batch, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Read the mask `(B, T)`, bool, `rows` `(N,)` or `(B, T)`, and `examples` `(N,)` of the tensor `x` at a site.

    Returns:
        Each of the three, or None where the site has none; `rows` `(T,)` of a batch of one row are given as `(1, T)`.

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
    if mask is not None and mask.is_cpu and mask.dtype != torch.bool and (mask < 0).any():
        raise ShapeError(
            f"expected a mask of {modality!r} of 0 and 1, got negative numbers, as an additive mask has; pass "
            f"mask == 0{more('masks')}"
        )
    if mask is not None and mask.is_cpu and mask.dtype != torch.bool and (mask > 1).any():
        raise ShapeError(
            f"expected a mask of {modality!r} of 0 and 1, got numbers up to {int(mask.max())}; pass mask > 0, and "
            f"give rows to tell packed texts apart{more('masks')}"
        )
    if mask is not None and tuple(mask.shape) != tuple(x.shape[: mask.ndim]):
        raise ShapeError(
            f"expected a mask of {modality!r} over the leading axes of {tuple(x.shape)}, got "
            f"{tuple(mask.shape)}; the site's mask must give one entry per position"
        )
    if rows is not None and rows.shape != x.shape[:1] and rows.ndim == 1 and len(x) == 1:
        rows = rows.unsqueeze(0)  # of the positions of the only row
    if rows is not None and (rows.ndim >= x.ndim or rows.shape not in (x.shape[:1], x.shape[:2])):
        raise ShapeError(
            f"expected rows of {modality!r} as the sample of each row or position of {tuple(x.shape)}, got "
            f"{tuple(rows.shape)}; give those, or no rows{more('packed-rows')}"
        )
    if examples is not None and examples.shape != x.shape[:1]:
        raise ShapeError(
            f"expected examples of {modality!r} as the example of each of the {len(x)} rows of {tuple(x.shape)}, got "
            f"{tuple(examples.shape)}; give those from the batch, or no examples"
        )
    for name, of in (("rows", rows), ("examples", examples)):
        if of is not None and (of.dtype == torch.bool or of.is_floating_point() or of.is_complex()):
            raise ShapeError(
                f"expected {name} of {modality!r} as whole numbers, got {of.dtype}; give the number of each one's "
                "sample or example, from 0"
            )
        if of is not None and of.numel() and int(of.min()) < 0:
            raise ShapeError(
                f"expected {name} of {modality!r} as numbers of 0 or more, got {int(of.min())}; count from 0, and leave "
                "padding to the mask"
            )
    rows, examples = (None if of is None else of.long() for of in (rows, examples))
    return None if mask is None else mask.bool(), rows, examples


def check_rows(places: Mapping[str, Place], losses: Tensor | None, logits: Callable[[], Tensor | None]) -> None:
    """Raise ShapeError for a tensor whose first axis is not samples, and for losses of only some samples.

    The former is a packed tensor `(N, D)` with another number of vectors than samples, or a tensor with samples on its
    second axis, unless its site says so.

    Arguments:
        losses: one per sample; None if the loss is a scalar.
        logits: returns the logits, with one row per sample; called only if the losses do not decide.
    """
    if losses is not None:
        _check_losses(places, len(losses), logits)
    for modality, place in places.items():
        shape = place.x.shape
        if place.x.ndim < 2 or place.owners is not None or (place.mask is not None and losses is None):
            continue
        of, what = (losses, "losses") if losses is not None else (logits(), "rows of logits")
        if of is None or not of.ndim or len(of) == shape[0]:
            continue
        if place.x.ndim == 2 and place.mask is None:
            raise ShapeError(
                f"expected a row for each of {len(of)} {what} at the site of {modality!r}, got a tensor of "
                f"{tuple(shape)}; for a packed one give Site(…, rows=…){more('packed-rows')}"
            )
        if place.x.ndim > 2 and len(of) == shape[1] and not _by_chance(shape[0], of, losses, logits):
            raise ShapeError(_time_first(modality, shape, f"{len(of)} {what}"))


def _by_chance(rows: int, of: Tensor, losses: Tensor | None, logits: Callable[[], Tensor | None]) -> bool:
    """True if losses may be as many as positions by chance: of some tokens, or of examples of several rows each."""
    if losses is None:
        return False
    found = logits()
    return (found is not None and found.ndim > 0 and len(found) == rows) or (len(of) > 1 and rows % len(of) == 0)


_TIME_FIRST = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Transformer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
)  # as torch makes them, by default


def check_axes(modality: str, x: Tensor, modules: Iterable[nn.Module]) -> None:
    """Raise ShapeError if a layer of torch that a tensor goes through takes samples on the second axis.

    Arguments:
        x: the tensor at a site.
        modules: that of the site, and those that hold it.
    """
    for module in modules:
        parts = module.modules() if x.ndim == 3 and isinstance(module, _TIME_FIRST) else ()
        if any(getattr(part, "batch_first", None) is False for part in parts):
            raise ShapeError(_time_first(modality, x.shape, type(module).__name__))


def _time_first(modality: str, shape: torch.Size, of: str) -> str:
    return (
        f"expected samples on the first axis of {modality!r}, got them on the second of {tuple(shape)}, by {of}; "
        f"set batch_first=True, or perturb where samples come first{more('time-first')}"
    )


def _check_losses(places: Mapping[str, Place], count: int, logits: Callable[[], Tensor | None]) -> None:
    """Refuse fewer losses than rows in the logits and at every site: the other rows would neither be trained nor move."""
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
            "pixels wrap the model in PixelInput, or see Normalised"
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
    what: str, modality: str, read: Callable[[Batch], Tensor | None] | None, batch: Batch, device: torch.device
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
    if value is None and what != "mask":
        return None  # in this batch a row is a sample
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"expected {what} of the site of {modality!r} to be a tensor, got {type(value).__name__}; "
            f"for a site without any, leave {what} out of it"
        )
    return value.to(device)
