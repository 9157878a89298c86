"""Looks at a model on a batch: its outputs under replacements of examples, and the reasons where there can be none.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from advvl.errors import NonFiniteError
from advvl.evaluation.attempts import Plan
from advvl.evaluation.replacements import Replacement, differ, of_rows, outputs_under, replacements
from advvl.evaluation.scoring import Batch
from advvl.perturbers.places import Place


class Skip(IntEnum):
    """The reason why a check was not made on an example, as a record holds it."""

    MADE = 0
    ALONE = 1
    UNDEFINED = 2
    NO_GRADIENTS = 3
    NO_SITE = 4
    SHARED = 5
    PIXELS = 6


SKIPPED: Final = {
    Skip.ALONE: "no other example of its batch has as many rows, or rows are not examples",
    Skip.UNDEFINED: "answers that are not a number at the points of the check",
    Skip.NO_GRADIENTS: "no attack by the model's own gradients",
    Skip.NO_SITE: "a site that the batch does not reach, or that cannot be perturbed there",
    Skip.SHARED: "rows that the answers of other examples depend on",
    Skip.PIXELS: "no attack on anything but pixels",
}
"""The reasons in words."""


@dataclass(frozen=True, eq=False)
class Look:
    """A model on one batch, all forwards with the same randomness.

    Arguments:
        number: of the batch.
        clean: the scores `(B,)` without perturbation.
        targets: `(B, …)`; None where the score needs none.
        seed: of the forwards.
        answers: the outputs without perturbation, with a row per example.
    """

    plan: Plan
    batch: Batch
    number: int
    clean: Tensor
    targets: Tensor | None
    seed: int
    answers: Tensor

    def under(self, deltas: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores `(B,)` and the outputs under perturbations.

        Raises:
            NonFiniteError: answers that are not a number.
        """
        plan = self.plan
        return outputs_under(plan.adapter, self.batch, deltas, plan.scored(plan.adapter), seed=self.seed)

    def changed(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """The examples `(B,)`, bool, whose outputs are others under perturbations; raises as `under`."""
        return differ(self.answers, self.under(deltas)[1])

    def replacements(self, places: Mapping[str, Place]) -> list[Replacement]:
        """Replace each example by others of the batch at some places."""
        found = replacements(places, self.targets, len(self.clean))
        return [replace(one, made=one.made.to(self.clean.device)) for one in found]

    def of_all(self, reason: Skip) -> Tensor:
        """A reason for all examples, `(B,)`."""
        return torch.full_like(self.clean, reason, dtype=torch.long)

    def coupled(self, places: Mapping[str, Place]) -> tuple[Tensor, Tensor]:
        """Replace every second example, then the rest: the answers of those that stay should stay too.

        Returns:
            The examples whose outputs change with others, `(B,)` bool, and why others could not be looked at, `(B,)`.
        """
        found, skipped = torch.zeros_like(self.clean, dtype=torch.bool), self.of_all(Skip.ALONE)
        even = torch.arange(len(found), device=found.device) % 2 == 0
        for stays in (even, ~even):
            for one in self.replacements(places):
                if not (one.made & ~stays).any():
                    continue
                deltas = {m: delta.masked_fill(of_rows(places[m], stays), 0) for m, delta in one.deltas.items()}
                try:
                    found |= stays & self.changed(deltas)
                    skipped[stays] = Skip.MADE
                except NonFiniteError:
                    skipped[stays] = Skip.UNDEFINED
                break
        return found, skipped
