"""Places: the tensor that a perturbation is added to, and reductions over its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from advvl.ops import Per


def delta_dtype(x: Tensor) -> torch.dtype:
    """The dtype a perturbation of `x` is kept in: fp64 for fp64, else fp32, whatever `x` is stored as."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Place:
    """The tensor that a perturbation is added to, its real positions, and the sample of each of its rows.

    Arguments:
        x: the unperturbed tensor at the site, `(B, T, D)` or any `(B, ...)`, or `(N, ...)` packed; detached.
        mask: `(B, T)` bool, True at real positions, or None where all are real.
        segments: `(N,)` long, the sample of each row of a packed tensor, or `(B, T)`, of each position of one whose
            rows hold several; numbers of 0 or more, in any order. None: a row is a sample.
        examples: `(N,)` long, the example of each row where one has several, each in a ball of its own, or None.
    """

    x: Tensor
    mask: Tensor | None = None
    segments: Tensor | None = None
    examples: Tensor | None = None

    @property
    def owners(self) -> Tensor | None:
        """The sample or example of each row `(N,)` or position `(B·T,)`, if a row is not itself one; otherwise None."""
        return self.examples if self.segments is None else self.segments.flatten()

    @cached_property
    def groups(self) -> Tensor | None:
        """The segments as `ops` takes them, `(N,)` or `(B·T,)`: numbered from 0 without gaps, in the same order."""
        if self.segments is None:
            return None
        ordered, order = self.segments.flatten().sort()
        ranks = torch.zeros_like(ordered)
        ranks[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
        return torch.empty_like(ranks).scatter_(0, order, ranks)

    def packed(self, values: Tensor) -> Tensor:
        """Values of the shape of `x`, or of leading axes of it, with one row for each entry of `owners`."""
        return values.flatten(0, 1) if self.segments is not None and self.segments.ndim > 1 else values

    @property
    def packed_mask(self) -> Tensor | None:
        """The mask with one row for each entry of `owners`."""
        if self.mask is None or self.segments is None or self.segments.ndim == 1:
            return self.mask
        mask = self.mask if self.mask.ndim > 1 else self.mask.unsqueeze(1).expand(self.segments.shape)
        return self.packed(mask)

    def for_ops(self, *values: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Values of the shape of `x` with the mask and the segments, all as `ops` takes them."""
        return [self.packed(value) for value in values], self.packed_mask, self.groups

    def of_samples(self, groups: Tensor) -> Tensor:
        """A value for each group, `(N,)`, by the number of its sample; 0 for samples without rows. Reads the device."""
        if self.segments is None or self.groups is None or not self.groups.numel():
            return groups
        count = max(len(groups), int(self.segments.max()) + 1)
        return groups.new_zeros(count).index_put_((self.segments.flatten(),), groups[self.groups])

    def real(self, ndim: int) -> Tensor | None:
        """The mask with as many axes as a tensor of `ndim`, broadcastable against it; None: all positions are real."""
        return None if self.mask is None else self.mask.reshape(*self.mask.shape, *[1] * (ndim - self.mask.ndim))

    def masked(self, values: Tensor) -> Tensor:
        """Values of the shape of `x`, exactly zero at masked positions."""
        real = self.real(values.ndim)
        return values if real is None else torch.where(real, values, torch.zeros_like(values))

    def spread(self, rows: Tensor, per: Per) -> Tensor:
        """A value for each row, shaped as `ops` gives norms, broadcastable against `x`."""
        if per == "token":
            return rows.unsqueeze(-1)
        if self.segments is None or self.groups is None:
            return rows.reshape(-1, *[1] * (self.x.ndim - 1))
        return rows[self.groups].reshape(*self.segments.shape, *[1] * (self.x.ndim - self.segments.ndim))

    def row_sums(self, values: Tensor, per: Per) -> Tensor:
        """The sum over each row of values of the shape of `x`, in fp64, shaped as `ops` gives norms."""
        if per == "token":
            return values.sum(-1, dtype=torch.float64)
        return self.by_sample(self.packed(values).flatten(1).sum(1, dtype=torch.float64))

    def mean_norms(self, *, over_batch: bool) -> Tensor:
        """The mean L2 norm of the real positions of each sample, or of all samples, in fp64 `(B,)`; 0 without any."""
        sizes = torch.linalg.vector_norm(self.masked(self.x), dim=-1, dtype=torch.float64)
        real = torch.ones_like(sizes) if self.mask is None else self._positions(self.mask).to(sizes)
        totals, counts = (self.by_sample(self.packed(t).unsqueeze(-1).flatten(1).sum(1)) for t in (sizes, real))
        if over_batch:
            totals, counts = (t.sum().expand(len(t)) for t in (totals, counts))
        return totals / counts.clamp(min=1)

    def by_sample(self, rows: Tensor) -> Tensor:
        """The sum of the values of each sample's rows, `(N,)`, shaped as `ops` gives norms."""
        return rows if self.groups is None else torch.zeros_like(rows).index_add(0, self.groups, rows)

    def _positions(self, mask: Tensor) -> Tensor:
        """The mask of real positions, each with one embedding: the shape of `x` without its last axis."""
        mask = mask.any(-1) if mask.ndim == self.x.ndim else mask
        return mask.reshape(*mask.shape, *[1] * (self.x.ndim - 1 - mask.ndim)).expand(self.x.shape[:-1])
