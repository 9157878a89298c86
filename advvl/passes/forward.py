"""Passes: the only code that runs a model and differentiates.

`Passes` runs a model on one batch under the perturbations that a probe asks for, with each perturbation a leaf of the
graph; `input_gradients` and `accumulate` are its two ways to differentiate. Which passes share a clean branch, and what is
left together in one backward, is `rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.diagnosis import NON_REENTRANT, is_reentrant, why_independent
from advvl.adapters.injection import Batch, Binding, Maker
from advvl.adapters.positions import check_rows, matters, read_positions
from advvl.errors import ConfigurationError, ShapeError, SiteError
from advvl.maximizers.probes import Feedback
from advvl.passes.prefix import Prefix
from advvl.perturbers.balls import Place
from advvl.perturbers.base import Perturber
from advvl.perturbers.starts import Start
from advvl.runtime.randomness import forked

Loss = Callable[[Outputs, Batch], Tensor]
Correct = Callable[[Outputs, Batch], Tensor]
Backward = Callable[[Tensor], object]


@dataclass
class Pass:
    """One forward with its graph; with `apart`, of the batch repeated for each of its modalities."""

    batch: Batch
    outputs: Outputs
    losses: Tensor | None  # one a row, where the loss gives that
    task: Tensor  # a scalar
    leaves: dict[str, Tensor]
    places: dict[str, Place]
    binding: Binding
    effective: dict[str, Tensor]


class Passes:
    """The passes of one step on one batch; closed when the step ends, whatever happens.

    Arguments:
        adapter, batch, perturber: what is run, on what, under what.
        loss: from outputs and batch to a scalar or one loss a row.
        correct: judges rows, for maximisers that stop early; None: nothing judges.
        generator: random starts are drawn from it; None: from one seeded from torch's own.
        reuse: compute what runs before the first perturbed site once; for a model that nobody changes meanwhile.
        reduce: from losses a row `(B,)` to the scalar that is differentiated; None: their mean.

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
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise ConfigurationError(
                "expected no torch.inference_mode() around a step or an attack, got one, under which nothing can be "
                "differentiated; use torch.no_grad(), which is lifted where gradients are needed"
            )
        adapter.check_modalities(perturber.modalities)
        self.adapter, self.batch, self.perturber = adapter, batch, perturber
        self._loss, self._correct, self.reduce = loss or adapter.loss, correct, reduce or _mean
        # forked before any pass, so that drawing a start leaves a replayed random state alone
        random = any(start.random for start in perturber.starts().values())
        self._generator = forked(generator) if random else generator
        self._stack = ExitStack()
        self._places: dict[str, tuple[Tensor | None, ...]] = {}
        self._reuse = reuse
        self._prefixes: dict[tuple[str, ...], Prefix] = {}

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def forward(self, deltas: Mapping[str, Tensor | Start], *, wants: bool, apart: bool = False) -> Pass:
        """Run the model under `deltas`, which stay bound until the next forward.

        With `apart` it is run on its rows once for each modality, and each is perturbed in its own copy of them.

        Raises:
            SiteError: a site did not fire, or holds something that cannot be perturbed.
            ShapeError: a mask, start or loss that does not fit.
        """
        leaves: dict[str, Tensor] = {}
        places: dict[str, Place] = {}
        effective: dict[str, Tensor] = {}

        def maker(modality: str, value: Tensor | Start) -> Maker:
            def make(x: Tensor) -> Tensor:
                place = places[modality] = self._place(modality, x)
                with torch.no_grad():
                    delta = self._begin(modality, value, place)
                    if x.dtype != delta.dtype:
                        effective[modality] = _effective(x, delta)
                leaves[modality] = delta.detach().requires_grad_(wants)
                return leaves[modality]

            return make

        makers = {modality: maker(modality, value) for modality, value in deltas.items()}
        batch = self.adapter.repeat(self.batch, len(deltas)) if apart and self.adapter.repeat else self.batch
        binding = Binding(self.adapter.sites, makers, required=self.perturber.modalities, apart=apart, wants=wants)
        self._stack.close()
        self._stack.enter_context(self.adapter.bound(binding))
        with self._prefix(tuple(deltas), binding) if self._reuse and not apart else nullcontext():
            outputs = self.adapter.forward(batch)
        binding.end_forward(partial(self.adapter.why_silent, batch=batch))
        loss = self._loss(outputs, batch)
        if not isinstance(loss, Tensor) or loss.ndim > 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ShapeError(
                f"expected a loss as a scalar tensor or one a row (B,), got {got}; reduce the other axes, without item"
            )
        losses = loss if loss.ndim == 1 else None
        if not apart:
            check_rows(places, losses, partial(self.logits_if_any, outputs))
        task = loss if losses is None else self.reduce(losses)
        return Pass(batch, outputs, losses, task, leaves, places, binding, effective)

    def _prefix(self, modalities: tuple[str, ...], binding: Binding) -> AbstractContextManager[None]:
        if modalities not in self._prefixes:
            self._prefixes[modalities] = Prefix(self.adapter.model)
        return self._prefixes[modalities].reused(lambda: binding.perturbed)

    def comparable(self, outputs: Outputs) -> Tensor:
        """The logits, or the loss of a model that gives nothing else: what tells whether a pass was repeated."""
        logits = self.logits_if_any(outputs)
        return (self._loss(outputs, self.batch) if logits is None else logits).detach().float()

    def logits(self, run: Pass) -> Tensor:
        return self.adapter.logits(run.outputs)

    def logits_if_any(self, outputs: Outputs) -> Tensor | None:
        """The logits; None of a model that gives none."""
        try:
            return self.adapter.logits(outputs)
        except ConfigurationError:
            return None

    def input_gradients(self, objective: Tensor, run: Pass, *, retain_graph: bool = False) -> dict[str, Tensor]:
        """The gradients of an objective with respect to the perturbations of its pass alone; parameters get none.

        Raises:
            SiteError: the objective does not depend on one of them; activation checkpointing with `use_reentrant=True`,
                which gives no gradients but those of everything.
            ConfigurationError: it depends on nothing.
        """
        self._check_differentiable(objective, run)
        try:
            found = torch.autograd.grad(
                objective, list(run.leaves.values()), retain_graph=retain_graph, allow_unused=True
            )
        except RuntimeError as error:
            if is_reentrant(objective):
                raise SiteError(
                    "expected activation checkpointing that gives gradients of perturbations alone, got a region with "
                    f"use_reentrant=True between a site and the loss; {NON_REENTRANT}"
                ) from error
            raise
        return self.all_found(dict(zip(run.leaves, found, strict=True)), run)

    def accumulate(self, total: Tensor, backward: Backward | None, run: Pass) -> Tensor | None:
        """Accumulate the gradients of `total` into every leaf's `.grad`, by the caller's backward if there is one.

        Returns:
            The factor by which that scaled them, read off a zero leaf added to `total`; None for 1.

        Raises:
            SiteError: the caller's backward differentiates nothing.
            ConfigurationError: nothing is to be differentiated.
        """
        self._check_differentiable(total, run)
        if backward is None:
            total.backward()  # type: ignore[no-untyped-call]
            return None
        unit = torch.zeros_like(total, requires_grad=True)
        backward(total + unit)
        if unit.grad is None:
            raise SiteError(
                "expected backward to differentiate the loss it was given, but it did not; have it call backward() on that "
                "very tensor or a multiple of it, as accelerator.backward does"
            )
        return unit.grad

    def _check_differentiable(self, objective: Tensor, run: Pass) -> None:
        if objective.requires_grad:
            return
        expected = "expected a loss that requires grad, got one that"
        for modality, leaf in run.leaves.items():
            if leaf.requires_grad:
                why = self._why_independent(run, modality)
                raise ConfigurationError(f"{expected} does not depend on the perturbation of {modality!r}: {why}")
        raise ConfigurationError(
            f"{expected} does not; let some parameter of the model require grad, and compute the loss from the model's "
            "outputs without detach, item or no_grad"
        )

    def all_found(self, gradients: Mapping[str, Tensor | None], run: Pass) -> dict[str, Tensor]:
        """The gradients of a pass, every one of which has to be there, and at real positions.

        Raises:
            SiteError: one is not.
        """
        complete = {}
        for modality, gradient in gradients.items():
            if gradient is None:
                raise SiteError(
                    f"expected the loss to depend on the perturbation of {modality!r}, but it does not: "
                    f"{self._why_independent(run, modality)}"
                )
            complete[modality] = gradient
            verified = self.adapter.masks_verified
            if modality not in verified and matters(modality, run.places[modality], gradient):
                verified.add(modality)
        return complete

    def feedback(
        self, run: Pass, gradients: Mapping[str, Tensor], modalities: tuple[str, ...], *, of: int = 1
    ) -> Feedback:
        """What a maximiser is told of a pass, the last `of` so many in its batch; nothing in it holds a graph."""
        losses = None if run.losses is None else run.losses.detach()
        correct = None if self._correct is None else _verdicts(self._correct(run.outputs, run.batch), losses)
        if of > 1:
            losses, correct = (None if rows is None else rows.tensor_split(of)[-1] for rows in (losses, correct))
        return Feedback(
            deltas={modality: run.leaves[modality].detach() for modality in modalities},
            gradients={modality: gradients[modality].detach() for modality in modalities if modality in gradients},
            places={modality: run.places[modality] for modality in modalities},
            losses=losses,
            correct=correct,
        )

    def _why_independent(self, run: Pass, modality: str) -> str:
        """Why the loss does not depend on a modality's perturbation, which it does not."""
        leaf = run.leaves[modality].detach().requires_grad_()

        def again() -> Tensor:
            with self.adapter.inject({modality: leaf}):
                outputs = self.adapter.forward(self.batch)
            return self._loss(outputs, self.batch)

        return why_independent(self.adapter.model, leaf, again)

    def _begin(self, modality: str, value: Tensor | Start, place: Place) -> Tensor:
        if isinstance(value, Start):
            return self.perturber.begin(modality, value, place, self._generator)
        if value.shape != place.x.shape:
            raise ShapeError(
                f"expected a perturbation of {modality!r} of shape {tuple(place.x.shape)}, got {tuple(value.shape)}; "
                "the site's shape changed between passes on one batch"
            )
        return value

    def _place(self, modality: str, x: Tensor) -> Place:
        if modality not in self._places:
            self._places[modality] = read_positions(modality, self.adapter.sites[modality], self.batch, x)
        return Place(x.detach(), *self._places[modality])


