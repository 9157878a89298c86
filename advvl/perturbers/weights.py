"""Perturbed weights: the length and the direction of their move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from advvl.checks import is_choice, is_number
from advvl.errors import ConfigurationError

Together = Literal["all", "tensor"]


class WeightSteps(NamedTuple):
    """The step of each weight by its name, and whether every gradient was finite, a scalar bool on the device."""

    steps: dict[str, Tensor]
    finite: Tensor


@dataclass(frozen=True)
class WeightAscent:
    """Moves the weights once along the gradient of the taught objective, which is then taught at the moved weights.

    Arguments:
        radius: length of the move, in the units of the weights.
        per: one move over `"all"` weights together (SAM), or one for each `"tensor"` (AWP).
        relative: measure the radius in units of the L2 norm of the weights that move together.
        chosen: function of a parameter's name and the parameter that says whether to move it; None: all that require
            grad.

    Source: Foret et al., "Sharpness-Aware Minimization", ICLR 2021; Wu et al., "Adversarial Weight Perturbation Helps Robust
    Generalization", NeurIPS 2020.

    Raises:
        ConfigurationError: a radius that is not above 0 and finite, an unknown `per`, a `chosen` that is no function.
    """

    radius: float
    _: KW_ONLY
    per: Together = "all"
    relative: bool = False
    chosen: Callable[[str, nn.Parameter], bool] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.radius) or not 0 < self.radius < math.inf:
            raise ConfigurationError(f"expected a finite radius above 0, got {self.radius!r}")
        if not is_choice(self.per, get_args(Together)):
            raise ConfigurationError(f"expected per to be one of {get_args(Together)}, got {self.per!r}")
        if self.chosen is not None and not callable(self.chosen):
            raise ConfigurationError(f"expected chosen as a function of name and parameter, got {self.chosen!r}")

    def steps(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> WeightSteps:
        """The move of each weight; 0 where the gradient is 0, and where that of its move is not finite.

        Arguments:
            weights, gradients: by name, of the same shapes.
        """
        if not gradients:
            raise ConfigurationError("expected a weight to move, got none that is chosen and that the loss depends on")
        if sparse := [name for name, gradient in gradients.items() if gradient.is_sparse]:
            raise ConfigurationError(
                f"expected dense gradients of the weights to move, got sparse ones of {sparse}; let chosen leave these out"
            )
        groups = [list(gradients)] if self.per == "all" else [[name] for name in gradients]
        found, finite = dict[str, Tensor](), list[Tensor]()
        for names in groups:
            device = gradients[names[0]].device  # of a model over several, that of the first
            largest = torch.stack([_largest(gradients[name]).to(device) for name in names]).amax()
            usable = largest.isfinite() & (largest > 0)
            scale = torch.where(usable, largest, 1.0)  # so that no square over- or underflows
            units = {
                name: gradients[name].to(_wide(gradients[name])) / scale.to(gradients[name].device) for name in names
            }
            factor = torch.where(usable, self.radius / _norm(list(units.values())), 0.0)
            if self.relative:
                factor = factor * _norm([weights[name] for name in names])
            found |= {name: _where(usable, unit * factor.to(unit.device)) for name, unit in units.items()}
            finite.append(largest.isfinite())
        return WeightSteps(found, torch.stack([flag.to(finite[0].device) for flag in finite]).all())


def _where(usable: Tensor, step: Tensor) -> Tensor:
    return torch.where(usable.to(step.device), step, 0.0)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _largest(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, torch.inf, dtype=_wide(values)) if values.numel() else values.new_zeros(())


def _norm(values: list[Tensor]) -> Tensor:
    sizes = [torch.linalg.vector_norm(x, dtype=_wide(x)).to(values[0].device) for x in values]
    size: Tensor = torch.linalg.vector_norm(torch.stack(sizes))
    return size
