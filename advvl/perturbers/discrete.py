"""Perturbations seen through a discretiser, such as the codes of a VQGAN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advvl.checks import check_functions, is_choice
from advvl.errors import ConfigurationError, ShapeError
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.base import Memory, Moved, Perturber
from advvl.perturbers.places import Place, delta_dtype
from advvl.perturbers.starts import Normal, Start, Zero

Perturbed = Literal["after", "before"]


class DiscretePerturber(Perturber):
    """Perturbations δ of tensors that the model sees through a discretiser Q, whose gradient is passed straight through.

    The gradient of δ is that of the discretised tensor, as if ∂Q/∂x were the identity, so Q is never differentiated. At
    masked positions the tensor stays as it is. For training: a clean pass sees x itself, not Q(x).

    Arguments:
        discretise: Q, a deterministic function from the tensor at the site `(B, …)` to a tensor of the same shape and
            units. It runs without a graph, in fp32 or fp64 and outside autocast. A module must be in eval mode and on
            the device of the batch.
        perturbed: `"after"`: δ moves around Q(x); passes that move it see Q(x) + δ, other passes see Q(Q(x) + δ), as in
            DAT's code. `"before"`: δ moves around x, and all passes see Q(x + δ), as in its paper.
        ascents: as of `EmbeddingPerturber`; a box bounds the tensor to which δ is added, and Q keeps inside it.

    Source: Mao et al., "Enhance the Visual Representation via Discrete Adversarial Training", NeurIPS 2022.

    Raises:
        ConfigurationError: no function, a module in training mode, an unknown `perturbed`, no modality, no `Ascent`; in a
            pass, a module on another device, a discretised tensor outside the box.
        ShapeError: in a pass, a discretised tensor of another shape or of whole numbers.
    """

    def __init__(
        self, discretise: Callable[[Tensor], Tensor], *, perturbed: Perturbed = "after", **ascents: Ascent
    ) -> None:
        check_functions(discretise=discretise)
        if isinstance(discretise, nn.Module) and any(module.training for module in discretise.modules()):
            raise ConfigurationError(
                f"expected the discretiser {type(discretise).__name__} in eval mode, got training mode; call eval()"
            )
        if not is_choice(perturbed, get_args(Perturbed)):
            raise ConfigurationError(f"expected perturbed to be 'after' or 'before', got {perturbed!r}")
        self.discretise, self.perturbed = discretise, perturbed
        self._given = EmbeddingPerturber(**ascents)
        self._last = _Last()  # Q(x) is asked for in each pass, and a VQGAN costs more than the model

    def __repr__(self) -> str:
        return f"DiscretePerturber({type(self.discretise).__name__}, perturbed={self.perturbed!r}, {self._given!r})"

    @property
    def modalities(self) -> tuple[str, ...]:
        return self._given.modalities

    def starts(self) -> dict[str, Start]:
        # at zero the model sees Q(x) and not x, so the clean pass cannot serve as the pass at zero
        return {m: Normal(0.0) if isinstance(at, Zero) else at for m, at in self._given.starts().items()}

    def box(self, modality: str, x: Tensor) -> tuple[float | Tensor, float | Tensor] | None:
        return self._given.box(modality, x)

    def unit(self, modality: str, place: Place) -> Tensor | float:
        return self._given.unit(modality, self._around(modality, place))

    @property
    def additive(self) -> bool:
        return False

    def for_attack(self) -> DiscretePerturber:
        return self._with(self._given.for_attack())

    def for_part(self, weight: float) -> DiscretePerturber:
        return self._with(self._given.for_part(weight))

    def begin(self, modality: str, start: Start, place: Place, generator: torch.Generator | None) -> Tensor:
        self._last.forget()  # memory that a loader fills again by numpy looks the same to torch
        return self._given.begin(modality, start, self._around(modality, place), generator)

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        around = {modality: self._around(modality, places[modality]) for modality in gradients}
        return self._given.move(deltas, gradients, around, memory)

    def norms(self, deltas: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        return self._given.norms(deltas, places)

    def apply(self, modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
        """The tensor that the model sees; a pass moves δ where `delta` requires a gradient."""
        if delta.shape != x.shape:
            raise ShapeError(
                f"expected a perturbation of {modality!r} of shape {tuple(x.shape)}, got {tuple(delta.shape)}; "
                "make it for this very batch"
            )
        moved = self._around(modality, place).x + delta.detach()
        if self.perturbed == "before" or not delta.requires_grad:
            moved = self._discretised(modality, place, moved)
        real, through = place.real(x.ndim), x + delta
        moved = (through + (moved - through).detach()).to(x.dtype)
        return moved if real is None else torch.where(real, moved, x)

    def _around(self, modality: str, place: Place) -> Place:
        """The place around whose tensor δ moves: x itself, or Q(x)."""
        if self.perturbed == "before":
            return place
        found = self._last.found(place.x)
        if found is None:
            found = self._discretised(modality, place, place.x)
            self._last.keep(place.x, found)
        return replace(place, x=found)

    def _discretised(self, modality: str, place: Place, x: Tensor) -> Tensor:
        self._check_device(modality, x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # rounding chooses other codes
            found = self.discretise(x.detach().to(delta_dtype(x)))
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.is_floating_point():
            got: object = type(found).__name__
            if isinstance(found, Tensor):
                got = found.dtype if found.shape == x.shape else tuple(found.shape)
            raise ShapeError(
                f"expected discretise to give a tensor of {modality!r} of shape {tuple(x.shape)}, got {got}; "
                "give it inputs of a size that it keeps"
            )
        if (box := self.box(modality, place.x)) is not None:
            _check_inside(modality, place, found, box)
        return found

    def _check_device(self, modality: str, x: Tensor) -> None:
        if isinstance(self.discretise, nn.Module):
            held = next((parameter.device for parameter in self.discretise.parameters()), x.device)
            if held != x.device:
                raise ConfigurationError(
                    f"expected the discretiser {type(self.discretise).__name__} on {x.device}, as {modality!r} is, got "
                    f"{held}; move it there by to(device)"
                )

    def _with(self, given: EmbeddingPerturber) -> DiscretePerturber:
        return DiscretePerturber(self.discretise, perturbed=self.perturbed, **given.ascents)


class _Last:
    """The last tensor that was discretised, with its codes; copies and pickles of it are empty.

    It has no attributes that the description of a method would include, because they change as it runs.
    """

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: tuple[Tensor, int, Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()

    def found(self, x: Tensor) -> Tensor | None:
        """The codes of `x`, if it was the last one and was not written to since."""
        if self._seen is None or x.is_inference() or not _is_same(x, self._seen[0]) or x._version != self._seen[1]:
            return None
        return self._seen[2]

    def forget(self) -> None:
        self._seen = None

    def keep(self, x: Tensor, found: Tensor) -> None:
        if not x.is_inference():  # nothing counts how often these are written to
            self._seen = (x, x._version, found)  # x is held: its memory is not given to another tensor


def _check_inside(modality: str, place: Place, found: Tensor, box: tuple[float | Tensor, float | Tensor]) -> None:
    """Raise ConfigurationError if codes at real positions leave the box by more than rounding; reads from the device."""
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device=found.device) for bound in box)
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in (place.x.dtype, found.dtype))
    beyond = place.masked((found < low - rounding * low.abs()) | (found > high + rounding * high.abs()))
    if beyond.any():
        share = beyond.sum().item() / place.masked(torch.ones_like(beyond)).sum().item()
        raise ConfigurationError(
            f"expected discretise to keep {modality!r} in its box [{low.amin():.4g}, {high.amax():.4g}], got "
            f"{100 * share:.4g} % of its entries outside; clamp them in it"
        )


def _is_same(x: Tensor, other: Tensor) -> bool:
    """True of two tensors over the same memory."""
    views = [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in (x, other)]
    return views[0] == views[1]
