"""Adversarial training: one step on one batch, leaving parameter gradients for the user's optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.injection import Batch
from advvl.adapters.registry import adapted
from advvl.checks import check_functions, is_choice, is_number, shown
from advvl.errors import ConfigurationError
from advvl.maximizers.base import AscentState, InnerMaximizer, check_parts
from advvl.passes import readouts
from advvl.passes.backward import Backward
from advvl.passes.drive import drive
from advvl.passes.forward import Correct, Passes
from advvl.passes.objective import Loss, Objective
from advvl.passes.replay import Replay
from advvl.passes.rounds import Rounds
from advvl.passes.traces import Trace
from advvl.passes.weights import check_whole
from advvl.perturbers.base import Perturber
from advvl.perturbers.starts import Zero
from advvl.perturbers.weights import WeightAscent
from advvl.regularizers.base import Regularizer, check_regularizer
from advvl.runtime.names import unwrapped
from advvl.runtime.reductions import Sync, accumulating, check_wrappers, no_sync, one_backward
from advvl.runtime.states import check_trainable, only_user


@dataclass(frozen=True)
class StepReport:
    """The report of one step; its tensors stay on their device, so only reading them synchronises.

    Arguments:
        loss: the whole objective whose gradient the parameters got, a scalar; for several updates in the step (FreeAT,
            Held), their sum.
        task_loss, regularization: its two parts; None where the objective has none.
        passes: the number of forwards.
        rows: modality to the number of rows of its perturbation, samples or packed ones.
        nonfinite: modality to the number of rows, samples or packed ones, whose gradient was not finite in some pass
            (they did not move).
        effective: modality to ‖cast(x+δ)−x‖/‖δ‖ of its last pass, `(B,)`, where the model is in half precision; above 1
            where rounding increased the perturbation.
    """

    loss: Tensor
    task_loss: Tensor | None
    regularization: Tensor | None
    passes: int
    rows: Mapping[str, int]
    nonfinite: Mapping[str, Tensor]
    effective: Mapping[str, Tensor]
    _norms: Callable[[], Mapping[str, Tensor]] = field(repr=False)

    @cached_property
    def delta_norms(self) -> Mapping[str, Tensor]:
        """Modality to the norms of its final perturbation, in its ball's norm and granularity; computed when read.

        For packed rows, entry i is that of sample i, and entries past the last sample are zero.
        """
        return self._norms()


@dataclass(frozen=True)
class AdversarialTraining:
    """Adversarial training from three parts: a perturber, an inner maximiser and regularisers.

    Arguments:
        perturber: starts and moves the perturbations of each modality.
        maximizer: decides which passes to run.
        regularizer: compares perturbed with clean predictions, or other tensors with other references; several as a
            tuple; None: no clean pass.
        climb: the objective of passes that only move perturbations; None: that of `teach`.
        teach: the objective that parameters learn; by default task loss and penalties.
        clean_weight: weight of an additional task loss on the clean pass (the paper's L_std; 0 as released).
        dropout: `"fresh"` masks in every pass, as in VILLA's release, or `"shared"`: every pass replays the randomness
            of the first, as in FreeLB's paper, which saves the clean pass if starts are zero.
        track_stats: BatchNorm's running statistics see `"all"` passes, as published, or only the `"clean"` one. With
            `"all"` they also see the recomputations of activation checkpointing, as in plain training.
        nonfinite: `"raise"` NonFiniteError before any update if a loss or a perturbation's gradient was not finite (one
            read from the device per update), or `"keep"`: those rows keep their last perturbation and are counted.
        weights: move the weights before the pass that parameters learn from (AWP, SAM), and restore them; None: they
            stay.

    Raises:
        ConfigurationError: an option out of its range, or parts that make no sense together.
    """

    perturber: Perturber
    maximizer: InnerMaximizer
    regularizer: Regularizer | tuple[Regularizer, ...] | None = None
    clean_weight: float = 0.0
    dropout: Literal["fresh", "shared"] = "fresh"
    track_stats: Literal["all", "clean"] = "all"
    nonfinite: Literal["raise", "keep"] = "raise"
    _: KW_ONLY
    teach: Objective = Objective()  # noqa: RUF009 - frozen, and the same for all
    climb: Objective | None = None
    weights: WeightAscent | None = None

    def __post_init__(self) -> None:
        check_parts(self.perturber, self.maximizer)
        for regularizer in self.regularizers:
            check_regularizer(regularizer)
        if not is_number(self.clean_weight) or not 0 <= self.clean_weight < math.inf:
            raise ConfigurationError(f"expected a finite clean_weight of 0 or more, got {self.clean_weight!r}")
        for name, choices in _CHOICES.items():
            if not is_choice(getattr(self, name), choices):
                raise ConfigurationError(f"expected {name} to be one of {choices}, got {getattr(self, name)!r}")
        if not isinstance(self.weights, WeightAscent | None):
            raise ConfigurationError(f"expected weights as a WeightAscent(…), or None, got {self.weights!r}")
        if self.weights is not None and self.maximizer.lessons(self.perturber) > 1:
            raise ConfigurationError(
                f"expected a maximiser that teaches once an update beside weights=…, got {self.maximizer!r}; "
                "use PGD, together"
            )
        self._check_objectives()
        needs_clean = any(one.reference is None or one.on == "clean" for one in self.regularizers)
        if self.track_stats == "clean" and not needs_clean and not self.clean_weight:
            raise ConfigurationError(
                "expected a clean pass for track_stats='clean', got none; give a regularizer or a clean_weight"
            )
        self.maximizer.check(self.perturber)

    @property
    def regularizers(self) -> tuple[Regularizer, ...]:
        """The regularisers, none or several."""
        if self.regularizer is None:
            return ()
        return self.regularizer if isinstance(self.regularizer, tuple) else (self.regularizer,)

    def _check_objectives(self) -> None:
        for name, objective in (("teach", self.teach), ("climb", self.teach if self.climb is None else self.climb)):
            if not isinstance(objective, Objective):
                raise ConfigurationError(f"expected {name} as an Objective(…), got {objective!r}")
            if not objective.task and all(one.on == "clean" for one in self.regularizers):
                raise ConfigurationError(
                    f"expected a regularizer on perturbed passes for {name}={objective}, which has no task, got none"
                )
        climbs_task = (self.climb or self.teach).task > 0
        vanish = all(one.reference is None and one.vanishes_at_equality for one in self.regularizers)
        starts = self.perturber.starts().values()
        if not climbs_task and vanish and self.dropout == "shared" and all(isinstance(at, Zero) for at in starts):
            raise ConfigurationError(
                "expected a start such as Normal(1e-3) to climb a penalty that vanishes at the clean pass, got Zero()"
            )
        if self.climb not in (None, self.teach) and self.maximizer.one_backward:
            raise ConfigurationError(
                f"expected climb and teach to be one objective with {type(self.maximizer).__name__}, whose one backward "
                "serves both; use PGD to climb another one"
            )

    def step(
        self,
        model: Adapter | nn.Module,
        batch: Batch,
        *,
        loss: Loss | None = None,
        backward: Backward | None = None,
        update: Callable[[], object] | None = None,
        sync: Sync | None = None,
        generator: torch.Generator | None = None,
        state: AscentState | None = None,
        correct: Correct | None = None,
        trace: Trace | None = None,
    ) -> StepReport:
        """Run every pass of one step and leave the parameters' gradients, added to what was there, in `.grad`.

        Arguments:
            model: the result of `adapt(model)`; a bare model is adapted for this step only.
            batch: whatever the model takes; see `Adapter.call`.
            loss: from outputs and batch to a scalar, or one loss per row (their mean is taken); None: the model's own.
            backward: replaces `Tensor.backward`, and may scale (`lambda t: scaler.scale(t).backward()`,
                `accelerator.backward`); its factor is divided out of the gradients of perturbations, on the device.
            update: unscales, clips, steps and zeroes the gradients; called when they are complete, with no perturbation
                bound. FreeAT needs it, and cannot accumulate gradients over batches.
            sync: a context manager for passes whose gradients must not be reduced yet; None: that of the wrappers in
                the model (DDP, FSDP2), for one reduction per update. `nullcontext`: one per pass.
            generator: source of random starts.
            state: the state that the maximiser carries from batch to batch.
            correct: from outputs and batch to the rows still classified correctly, `(B,)` bool, for `early_stop`.
            trace: receives the record of every pass.

        Raises:
            SiteError: a modality without a site, or a site that did not fire or cannot be perturbed.
            ShapeError: a mask, start, perturbation or loss that does not fit.
            NonFiniteError: see `nonfinite`.
            ConfigurationError: several updates per step without `update`, or under gradient accumulation; a DDP model
                with `static_graph=True`; a carried perturbation without `state`.
            RandomnessError: `dropout="shared"` and a model whose randomness torch's global state does not hold.
        """
        functions = {"loss": loss, "backward": backward, "update": update, "sync": sync, "correct": correct}
        check_functions(**functions, trace=trace)
        for name, value, kind in (("generator", generator, torch.Generator), ("state", state, AscentState)):
            if value is not None and not isinstance(value, kind):
                raise ConfigurationError(f"expected {name} as a {kind.__name__}, or None, got {shown(value)}")
        with adapted(model) as adapter:
            self._check(adapter.model, update)
            inside = adapter.boxes_verified  # checked in the first step only, because that reads from the device
            with (
                only_user(unwrapped(adapter.model), shares=False),
                Passes(
                    adapter, batch, self.perturber, loss=loss, correct=correct, generator=generator, inside=inside
                ) as passes,
            ):
                readouts.tap(passes, self.regularizers)
                rounds = Rounds(
                    passes,
                    regularizers=self.regularizers,
                    climb=self.climb or self.teach,
                    teach=self.teach,
                    clean_weight=self.clean_weight,
                    replay=Replay() if self.dropout == "shared" else None,
                    freeze_stats=self.track_stats == "clean",
                    one_graph=one_backward(adapter.model, sync),
                    backward=backward,
                    hold_back=sync or no_sync(adapter.model),
                    update=partial(self._update, adapter.model, update),
                    weights=self.weights,
                    raise_nonfinite=self.nonfinite == "raise",
                    trace=trace,
                )
                probes = self.maximizer.probes(self.perturber, generator=generator, state=state)
                deltas, _ = drive(probes, rounds.answer)
                return self._report(rounds, deltas)

    def _update(self, model: nn.Module, update: Callable[[], object] | None) -> None:
        if update is None:
            return
        before = _gradients(model) if self.maximizer.updates > 1 else []
        update()
        _check_updated(before)
        torch.clear_autocast_cache()  # of the weights before the update, which a later pass would be given

    def _report(self, rounds: Rounds, deltas: Mapping[str, Tensor]) -> StepReport:
        tally, passes = rounds.tally, rounds.passes
        if tally.loss is None:
            raise ConfigurationError("expected a maximiser that asks for a pass to learn from, got none with a weight")
        if not rounds.complete:
            raise ConfigurationError(
                "expected update=True in the last Probe with a weight, got none, so gradients lack a part; set it"
            )
        return StepReport(
            loss=tally.loss,
            task_loss=tally.task_loss,
            regularization=tally.regularization,
            passes=rounds.count,
            rows={m: len(deltas[m]) if m in deltas else len(place.x) for m, place in passes.places.items()},
            nonfinite={modality: bad.sum() for modality, bad in passes.rows.nonfinite.items()},
            effective=passes.effective,
            _norms=partial(self.perturber.norms, deltas, passes.places),
        )

    def _check(self, model: nn.Module, update: object) -> None:
        check_trainable(model)
        several = self.maximizer.updates > 1
        if several and update is None:
            raise ConfigurationError(
                f"expected update=… for {self.maximizer.updates} updates a step ({type(self.maximizer).__name__}), got "
                "None; pass a function that steps the optimiser and zeroes the gradients"
            )
        if several and accumulating(model):
            raise ConfigurationError(
                f"expected no gradient accumulation with {self.maximizer.updates} updates a step, got a step inside "
                "no_sync; each replay must update"
            )
        check_wrappers(model)
        if self.weights is not None:
            check_whole(model)


def _gradients(model: nn.Module) -> list[tuple[nn.Parameter, Tensor, int]]:
    return [(p, p.grad, p.grad._version) for p in model.parameters() if p.grad is not None]


def _check_updated(before: list[tuple[nn.Parameter, Tensor, int]]) -> None:
    """Raise ConfigurationError if an update left every gradient untouched: neither dropped nor written to."""
    if before and all(p.grad is gradient and gradient._version == version for p, gradient, version in before):
        raise ConfigurationError(
            "expected update to step the optimiser and zero the gradients, got them as they were; let every call "
            "take effect"
        )


_CHOICES = {"dropout": ("fresh", "shared"), "track_stats": ("all", "clean"), "nonfinite": ("raise", "keep")}
