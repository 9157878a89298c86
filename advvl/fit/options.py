"""Options of the training loop's optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advvl.checks import at_least, choice, fraction, not_negative, positive, positive_or_infinite
from advvl.errors import ConfigurationError

Schedule = Literal["one-cycle", "linear", "warmup-linear"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, its schedule over all updates, and the gradient's clipping.

    Arguments:
        warmup: fraction of the updates in which the rate rises.
        clip: largest L2 norm of the whole gradient; infinite: none.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "one-cycle"
    warmup: float = 0.1
    clip: float = 2.0
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        at_least(1, self, "epochs", "batch_size")
        positive(self, "learning_rate")
        not_negative(self, "weight_decay")
        choice(self, "schedule", Schedule)
        fraction(self, "warmup")
        positive_or_infinite(self, "clip")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(f"expected betas to be two numbers in [0, 1), got {self.betas!r}")
