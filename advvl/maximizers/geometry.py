"""The ascents of a perturber, for maximisers that step and project by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

from advvl.errors import ConfigurationError
from advvl.maximizers.base import InnerMaximizer
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2, Linf
from advvl.perturbers.base import Perturber
from advvl.perturbers.rules import StatefulRule


def plain_ascents(maximizer: InnerMaximizer, perturber: Perturber, *, bounded: bool) -> Mapping[str, Ascent]:
    """Modality to its ascent, in an `L2` or `Linf` ball, with a step size that is a number and a rule without a state.

    Arguments:
        bounded: refuse a ball of infinite radius.

    Raises:
        ConfigurationError: anything else.
    """
    name = type(maximizer).__name__
    if not isinstance(perturber, EmbeddingPerturber):
        raise ConfigurationError(f"expected an EmbeddingPerturber(…) for {name}, got {perturber!r}")
    for modality, ascent in perturber.ascents.items():
        if not isinstance(ascent.ball, L2 | Linf):
            raise ConfigurationError(f"expected an L2 or Linf ball of {modality!r} for {name}, got {ascent.ball!r}")
        if bounded and not math.isfinite(ascent.ball.radius):
            raise ConfigurationError(f"expected a finite radius of {modality!r} for {name}, got {ascent.ball!r}")
        if isinstance(ascent.rule, StatefulRule):
            raise ConfigurationError(
                f"expected a rule of {modality!r} without a state for {name}, got {ascent.rule!r}; use it with PGD"
            )
        if callable(ascent.step_size):
            raise ConfigurationError(
                f"expected a number as step size of {modality!r} for {name}, got {ascent.step_size!r}; {name} changes it"
            )
    return perturber.ascents
