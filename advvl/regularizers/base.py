"""The contract of a regulariser: the tensor that it reads, the reference that it compares it with, and the penalty."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError, ShapeError
from advvl.regularizers.references import Reference

Batch = Any
Readout = str | Callable[[Any], Tensor]
Side = Literal["perturbed", "clean"]


class Regularizer(ABC):
    """A penalty on the difference between the predictions of a pass and those of a reference.

    Arguments (attributes of a class, or fields of an instance):
        reads: the tensor compared: None for the logits, a module's name for its output, or a callable of the outputs.
            All its rows count, padding as well, unless `rows` says which.
        reference: the other side; None: the clean pass of the same weights. Any other reference runs once per round, on
            the clean batch, without gradients.
        on: the pass compared with the reference: each perturbed one, or the clean one (which needs a reference).
        rows: from the batch to the mask of the rows that count, bool, of the shape of the compared tensor without its
            last axis. None: all rows of a tensor named by `reads`; for logits, those given by the adapter's positions.
    """

    reads: Readout | None = None
    reference: Reference | None = None
    on: Side = "perturbed"
    rows: Callable[[Batch], Tensor] | None = None

    @property
    @abstractmethod
    def through_clean(self) -> bool:
        """True if gradients flow into the clean branch."""

    @property
    @abstractmethod
    def vanishes_at_equality(self) -> bool:
        """True if value and gradients are zero where both sides are equal, so that a pass may be the clean one."""

    @abstractmethod
    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the penalty, a scalar.

        Arguments:
            clean, perturbed: the two sides; logits `(..., C)`, finite where they count, or the tensors that `reads`
                names.
            mask: the rows that count, of the shape of the two without the last axis; None: all.
        """


@dataclass(frozen=True)
class Weighted(Regularizer):
    """A regulariser with a weight, whose `reads`, `reference`, `on` and `rows` are keyword-only fields.

    Its penalty is zero at equality; gradients flow into the clean branch unless the other side is a reference.

    Arguments:
        axis: the axis of the classes or features in the compared tensor; all other axes are rows. None: the last;
            required for tensors of four axes or more, such as a segmentation's `(B, C, H, W)`.

    Raises:
        ConfigurationError: a weight that is not above 0, an axis that is no whole number.
    """

    weight: float = 1.0
    _: KW_ONLY
    reads: Readout | None = None
    reference: Reference | None = None
    on: Side = "perturbed"
    rows: Callable[[Batch], Tensor] | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.axis is not None and type(self.axis) is not int:
            raise ConfigurationError(f"expected the axis of the classes as a whole number, or None, got {self.axis!r}")
        if not is_number(self.weight) or not 0 < self.weight < math.inf:
            raise ConfigurationError(
                f"expected a finite weight above 0, got {self.weight!r}; for no regulariser pass regularizer=None"
            )

    @property
    def through_clean(self) -> bool:
        return self.reference is None

    @property
    def vanishes_at_equality(self) -> bool:
        return True


class Scaled(Regularizer):
    """A regulariser whose penalty is multiplied by a factor."""

    def __init__(self, regularizer: Regularizer, factor: float) -> None:
        self.regularizer, self.factor = regularizer, factor
        self.reads, self.reference = regularizer.reads, regularizer.reference
        self.on, self.rows = regularizer.on, regularizer.rows

    @property
    def through_clean(self) -> bool:
        return self.regularizer.through_clean

    @property
    def vanishes_at_equality(self) -> bool:
        return self.regularizer.vanishes_at_equality

    def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.factor * self.regularizer(clean, perturbed, mask)


def sides(
    clean: Tensor, perturbed: Tensor, mask: Tensor | None, what: str, *, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both sides with their classes or features on the last axis; one number per row, `(B,)`, gets an axis of length one.

    Arguments:
        clean, perturbed: of one shape.
        mask: the rows that count, of that shape without `axis`; None: all.
        what: a description of the sides for messages.
        axis: of the classes or features; None: the last, of up to three axes.

    Raises:
        ShapeError: sides of two shapes, an axis that they lack or that is not known, or a mask that is not one of rows.
    """
    shape = tuple(clean.shape)
    if shape != perturbed.shape:
        raise ShapeError(f"expected clean and perturbed {what} of one shape, got {shape} and {tuple(perturbed.shape)}")
    if not clean.ndim:
        raise ShapeError(f"expected {what} with one row or more and a last axis, got a single number; leave its axes")
    if axis is None and clean.ndim > 3:
        raise ShapeError(
            f"expected the axis of the classes for {what} of {shape}, got None; pass axis=1 for (B, C, …), as of a "
            "segmentation, or axis=-1"
        )
    if axis is not None and not -clean.ndim <= axis < clean.ndim:
        raise ShapeError(f"expected {what} with an axis {axis}, got {shape}; correct axis=…")
    if clean.ndim == 1:
        clean, perturbed = clean.unsqueeze(-1), perturbed.unsqueeze(-1)
    elif axis is not None:
        clean, perturbed = clean.movedim(axis, -1), perturbed.movedim(axis, -1)
    if mask is not None and mask.shape != clean.shape[:-1]:
        raise ShapeError(f"expected a mask of shape {tuple(clean.shape[:-1])}, got {tuple(mask.shape)}")
    if mask is not None and mask.is_floating_point():
        raise ShapeError(
            f"expected a mask of bool or 0/1, True or 1 for rows that count, got {mask.dtype}; "
            "compare an additive mask with 0, as in mask == 0"
        )
    return clean, perturbed


def widened(clean: Tensor, perturbed: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides in fp32 at least, with zeros in rows that do not count, whatever those rows hold."""
    wide = torch.promote_types(torch.promote_types(clean.dtype, perturbed.dtype), torch.float32)
    clean, perturbed = clean.to(wide), perturbed.to(wide)
    if mask is None:
        return clean, perturbed
    counts = mask.bool().unsqueeze(-1)
    return torch.where(counts, clean, 0.0), torch.where(counts, perturbed, 0.0)


def mean_of(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the rows that count; 0 if there are none."""
    if mask is None:
        return rows.sum() / max(rows.numel(), 1)
    return torch.where(mask.bool(), rows, 0.0).sum() / mask.bool().sum().clamp(min=1)


def check_regularizer(regularizer: object) -> None:
    """Raise ConfigurationError unless the value is a regulariser whose two sides make sense."""
    if not isinstance(regularizer, Regularizer):
        raise ConfigurationError(f"expected a regulariser such as SymmetricKL(1.5), or None, got {regularizer!r}")
    if not (regularizer.reads is None or isinstance(regularizer.reads, str) or callable(regularizer.reads)):
        raise ConfigurationError(
            f"expected reads as None, a module's name or a function of the outputs, got {regularizer.reads!r}"
        )
    if not isinstance(regularizer.reference, Reference | None):
        raise ConfigurationError(
            f"expected a reference such as Frozen.copy_of(model), or None, got {type(regularizer.reference).__name__}"
        )
    if regularizer.rows is not None and not callable(regularizer.rows):
        raise ConfigurationError(f"expected rows as a function of the batch, or None, got {regularizer.rows!r}")
    if not is_choice(regularizer.on, get_args(Side)):
        raise ConfigurationError(f"expected on to be one of {get_args(Side)}, got {regularizer.on!r}")
    if regularizer.on == "clean" and regularizer.reference is None:
        raise ConfigurationError("expected a reference for on='clean', got None: the clean pass equals itself")
