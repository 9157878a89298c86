"""What the ops take and give back."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Norm = Literal["l2", "linf"]
Rule = Literal["normalised", "sign"]
Per = Literal["sample", "token"]
Backend = Literal["auto", "reference"]
Box = tuple[float, float]


class Stepped(NamedTuple):
    """What `step_and_project` gives back: the moved perturbation and, per row, what was computed on the way.

    `grad_norm` and `delta_norm` are the ball's norm of the gradient and of the new perturbation; `finite` says whether
    the row's gradient was finite. Each has the shape `(B,)` for `per="sample"`, `(N,)` with `segments` (entry i is
    sample i; entries past the last sample are zero), and the perturbation's shape without its last axis for
    `per="token"`.
    """

    delta: Tensor
    grad_norm: Tensor
    delta_norm: Tensor
    finite: Tensor
