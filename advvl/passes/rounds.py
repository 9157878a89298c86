"""Rounds: the passes between two parameter updates, which share one clean branch.

Under DDP the last perturbed graph and the clean graph share one backward, because two would be one all-reduce too many,
and wrong there. The same holds under FSDP2 if several modules are sharded separately, since the clean graph may not
reach them all. Elsewhere each graph has its own backward, which adds into `.grad` in place; a common one would first
sum every parameter's two gradients in new memory. Under FSDP2 the clean graph's backward, being the last, is the one
that is reduced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.maximizers.probes import Feedback, Probe
from advvl.passes import readouts
from advvl.passes.backward import Backward, accumulate, all_found, input_gradients, weight_gradients
from advvl.passes.clean import CleanBranch, Comparison
from advvl.passes.forward import Pass, Passes
from advvl.passes.objective import Objective, Value, total
from advvl.passes.replay import Replay
from advvl.passes.traces import PassTrace, Tally, Trace
from advvl.passes.watch import parameters_kept
from advvl.passes.weights import chosen_of, moved
from advvl.perturbers.starts import Start, Zero
from advvl.perturbers.weights import WeightAscent
from advvl.regularizers.base import Regularizer
from advvl.runtime.reductions import Sync
from advvl.runtime.states import kept_stats


@dataclass
class Rounds:
    """Answers the probes of a step, by all passes of all its rounds.

    Arguments:
        passes: runs the model.
        hold_back: entered around passes whose gradients must not be reduced yet.
        regularizers: compare passes with their references.
        climb, teach: the objective of passes that only move perturbations, and of passes that parameters learn from.
        clean_weight: weight of the clean pass's own task loss in the parameter gradient.
        replay: gives every pass of a round the same randomness; None: each draws its own.
        freeze_stats: keep perturbed passes out of BatchNorm's running statistics.
        one_graph: use one backward for the last perturbed graph and the clean graph.
        backward: accumulates parameter gradients; may scale its argument. None: `Tensor.backward`.
        update: called when the parameters' gradients are complete.
        weights: how weights move before a pass that parameters learn from; None: they do not.
        raise_nonfinite: raise NonFiniteError before an update after a loss or gradient that was not finite.
        trace: receives the record of every pass.
        complete: no pass that parameters learn from came after the last update.
    """

    passes: Passes
    hold_back: Sync
    regularizers: Sequence[Regularizer]
    climb: Objective
    teach: Objective
    clean_weight: float
    replay: Replay | None
    freeze_stats: bool
    one_graph: bool
    backward: Backward | None
    update: Callable[[], object]
    weights: WeightAscent | None
    raise_nonfinite: bool
    trace: Trace | None
    tally: Tally = field(default_factory=Tally)
    count: int = 0
    complete: bool = True
    _clean: CleanBranch | None = None
    _references: list[Tensor | None] | None = None
    _tally_before: Tally = field(default_factory=Tally)  # of the round

    def answer(self, probe: Probe) -> Feedback:
        """Run the pass that a probe requests, and let parameters learn from it by its weight.

        Raises:
            ConfigurationError: one backward would have to serve two objectives, or weights would move on the way.
        """
        self._check(probe)
        with ExitStack() as stack:
            if self.weights is not None and probe.weight:
                probe, context = self._moved_weights(probe, self.weights)
                stack.enter_context(context)
            feedback = self._answer(probe)
        if probe.update:
            self._end()
        self.complete = probe.update or (self.complete and not probe.weight)
        return feedback

    def _answer(self, probe: Probe) -> Feedback:
        clean = self._clean_of_round()
        if self._repeats_clean(probe, clean):
            return self._from_clean(probe, clean)
        with nullcontext() if self._is_last(probe, clean) else self.hold_back(), self._stats(), _graph(probe):
            only_moves = self.passes.adapter.pure and not probe.weight
            run = self._forward(probe.deltas, wants=probe.delta_gradients, reuse=only_moves)
            objective, together = self.teach if probe.weight else self.climb, probe.update and self.one_graph
            value = self._value(run, clean, objective, learns=bool(probe.weight), in_one_graph=together)
            gradients = self._differentiate(value, run, clean, probe)
        if probe.update and not self._is_last(probe, clean):
            self._finish(clean)
        self._record(probe.weight, run, value, gradients)
        return self.passes.feedback(run, value.losses, gradients)

    def _moved_weights(self, probe: Probe, ascent: WeightAscent) -> tuple[Probe, AbstractContextManager[None]]:
        """Return the probe at the perturbations where the weights' gradient is taken, and a context with moved weights."""
        weights = chosen_of(self.passes.adapter.model, ascent)
        clean = self._clean_of_round()
        with self.hold_back(), self._stats(), torch.enable_grad():
            run = self._forward(probe.deltas, wants=False)
            value = self._value(run, clean, self.teach, learns=True, in_one_graph=True)
            loss = probe.weight * value.total
            loss = loss + clean.pending_loss() if clean.needs_backward else loss
            run.binding.begin_backward(refusal=_CHECKPOINTED if clean.needs_backward else None)
            steps, finite = ascent.steps(weights, weight_gradients(loss, weights, run, self.passes))
        self.passes.rows.see_weights(finite)
        self.tally = self._tally_before
        self._record(0.0, run, value, {})
        self._clean = None  # its graph is spent
        return replace(probe, deltas={m: leaf.detach() for m, leaf in run.leaves.items()}), moved(weights, steps)

    def _is_last(self, probe: Probe, clean: CleanBranch) -> bool:
        """True if the backward of this pass is the last of the round, after which gradients are reduced and applied."""
        return probe.update and (self.one_graph or not clean.needs_backward)

    def _end(self) -> None:
        """End a round: refuse non-finite numbers, then update."""
        self._clean = self._references = None
        self.passes.forget()
        if self.replay is not None:
            self.replay.forget()
        if self.raise_nonfinite:
            self.passes.rows.check(self.tally.loss)
        self.update()

    def _check(self, probe: Probe) -> None:
        if probe.weight and probe.delta_gradients and self.climb != self.teach:
            raise ConfigurationError(
                "expected one objective where one backward moves perturbations and parameters, got climb and teach that "
                "differ; use PGD"
            )
        if self.weights is not None and probe.weight and not probe.update:
            raise ConfigurationError(
                "expected a maximiser that teaches once an update beside weights=…, got several passes; use PGD, together"
            )

    def _value(self, run: Pass, clean: CleanBranch, objective: Objective, *, learns: bool, in_one_graph: bool) -> Value:
        """An objective on a pass; see `Comparison.penalty`."""
        losses, task, penalty = None, None, None
        if objective.task:
            losses, task = self.passes.task(run, objective.loss)
            if torch.is_grad_enabled() and not task.requires_grad and clean.comparisons:
                raise ConfigurationError(
                    "expected a task loss with a graph beside a regularizer, got one without; compute it without detach, "
                    "item or no_grad"
                )
        else:
            self.passes.check_rows(run, None)
        if objective.penalty and clean.comparisons:
            penalty = self._penalty(clean.comparisons, run, learns=learns, in_one_graph=in_one_graph)
        return Value(objective, task, penalty, losses)

    def _penalty(self, comparisons: Sequence[Comparison], run: Pass, *, learns: bool, in_one_graph: bool) -> Tensor:
        found = [
            one.penalty(
                readouts.read(one.regularizer, run, self.passes),
                readouts.rows_of(one.regularizer, self.passes.adapter, self.passes.batch),
                learns=learns,
                in_one_graph=in_one_graph,
            )
            for one in comparisons
        ]
        return total(found)

    def _differentiate(self, value: Value, run: Pass, clean: CleanBranch, probe: Probe) -> dict[str, Tensor]:
        """The gradients of the perturbations, if requested; with a weight, the parameters get theirs as well."""
        if not probe.weight:
            run.binding.begin_backward()
            return input_gradients(value.total, run, self.passes) if probe.delta_gradients else {}
        loss, refusal = probe.weight * value.total, None
        if probe.update and self.one_graph and clean.needs_backward:
            loss, refusal = loss + clean.pending_loss(), _CHECKPOINTED
        run.binding.begin_backward(refusal=refusal)
        last = self._is_last(probe, clean) and self.weights is None  # else updates would be of moved weights
        with nullcontext() if last else self._updates_watched():
            factor = accumulate(loss, self.backward, run, self.passes)
        clean.collect(factor)
        if not probe.delta_gradients:
            return {}
        gradients = all_found({modality: leaf.grad for modality, leaf in run.leaves.items()}, run, self.passes)
        scale = probe.weight if factor is None else factor * probe.weight
        return {modality: gradient / scale for modality, gradient in gradients.items()}

    @contextmanager
    def _updates_watched(self) -> Iterator[None]:
        """Wrap a backward that is not the last of a round; the first one of each adapter is checked."""
        adapter = self.passes.adapter
        with nullcontext() if adapter.updates_verified else parameters_kept(adapter.model):
            yield
        adapter.updates_verified = True

    def _clean_of_round(self) -> CleanBranch:
        if self._clean is None:
            with self.hold_back():
                self._clean = self._clean_branch()
        return self._clean

    def _clean_branch(self) -> CleanBranch:
        """Run the references, and the clean pass if anything needs it."""
        passes = self.passes
        self._tally_before = copy.copy(self.tally)
        if self._references is None:
            self._references = readouts.of_references(self.regularizers, passes)
        fixed = list(zip(self.regularizers, self._references, strict=True))
        if not (self.clean_weight or any(side is None or one.on == "clean" for one, side in fixed)):
            return CleanBranch(
                comparisons=[Comparison(one, side, live=False) for one, side in fixed if side is not None]
            )
        zeros = {m: start for m, start in passes.perturber.starts().items() if isinstance(start, Zero)}
        at_zero = zeros if self._clean_pass_can_serve() else {}  # later probes at zero are answered from this graph
        flows = any(one.on == "clean" or (side is None and one.through_clean) for one, side in fixed)
        penalty = None
        with torch.enable_grad() if self.clean_weight or flows or at_zero else torch.no_grad():
            run = self._forward(at_zero, wants=True)
            losses, task = passes.task(run, self.teach.loss) if self.clean_weight or self.teach.task else (None, None)
            found = [
                Comparison(one, readouts.read(one, run, passes), live=one.through_clean)
                if side is None
                else Comparison(one, side, live=False)
                for one, side in fixed
            ]
            if on_clean := [one for one in found if one.regularizer.on == "clean"]:
                penalty = self.teach.penalty * self._penalty(on_clean, run, learns=True, in_one_graph=False)
                self.tally.add_penalty(penalty)
        self._record(self.clean_weight, run, Value(Objective(), task), {}, modalities=())
        comparisons = [one for one in found if one.regularizer.on == "perturbed"]
        return CleanBranch(
            run, task=task, losses=losses, task_weight=self.clean_weight, comparisons=comparisons, penalty=penalty
        )

    def _clean_pass_can_serve(self) -> bool:
        """True if the clean pass is also the pass at zero perturbations, whose penalties and gradients of them vanish."""
        one_objective = self.climb == self.teach and self.teach.task == 1
        vanishing = all(one.reference is None and one.vanishes_at_equality for one in self.regularizers)
        return self.replay is not None and one_objective and vanishing

    def _repeats_clean(self, probe: Probe, clean: CleanBranch) -> bool:
        at_zero = all(isinstance(delta, Zero) for delta in probe.deltas.values())
        return clean.run is not None and not probe.update and at_zero and self._clean_pass_can_serve()

    def _from_clean(self, probe: Probe, clean: CleanBranch) -> Feedback:
        """Answer a probe at zero perturbations from the clean pass, instead of repeating that pass."""
        run, task = clean.run, clean.task
        assert run is not None
        assert task is not None
        with self.hold_back(), self._stats(), self.passes.adapter.bound(run.binding):
            run.binding.begin_backward()
            found = clean.gradients_at_zero(self.passes) if probe.delta_gradients else {}
        gradients = {modality: found[modality] for modality in probe.deltas if modality in found}
        clean.task_weight += probe.weight
        value = Value(self.teach, task, task.detach() * 0 if clean.comparisons else None)
        self._record(probe.weight, run, value, gradients, modalities=tuple(probe.deltas))
        return self.passes.feedback(run, clean.losses, gradients, modalities=tuple(probe.deltas))

    def _finish(self, clean: CleanBranch) -> None:
        """Run the backward of the clean graph."""
        assert clean.run is not None
        with torch.enable_grad(), self._stats(), self.passes.adapter.bound(clean.run.binding):
            clean.run.binding.begin_backward()
            accumulate(clean.pending_loss(), self.backward, clean.run, self.passes)

    def _forward(self, deltas: Mapping[str, Tensor | Start], *, wants: bool, reuse: bool = False) -> Pass:
        self.count += 1
        unverified = self.replay is not None and self.replay.prepare(self.passes)
        run = self.passes.forward(deltas, wants=wants, reuse=reuse)
        if unverified and self.replay is not None:
            self.replay.verify(self.passes, run)
        return run

    def _stats(self) -> AbstractContextManager[None]:
        """Wrap everything but the forward of the clean pass, since a backward may run a forward again."""
        return kept_stats(self.passes.adapter.model) if self.freeze_stats else nullcontext()

    def _record(
        self,
        weight: float,
        run: Pass,
        value: Value,
        gradients: Mapping[str, Tensor],
        *,
        modalities: tuple[str, ...] | None = None,
    ) -> None:
        """Count a pass, and pass its record to the trace."""
        self.tally.add(weight, value)
        if self.trace is not None:
            leaves = {m: leaf.detach() for m, leaf in run.leaves.items() if modalities is None or m in modalities}
            parts = self.passes.logits_if_any(run.outputs), value.task, value.penalty
            logits, task, penalty = (None if part is None else part.detach() for part in parts)
            self.trace(PassTrace(tuple(leaves), weight, logits, task, penalty, leaves, gradients))


_CHECKPOINTED = (
    "expected the site of {modality!r} outside any activation-checkpointed region, but it was run again in a backward "
    "that covers both the clean and the last perturbed pass, as under DDP, with sync=…, with weights=… or with modules "
    "sharded separately, which does not say whose site it is; checkpoint only layers above the site, or train without "
    "regulariser and clean_weight"
)


def _graph(probe: Probe) -> AbstractContextManager[object]:
    """A graph only where something is differentiated."""
    return torch.enable_grad() if probe.weight or probe.delta_gradients else torch.no_grad()
