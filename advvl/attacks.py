"""Attacks: the perturbations that an inner maximiser finds, with the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.injection import Batch
from advvl.adapters.registry import adapted
from advvl.checks import check_functions, check_seed
from advvl.errors import DataError, WeakAttackWarning
from advvl.maximizers.base import InnerMaximizer, check_parts
from advvl.maximizers.probes import Feedback, Probe
from advvl.passes.drive import ascend, drive
from advvl.passes.forward import Correct, Passes
from advvl.passes.objective import Loss
from advvl.perturbers.ascents import EmbeddingPerturber
from advvl.perturbers.base import Perturber
from advvl.runtime.names import unwrapped
from advvl.runtime.randomness import preserved
from advvl.runtime.reductions import no_sync
from advvl.runtime.states import kept_buffers, kept_modes, kept_weights, only_user, renormalised, shared_buffers


@dataclass(frozen=True, repr=False)
class AttackResult:
    """The result of an attack.

    Arguments:
        deltas: modality to its final perturbation, of the shape of the site's tensor.
        losses: `(B,)` at the final perturbation (in turn: at the last modality's); None for a scalar loss or without an
            end pass.
        correct: `(B,)` bool at the final perturbation; None without a judge or an end pass.
        nonfinite: modality to the rows `(B,)`, bool, whose gradient was not finite in some pass, in which they did not move.
        unmoved: modality to the rows `(B,)`, bool, that have real positions but did not move: their gradient was zero
            or not finite in every pass, half precision swallowed their perturbation, or their relative ball has no
            extent, as around embeddings of zero. Their verdict says nothing about robustness.
        moved: modality to the rows `(B,)`, bool, that some gradient moved; rows of padding alone are in neither.
        effective: modality to ‖cast(x+δ)−x‖/‖δ‖ of its last pass, `(B,)`, where the model is in half precision.
        owners: modality to the example of each row of its perturbation `(N,)`, if a row is not an example; for packed
            texts, that of each position `(B·T,)`, by which `nonfinite` and `unmoved` are then indexed too.
    """

    deltas: Mapping[str, Tensor]
    losses: Tensor | None
    correct: Tensor | None
    nonfinite: Mapping[str, Tensor] = field(default_factory=dict)
    unmoved: Mapping[str, Tensor] = field(default_factory=dict)
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    effective: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Mapping[str, Tensor] = field(default_factory=dict)

    def of_examples(self, modality: str, rows: Tensor, examples: int) -> Tensor:
        """Flag the examples `(examples,)`, bool, with a flagged row of a modality's perturbation.

        Raises:
            DataError: rows of more examples than there are.
        """
        if modality not in self.owners:
            return rows
        flagged = self.owners[modality][rows]
        if len(flagged) and int(flagged.max()) >= examples:
            raise DataError(
                f"expected rows of {modality!r} of {examples} examples, got one of example {int(flagged.max())}; pass the "
                "number of examples in the batch"
            )
        return torch.zeros(examples, dtype=torch.bool, device=rows.device).index_put_((flagged,), rows[rows])

    def __repr__(self) -> str:
        parts = [f"{modality} {tuple(delta.shape)}" for modality, delta in self.deltas.items()]
        if self.losses is not None and len(self.losses):
            parts.append(f"mean loss {float(self.losses.mean()):.4g} of {len(self.losses)} rows")
        if self.correct is not None:
            parts.append(f"{int(self.correct.sum())} of {len(self.correct)} still correct")
        for name in ("unmoved", "nonfinite"):
            counts = _counts(getattr(self, name)).items()
            parts += [
                f"{count} of {len(getattr(self, name)[modality])} {name} in {modality}" for modality, count in counts
            ]
        return f"AttackResult({', '.join(parts)})"


class Attack:
    """An attack from two parts: `Attack(perturber, maximizer)(model, batch)`.

    Arguments:
        perturber: starts and moves the perturbations.
        maximizer: decides which passes to run; its parameter weights and updates play no part.
        loss: from outputs and batch to the loss to maximise, one per row `(B,)` (their sum is differentiated) or a
            scalar; None: the model's own loss.
        correct: from outputs and batch to the rows still classified correctly, `(B,)` bool.
        train_mode: attack the model in its current modes instead of eval mode; its buffers are restored all the same.
        end_pass: run the final perturbations once more, for their losses and verdicts; False: those are None, and one
            forward is saved.
        seed: of the generator for random starts, which advances from call to call.

    Differentiates with respect to the perturbations alone, and leaves parameters, buffers, `.grad`, modes, hooks and the
    global random state as found, also on an exception.

    Warns (`WeakAttackWarning`) if its steps cannot reach the edge of its ball from the clean tensor.

    Raises:
        ConfigurationError: an argument of the wrong kind; parts that do not go together.
    """

    def __init__(
        self,
        perturber: Perturber,
        maximizer: InnerMaximizer,
        *,
        loss: Loss | None = None,
        correct: Correct | None = None,
        train_mode: bool = False,
        end_pass: bool = True,
        seed: int = 0,
    ) -> None:
        check_parts(perturber, maximizer)
        check_functions(loss=loss, correct=correct)
        check_seed(seed)
        maximizer.check(perturber)
        self.perturber, self.maximizer = perturber.for_attack(), maximizer
        self.loss, self.correct, self.train_mode, self.seed = loss, correct, train_mode, seed
        self.end_pass = end_pass
        _warn_if_short(self.perturber, maximizer)
        self._generator = torch.Generator().manual_seed(seed)

    def __repr__(self) -> str:
        return f"Attack({self.perturber!r}, {self.maximizer!r}, seed={self.seed})"

    def __call__(self, model: Adapter | nn.Module, batch: Batch) -> AttackResult:
        """Attack the model on a batch.

        Raises:
            SiteError, ShapeError, ConfigurationError: as `AdversarialTraining.step`.
            ConfigurationError: a tensor at a site that is not inside the box of its modality.
        """
        with adapted(model) as adapter, ExitStack() as stack:
            inner = unwrapped(adapter.model)
            changes = any(module.training for module in inner.modules()) or bool(renormalised(inner))
            shares = not self.train_mode and not changes
            stack.enter_context(only_user(inner, shares=shares))
            for kept in (preserved, kept_modes, kept_weights):
                stack.enter_context(kept(adapter.model))
            stack.enter_context(shared_buffers(inner) if shares else kept_buffers(adapter.model))
            if not self.train_mode:
                adapter.model.eval()
            return self._run(adapter, batch)

    def _run(self, adapter: Adapter, batch: Batch) -> AttackResult:
        with (
            no_sync(adapter.model)(),
            Passes(
                adapter,
                batch,
                self.perturber,
                loss=self.loss,
                correct=self.correct,
                generator=self._generator,
                reuse=adapter.pure and not self.train_mode,
                reduce=torch.sum,
            ) as passes,
        ):

            def answer(probe: Probe) -> Feedback:
                if not self.end_pass and _is_end(probe):
                    ended = cast("Mapping[str, Tensor]", probe.deltas)
                    passes.see(ended)
                    return Feedback(ended, {}, passes.places)
                return ascend(passes, probe)

            deltas, last = drive(self.maximizer.probes(self.perturber, generator=self._generator), answer)
            rows = passes.rows
            rows.swallowed(passes.effective)
            places = passes.places
            rows.pinned({modality: self.perturber.unit(modality, place) for modality, place in places.items()}, places)
            owners = {modality: place.owners for modality, place in places.items()}
            return AttackResult(
                deltas,
                last.losses,
                last.correct,
                nonfinite=rows.nonfinite,
                unmoved=rows.still,
                moved=rows.moved,
                effective=passes.effective,
                owners={modality: of for modality, of in owners.items() if of is not None},
            )


def _warn_if_short(perturber: Perturber, maximizer: InnerMaximizer) -> None:
    """Warn about an attack that cannot reach the edge of its ball, whose failure would look like robustness."""
    ascents = perturber.ascents if isinstance(perturber, EmbeddingPerturber) else {}
    for modality, ascent in ascents.items():
        if maximizer.moves is not None and ascent.falls_short(maximizer.moves):
            warnings.warn(
                f"expected steps that can reach the edge of the ball of {modality!r}, got {maximizer.moves} of "
                f"{ascent.step_size} in {ascent.ball}; take more or larger ones",
                WeakAttackWarning,
                stacklevel=3,
            )


def _counts(rows: Mapping[str, Tensor]) -> dict[str, int]:
    """Modality to the number of its rows, where there are any; reads from the device."""
    counts = {modality: int(flags.sum()) for modality, flags in rows.items()}
    return {modality: count for modality, count in counts.items() if count}


def _is_end(probe: Probe) -> bool:
    """True if training would only learn from this pass, at perturbations that already exist."""
    final = bool(probe.weight) and not probe.delta_gradients
    return final and all(isinstance(delta, Tensor) for delta in probe.deltas.values())
