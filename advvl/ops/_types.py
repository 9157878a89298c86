"""The types that the ops take and return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Norm = Literal["l2", "linf"]
Rule = Literal["normalised", "sign", "plain"]
Per = Literal["sample", "token"]
Backend = Literal["auto", "reference", "cpu", "triton"]
Box = tuple[float, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """The rows of a perturbation, and which of its positions are real.

    Arguments:
        norm, per: the norm, and the entries that one norm is taken over.
        mask: `(B, T)` bool or any leading axes of the perturbation; None: every position is real.
        segments: `(N,)` long, the sample of each row of a packed perturbation, or None.
        unit: 0 or more, of the shape of a norm in `Stepped`: the length that step size and radius are measured in, in
            each row; None: 1.
    """

    norm: Norm = "l2"
    per: Per = "sample"
    mask: Tensor | None = None
    segments: Tensor | None = None
    unit: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """The bounds of a perturbation: a ball around zero and, for `x + delta`, a box.

    Arguments:
        radius: of the ball, in the norm of the rows; `math.inf`: none.
        box: (low, high), or None.
        x: of the perturbation's shape; needed with a box.
    """

    radius: float = math.inf
    box: Box | None = None
    x: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Move:
    """One perturbation and its ascent step; see `step_and_project`."""

    delta: Tensor
    grad: Tensor
    step_size: float
    rows: Rows = Rows()
    region: Region = Region()
    rule: Rule = "normalised"
    floor: float = 0.0


class Stepped(NamedTuple):
    """The result of a move: the moved perturbation and, per row, the norms computed on the way.

    `grad_norm` and `delta_norm` are the ball's norm of the gradient and of the new perturbation; `finite` says whether
    the row's gradient was finite. Each has the shape `(B,)` for `per="sample"`, `(N,)` with `segments` (entry i is
    sample i; entries past the last sample are zero), and the perturbation's shape without its last axis for
    `per="token"`.
    """

    delta: Tensor
    grad_norm: Tensor
    delta_norm: Tensor
    finite: Tensor


class Implementation(Protocol):
    """The functions of a back end's module."""

    def refusal(self, delta: Tensor, rows: Rows) -> str | None:
        """Return why this back end cannot work on such a perturbation here; None if it can."""

    def move(self, moves: Sequence[Move], *, inplace: bool) -> list[Stepped]: ...

    def project(self, delta: Tensor, rows: Rows, region: Region) -> Tensor: ...

    def norms(self, delta: Tensor, rows: Rows) -> Tensor: ...
