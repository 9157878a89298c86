"""Forwards: a model run under the perturbations of a probe, each perturbation a leaf of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.injection import Batch, Binding, Placed
from advvl.adapters.outputs import copied
from advvl.adapters.positions import check_inside, check_rows, read_positions
from advvl.errors import ConfigurationError, ShapeError
from advvl.maximizers.probes import Feedback
from advvl.passes.finite import RowCheck
from advvl.passes.objective import Loss, checked_loss
from advvl.passes.prefix import Prefix
from advvl.perturbers.base import Perturber
from advvl.perturbers.places import Place
from advvl.perturbers.starts import Start
from advvl.runtime.randomness import forked

Correct = Callable[[Outputs, Batch], Tensor]


@dataclass(frozen=True)
class Pass:
    """One forward with its graph."""

    outputs: Outputs
    binding: Binding

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Modality to its perturbation, a leaf of the graph."""
        return {modality: placed.delta for modality, placed in self.binding.placed.items()}

    @property
    def places(self) -> dict[str, Place]:
        """Modality to the place of its perturbation."""
        return {modality: placed.place for modality, placed in self.binding.placed.items()}


class Passes:
    """The passes of one step or attack on one batch; always closed when that ends.

    Arguments:
        adapter, batch, perturber: the model to run, its input, and its perturbations.
        loss: from outputs and batch to a scalar or one loss per row; None: the model's own.
        correct: judges rows, for maximisers that stop early; None: nothing judges.
        generator: source of random starts; None: one seeded from torch's own.
        reuse: run the part before the first perturbed site only once for all passes; for a model that does not change.
        reduce: from losses per row `(B,)` to the scalar that is differentiated; None: their mean.
        inside: modalities whose tensor is known to be inside its box; those found to be are added.

    Raises:
        SiteError: a modality without a site.
        ConfigurationError: inference mode, in which nothing can be differentiated.
    """

    def __init__(
        self,
        adapter: Adapter,
        batch: Batch,
        perturber: Perturber,
        *,
        loss: Loss | None = None,
        correct: Correct | None = None,
        generator: torch.Generator | None = None,
        reuse: bool = False,
        reduce: Callable[[Tensor], Tensor] | None = None,
        inside: set[str] | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise ConfigurationError(
                "expected no torch.inference_mode() around a step or an attack, got one; use torch.no_grad() instead"
            )
        self._modalities = perturber.modalities
        adapter.check_modalities(self._modalities)
        self.adapter, self._batch, self.perturber = adapter, batch, perturber
        self._loss, self._correct, self._reduce = loss or adapter.loss, correct, reduce or _mean
        # forked before any pass, so that drawing a start does not change a replayed random state
        random = any(start.random for start in perturber.starts().values())
        self._generator = forked(generator) if random else generator
        self._stack = ExitStack()
        self._positions: dict[str, tuple[Tensor | None, ...]] = {}
        self._reuse, self._inside = reuse, set[str]() if inside is None else inside
        self._prefixes: dict[tuple[str, ...], Prefix] = {}
        self.places: dict[str, Place] = {}  # of every modality that has been perturbed
        self.effective: dict[str, Tensor] = {}  # in half precision: the share left of each last perturbation
        self.rows = RowCheck()  # those that no gradient could move
        self.autocasts_to_half = False  # whether a site fired under autocast to fp16

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def batch(self) -> Batch:
        """A shallow copy of the batch, so that a user's function may take fields out of it."""
        return copied(self._batch)

    @cached_property
    def in_half(self) -> bool:
        """True if the model has weights in fp16."""
        return any(parameter.dtype == torch.float16 for parameter in self.adapter.model.parameters())

    def forward(self, deltas: Mapping[str, Tensor | Start], *, wants: bool, reuse: bool = False) -> Pass:
        """Run the model under `deltas`, which stay bound until the next forward.

        Arguments:
            wants: gradients of the perturbations will be needed.
            reuse: take the results before the first perturbed site from an earlier such pass, without its graph.

        Raises:
            SiteError: a site did not fire, or holds something that cannot be perturbed.
            ShapeError: a mask or start that does not fit.
        """
        binding = Binding(
            self.adapter.sites,
            partial(self._begin, deltas, wants),
            self.perturber.apply,
            modalities=tuple(deltas),
            required=self._modalities,
            wants=wants,
        )
        self._stack.close()
        self._stack.enter_context(self.adapter.bound(binding))
        with self._prefix(tuple(deltas), binding) if self._reuse or reuse else nullcontext():
            outputs = self.adapter.forward(self.batch)
        binding.end_forward(partial(self.adapter.why_silent, batch=self.batch))
        for modality in binding.placed.keys() - self.places.keys():
            self.adapter.check_axes(modality, binding.placed[modality].place.x)
        self.places.update({modality: placed.place for modality, placed in binding.placed.items()})
        self.effective.update(survived(binding.placed, self.perturber))
        return Pass(outputs, binding)

    def see(self, deltas: Mapping[str, Tensor]) -> None:
        """Record what half precision leaves of perturbations that no pass is made under."""
        placed = {modality: Placed(self.places[modality], delta) for modality, delta in deltas.items()}
        self.effective.update(survived(placed, self.perturber))

    def _prefix(self, modalities: tuple[str, ...], binding: Binding) -> AbstractContextManager[None]:
        if modalities not in self._prefixes:
            self._prefixes[modalities] = Prefix(self.adapter.model)
        return self._prefixes[modalities].reused(lambda: binding.perturbed)

    def forget(self) -> None:
        """Bind no perturbation, and forget the results before the first perturbed site, because weights change."""
        self._stack.close()
        self._prefixes.clear()

    def task(self, run: Pass, loss: Loss | None = None) -> tuple[Tensor | None, Tensor]:
        """The task loss of a pass: one per row `(B,)` where the loss gives that, and the scalar.

        Raises:
            ShapeError: a loss that is neither, or a packed tensor whose site lacks rows.
        """
        found = checked_loss((loss or self._loss)(run.outputs, self.batch))
        losses = found if found.ndim else None
        self.check_rows(run, losses)
        return losses, found if losses is None else self._reduce(losses)

    def check_rows(self, run: Pass, losses: Tensor | None) -> None:
        check_rows(run.places, losses, partial(self._logits_of_rows, run.outputs))

    def _logits_of_rows(self, outputs: Outputs) -> Tensor | None:
        """The logits, if they have one row per sample as far as is known; with `positions` they have one per entry."""
        try:
            entries = self.adapter.positions(self.batch) is not None
        except ConfigurationError:  # of a model whose positions are unknown
            entries = False
        return None if entries else self.logits_if_any(outputs)

    def comparable(self, outputs: Outputs) -> Tensor:
        """The logits, or the loss of a model that gives nothing else; they show whether a pass was repeated."""
        logits = self.logits_if_any(outputs)
        return (self._loss(outputs, self.batch) if logits is None else logits).detach().float()

    def logits_if_any(self, outputs: Outputs) -> Tensor | None:
        """The logits; None if the model gives none."""
        try:
            return self.adapter.logits(outputs)
        except ConfigurationError:
            return None

    def feedback(
        self,
        run: Pass,
        losses: Tensor | None,
        gradients: Mapping[str, Tensor],
        *,
        modalities: tuple[str, ...] | None = None,
    ) -> Feedback:
        """The feedback for the maximiser, on some modalities or all; nothing in it holds a graph."""
        placed = {m: one for m, one in run.binding.placed.items() if modalities is None or m in modalities}
        losses = None if losses is None else losses.detach()
        correct = None if self._correct is None else _verdicts(self._correct(run.outputs, self.batch), losses)
        places = {modality: one.place for modality, one in placed.items()}
        gradients = {modality: gradient.detach() for modality, gradient in gradients.items()}
        self.rows.see(gradients, places)
        return Feedback(
            deltas={modality: one.delta.detach() for modality, one in placed.items()},
            gradients=gradients,
            places=places,
            losses=losses,
            correct=correct,
        )

    def _begin(self, deltas: Mapping[str, Tensor | Start], wants: bool, modality: str, x: Tensor) -> Placed:
        """Make the perturbation of a modality at its site, a leaf of the graph."""
        self.autocasts_to_half = self.autocasts_to_half or _autocasts_to_half(x.device.type)
        first = modality not in self._positions
        if first:
            # not a copy of it: torch.compile may trace what runs here, and no copy of a mapping
            self._positions[modality] = read_positions(modality, self.adapter.sites[modality], self._batch, x)
        place, delta = Place(x.detach(), *self._positions[modality]), deltas[modality]
        if first and modality not in self._inside and (box := self.perturber.box(modality, place.x)) is not None:
            check_inside(modality, place, box)
            self._inside.add(modality)
        if isinstance(delta, Start):
            with torch.no_grad():
                delta = self.perturber.begin(modality, delta, place, self._generator)
        return Placed(place, delta if delta.requires_grad else delta.detach().requires_grad_(wants))


def _autocasts_to_half(device_type: str) -> bool:
    known = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return known and torch.get_autocast_dtype(device_type) == torch.float16


def survived(placed: Mapping[str, Placed], perturber: Perturber) -> dict[str, Tensor]:
    """The share of each perturbation left after the cast to a half-precision site: ‖cast(x+δ)−x‖/‖δ‖, `(B,)`."""
    found: dict[str, Tensor] = {}
    for modality, (place, leaf) in placed.items() if perturber.additive else ():
        if place.x.dtype != leaf.dtype:
            delta = leaf.detach()
            added = perturber.apply(modality, place, place.x, delta).to(delta.dtype) - place.x.to(delta.dtype)
            whole = place.masked(delta.expand_as(added))  # samples that share one have their own positions
            size, kept = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (whole, added))
            found[modality] = torch.where(size > 0, kept / torch.where(size > 0, size, 1.0), 1.0)
    return found


def _verdicts(correct: object, losses: Tensor | None) -> Tensor:
    """The verdicts that `correct` gave, if there is one per row."""
    fits = isinstance(correct, Tensor) and correct.dtype == torch.bool and correct.ndim == 1
    if not isinstance(correct, Tensor) or not fits or (losses is not None and len(correct) != len(losses)):
        rows = "per row" if losses is None else f"for each of {len(losses)} rows"
        got = f"{tuple(correct.shape)} of {correct.dtype}" if isinstance(correct, Tensor) else type(correct).__name__
        raise ShapeError(
            f"expected correct to give one verdict {rows}, a bool tensor (B,), got {got}; "
            "as in outputs.logits.argmax(1) == labels"
        )
    return correct


def _mean(losses: Tensor) -> Tensor:
    return losses.mean() if losses.numel() else losses.sum()  # of no rows: 0, with a graph