def _verdicts(correct: object, losses: Tensor | None) -> Tensor:
    """What `correct` gave, if that is one verdict a row."""
    fits = isinstance(correct, Tensor) and correct.dtype == torch.bool and correct.ndim == 1
    if not isinstance(correct, Tensor) or not fits or (losses is not None and len(correct) != len(losses)):
        rows = "a row" if losses is None else f"for each of {len(losses)} rows"
        got = f"{tuple(correct.shape)} of {correct.dtype}" if isinstance(correct, Tensor) else type(correct).__name__
        raise ShapeError(
            f"expected correct to give one verdict {rows}, a bool tensor (B,), got {got}; "
            'as in correct=lambda outputs, batch: outputs.logits.argmax(1) == batch["labels"]'
        )
    return correct


def _mean(losses: Tensor) -> Tensor:
    return losses.mean() if losses.numel() else losses.sum()  # of no rows: 0, with a graph


def _effective(x: Tensor, delta: Tensor) -> Tensor:
    """What is left of a perturbation after the sum is cast to the model's precision: ‖cast(x+δ)−x‖/‖δ‖, `(B,)`."""
    added = (x.to(delta.dtype) + delta).to(x.dtype).to(delta.dtype) - x.to(delta.dtype)
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    kept = torch.linalg.vector_norm(added.flatten(1), dim=1)
    return torch.where(size > 0, kept / torch.where(size > 0, size, torch.ones_like(size)), torch.ones_like(size))
