"""Verification: a perturbation is measured from its tensors and tried in a fresh forward, whatever its attack says of it.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.errors import ConfigurationError
from advvl.evaluation.scoring import Batch, Score, checked_scores, fresh
from advvl.passes.forward import Passes
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.places import Place
from advvl.runtime.randomness import derive_seed
from advvl.runtime.states import renormalised


@dataclass(frozen=True)
class Verified:
    """A perturbation as it is.

    Arguments:
        scores: `(B,)` fp64, the mean over fresh forwards.
        lengths: modality to `(B,)` fp64, in the norm and the unit of its ball; of several rows of an example the longest.
    """

    scores: Tensor
    lengths: Mapping[str, Tensor]

    def or_lower(self, other: Verified) -> Verified:
        """This one, or for the examples whose score is lower there the other."""
        lower = other.scores < self.scores
        return Verified(
            torch.where(lower, other.scores, self.scores),
            {m: torch.where(lower, other.lengths[m], lengths) for m, lengths in self.lengths.items()},
        )


def verify(
    adapter: Adapter,
    batch: Batch,
    ascents: Mapping[str, Ascent],
    deltas: Mapping[str, Tensor],
    score: Score,
    *,
    name: str,
    seed: int,
    draws: int = 1,
) -> Verified:
    """Score the model under perturbations in fresh forwards, and measure them.

    Arguments:
        ascents: modality to what its perturbation has to stay in.
        deltas: as the attack gave them back.
        name: of the attack, for the message.
        seed: of what the model may draw.
        draws: forwards, each with other randomness.

    Raises:
        ConfigurationError: a perturbation outside its ball or its box, at a masked position, or not finite.
    """
    if set(deltas) != set(ascents):
        raise ConfigurationError(
            f"expected perturbations of {sorted(ascents)} from the attack {name!r}, got those of {sorted(deltas)}"
        )
    for modality, delta in deltas.items():
        if not delta.isfinite().all():
            raise _left(name, modality, "finite", "some that is not")
    found = []
    for draw in range(draws):
        with (
            fresh(adapter.model, derive_seed(seed, draw)),
            Passes(adapter, batch, EmbeddingPerturber(**ascents)) as passes,
        ):
            run = passes.forward(deltas, wants=False)
            found.append(checked_scores(score(run.outputs, batch)))
            places = run.places
    scores = torch.stack(found).mean(dim=0)
    lengths = {m: _length(m, ascent, deltas[m], places[m], len(scores), name) for m, ascent in ascents.items()}
    return Verified(scores, lengths)


def _length(modality: str, ascent: Ascent, delta: Tensor, place: Place, examples: int, name: str) -> Tensor:
    """The length `(examples,)` of a perturbation, which is checked against its ball, box and mask."""
    wide = delta.dtype == torch.float64
    slack = 1e-10 if wide else 1e-5  # beyond rounding, and too little to matter
    if place.mask is not None and not torch.equal(place.masked(delta), delta):
        raise _left(name, modality, "zero at masked positions", "some that is not")
    lengths = length(ascent, delta, place, examples)
    radius = getattr(ascent.ball, "radius", torch.inf)
    outside = ~(lengths <= radius * (1 + slack))  # NaN is outside too
    if outside.any():
        raise _left(name, modality, f"in {ascent.ball}", f"{lengths.max():.6g} in {int(outside.sum())} rows")
    if (bounds := ascent.bounds(place.x)) is not None:
        low, high = bounds
        x = place.x.to(delta.dtype)
        at, margin = x + delta, slack * (high - low)
        # a clean entry is as far outside as its dtype rounds it, and may be left there
        beyond = torch.maximum((low - at).minimum(x - at), (at - high).minimum(at - x))
        if (place.masked(beyond - margin) > 0).any():
            raise _left(name, modality, f"in the box {ascent.box}", f"{at.min():.6g} to {at.max():.6g}")
    return lengths


def _left(name: str, modality: str, where: str, got: str) -> ConfigurationError:
    return ConfigurationError(
        f"expected the perturbation of {modality!r} by the attack {name!r} to be {where}, got {got}; correct the attack"
    )


def length(ascent: Ascent, delta: Tensor, place: Place, examples: int) -> Tensor:
    """The length `(examples,)`, fp64, of each example's perturbation in the norm and the unit of the ascent's ball."""
    if ascent.pixels is not None:
        delta, place = ascent.pixels.lengths(delta), replace(place, x=ascent.pixels.pixels(place.x))
    unit = ascent.ball.unit(place)
    if isinstance(unit, Tensor):  # constant over what one norm is taken of
        far = torch.where(delta == 0, 0.0, _FAR).to(delta.dtype)
        delta = torch.where(unit > 0, delta / torch.where(unit > 0, unit, 1), far)
    norms = ascent.ball.norms(delta, place)
    if ascent.ball.per == "sample" and place.segments is not None:  # by the number of the sample already
        return torch.cat([norms, norms.new_zeros(max(examples - len(norms), 0))])[:examples].double()
    rows = (place.packed(norms) if ascent.ball.per == "token" else norms).flatten(1) if norms.ndim > 1 else norms
    rows = rows.amax(dim=1) if rows.ndim > 1 else rows
    if place.owners is not None:
        rows = rows.new_zeros(examples).scatter_reduce_(0, place.owners, rows, "amax")
    return rows.double()


_FAR: Final = 1e30  # a length of anything in a unit of 0


class Untouched:
    """A model as it was found, to see afterwards whether an attack changed it.

    Gradients and parameters count by their identity, their number of writes and their content, buffers by their content,
    and so do the weights that a forward itself writes to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = _state(model)

    def check(self, name: str | None) -> None:
        """Raise ConfigurationError if the model is not as it was, with what was changed, and the attack's name if any."""
        now = _state(self._model)
        changed = [what for what in {**self._before, **now} if not _same(self._before.get(what), now.get(what))]
        if changed:
            attack = "the attack" if name is None else f"the attack {name!r}"
            raise ConfigurationError(
                f"expected {attack} to leave the model as found, got a changed {changed[0]}; "
                "have it differentiate by the perturbation alone"
            )


