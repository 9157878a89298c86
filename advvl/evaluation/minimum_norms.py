"""Minimum norms: the smallest perturbation that an attack finds for each example, its median, and accuracy by radius.

Legend: N examples, R radii.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.checks import are_increasing, shown
from advvl.errors import ConfigurationError
from advvl.evaluation.attempts import Rows
from advvl.evaluation.curves import Curve, kind_of
from advvl.evaluation.measurement import Budget, Flag, name_of, radius_of
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.objectives import margin
from advvl.evaluation.scoring import Batch, Targets
from advvl.evaluation.statistics import Interval, median_interval
from advvl.evaluation.worst_case import worst_case
from advvl.maximizers.minimum_norm import MinimumNorm
from advvl.ops import Box
from advvl.perturbers.pixels import Normalised


@dataclass(frozen=True, eq=False, repr=False)
class MinimumNorms:
    """The size of the smallest perturbation found that takes the whole score of each of N examples.

    Each is an upper bound of the distance to the nearest wrong answer.

    Arguments:
        kind: of the budget, such as "image (L2)".
        radius: the largest size that was looked for.
        clean: scores without perturbation, `(N,)` fp64 in [0, 1].
        norms: `(N,)` fp64: 0 where the score was 0 before, inf where no perturbation within the radius was found.
        flags: findings that put the norms in doubt.
    """

    kind: str
    radius: float
    clean: Tensor
    norms: Tensor
    flags: tuple[Flag, ...] = ()

    def __repr__(self) -> str:
        """Give the median with its interval, and the flags."""
        found = self.median()
        lines = [
            f"{self.kind}, {len(self.norms)} examples: median {found.estimate:.4g} [{found.low:.4g}, {found.high:.4g}]"
        ]
        return "\n".join([*lines, *(f"flag: {flag.name}. {flag.detail}" for flag in self.flags)])

    def median(self, *, confidence: float = 0.95) -> Interval:
        """The median size with its interval over examples; an end is inf where no perturbation was found.

        Raises:
            ConfigurationError: a confidence outside (0, 1).
        """
        return median_interval(self.norms.tolist(), confidence=confidence, within=(0.0, math.inf))

    def curve(self, radii: Sequence[float] | None = None) -> Curve:
        """The worst scores at each radius: an example keeps its clean score below its own norm, and has 0 from there.

        Arguments:
            radii: ascending, above 0 and up to the radius of the search; None: every norm found, 100 of them at most,
                and that radius.

        Raises:
            ConfigurationError: other radii.
        """
        chosen = self._steps() if radii is None else radii
        if not are_increasing(chosen) or not chosen or chosen[-1] > self.radius:
            raise ConfigurationError(
                f"expected radii above 0, each larger than the one before, up to {self.radius:g}, got {shown(radii)}; "
                "search further for larger ones"
            )
        found = tuple(map(float, chosen))
        scores = torch.where(self.norms > torch.tensor(found, dtype=torch.float64)[:, None], self.clean, 0.0)
        return Curve(self.kind, found, tuple(f"{one:g}" for one in found), (0,) * len(found), self.clean, scores)

    def _steps(self) -> list[float]:
        inside = sorted({norm for norm in self.norms.tolist() if 0 < norm < self.radius})
        if len(inside) > 100:
            inside = [inside[round(i * (len(inside) - 1) / 99)] for i in range(100)]
        return [*inside, self.radius]


def minimum_norms(
    model: Adapter | nn.Module,
    loader: Iterable[Batch],
    budget: Budget,
    *,
    steps: int = 100,
    targets: Targets | None = None,
    rows: Rows | None = None,
    boxes: Mapping[str, Box] | None = None,
    pixels: Mapping[str, Normalised] | None = None,
    draws: int = 1,
    seed: int = 0,
    checks: bool = True,
    over_processes: bool = False,
) -> MinimumNorms:
    """Find the smallest perturbation that flips each example, by one run of the fast minimum-norm attack.

        found = minimum_norms(model, loader, {"image": L2(4.0)})
        print(found)
        print(found.curve([0.5, 1.0, 2.0]))

    What counts is measured on the perturbation's tensor and scored in a fresh forward, as in `worst_case`. The model is
    left as found.

    Arguments:
        budget: one ball for each modality perturbed, of the largest radius to look in. With several modalities a size is
            the largest share of its radius that a modality takes up, from 0 to 1.
        steps: of the search.
        model, loader, targets, rows, boxes, pixels, draws, seed, checks, over_processes: as of `worst_case`.

    Raises:
        ConfigurationError: a budget that is none; steps below 1; and as `worst_case`.
        DataError, SiteError: as `worst_case`.

    Source: Pintor et al., NeurIPS 2021, as in `MinimumNorm`.
    """
    if not isinstance(budget, Mapping):
        raise ConfigurationError(f'expected one budget, as in {{"image": L2(4.0)}}, got {shown(budget)}')
    attack = NamedAttack(name="minimum norm", maximizer=MinimumNorm(steps), objective=margin, step_fraction=1.0)
    measured = worst_case(
        model,
        loader,
        budget,
        attacks=[attack],
        targets=targets,
        rows=rows,
        boxes=boxes,
        pixels=pixels,
        draws=draws,
        seed=seed,
        checks=checks,
        over_processes=over_processes,
    )
    one = len(budget) == 1
    shares = [measured.norms[name][0, 0] / (1.0 if one else radius_of(ball)) for name, ball in budget.items()]
    sizes = torch.stack(shares).amax(dim=0)
    found = torch.where(measured.scores[0, 0] == 0, sizes, math.inf)
    radius = radius_of(next(iter(budget.values()))) if one else 1.0
    return MinimumNorms(
        kind_of(budget) if one else f"share of {name_of(budget)}",
        radius,
        measured.clean,
        torch.where(measured.clean == 0, 0.0, found),
        measured.flags,
    )