def _state(model: nn.Module) -> dict[str, Sequence[object]]:
    found: dict[str, Sequence[object]] = {}
    written = {id(module.weight) for module in renormalised(model)}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        writes = () if id(parameter) in written else _writes(parameter)
        found[f"parameter {name!r}"] = (parameter.requires_grad, *writes, *_content(parameter))
        found[f".grad of {name!r}"] = () if gradient is None else (*_writes(gradient), *_content(gradient))
    for name, buffer in model.named_buffers():
        found[f"buffer {name!r}"] = _content(buffer)
    return found


def _writes(tensor: Tensor) -> tuple[int, ...]:
    """Its identity and its number of writes, which tell of an exchange of entries that leaves their sums."""
    if tensor.is_meta or tensor.is_inference():  # a stand-in for one that lies elsewhere; one that counts no writes
        return ()
    return id(tensor), tensor._version


def _content(tensor: Tensor) -> tuple[Tensor, ...]:
    """Sums over the bits of a tensor, which any change of one entry changes, left on its device."""
    value = tensor.detach()
    value = value.to_local() if hasattr(value, "to_local") else value
    if value.is_meta or value.is_complex() or not value.numel():
        return ()
    flat = value.contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # whole numbers of 8 bytes begin at multiples of 8
    octets = flat.view(torch.uint8)
    whole = len(octets) // 8 * 8
    return octets[:whole].view(torch.int64).sum(), octets[whole:].sum()


def _same(one: Sequence[object] | None, other: Sequence[object] | None) -> bool:
    if one is None or other is None or len(one) != len(other):
        return False
    return all(
        torch.equal(a, b) or bool(a.isnan() & b.isnan()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )
