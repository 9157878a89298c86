"""Rounds: the passes between two parameter updates, and the clean pass that they share.

A regulariser compares perturbed passes with a clean one, and its gradient flows into both. That gradient is exact and
costs one backward of the clean graph however many passes compare with it: each comparison is made with a leaf that
stands for the clean logits and collects their cotangent, which the clean graph gets at the end. Under DDP the last
perturbed graph and the clean graph are left together in one backward: two would be one all-reduce too many, and wrong
there, and under FSDP2 where several modules are sharded each by itself and the clean graph may not reach them all.
Elsewhere each has its own, which adds into `.grad` in place, where one over both sums every parameter's two
gradients in new memory first; under FSDP2 the clean graph's, being the last, is the one that is reduced.

With `dropout="shared"` every pass replays the random state of the first. A pass that starts at zero is then the clean
pass itself and is not run again: its perturbation's gradient is taken from the clean graph by one input-only backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from advvl.errors import ConfigurationError, RandomnessError
from advvl.maximizers.probes import Feedback, Probe
from advvl.passes.clean import CleanBranch
from advvl.passes.forward import Backward, Pass, Passes
from advvl.passes.traces import Tally, Trace
from advvl.perturbers.starts import Start, Zero
from advvl.regularizers.base import Regularizer
from advvl.runtime.randomness import RandomState
from advvl.runtime.reductions import Sync
from advvl.runtime.states import kept_buffers, kept_stats


class Round:
    """The passes between two parameter updates, with the clean branch they share.

    Arguments:
        passes: runs the model.
        quiet: entered around passes whose gradients are not to be reduced yet.
        regularizer: compares each perturbed pass with the clean one; None: there is no clean pass.
        clean_weight: of the clean pass's own task loss in the parameter gradient.
        shared: replay the first pass's randomness in every later one.
        freeze_stats: keep perturbed passes out of BatchNorm's running statistics.
        jointly: leave the last perturbed and the clean graph in one backward.
        backward: accumulates parameter gradients; may scale its argument. None: `Tensor.backward`.
        trace: is told of every pass.
    """

    def __init__(
        self,
        passes: Passes,
        *,
        quiet: Sync,
        regularizer: Regularizer | None = None,
        clean_weight: float = 0.0,
        shared: bool = False,
        freeze_stats: bool = False,
        jointly: bool = False,
        backward: Backward | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.passes, self.regularizer, self.clean_weight = passes, regularizer, clean_weight
        self.shared, self.freeze_stats, self.quiet = shared, freeze_stats, quiet
        self._jointly, self._backward = jointly, backward
        self._clean: CleanBranch | None = None
        self._random: RandomState | None = None
        self.tally = Tally(trace)
        self.effective: dict[str, Tensor] = {}
        self.count = 0
        self._rows: int | None = None  # losses of a forward, where there is one a row

    def run(self, probe: Probe) -> Feedback:
        """Answer a probe."""
        if self._needs_clean() and self._clean is None:
            with self.quiet():
                self._clean = self._run_clean()
        return self._answer(probe)

    def _answer(self, probe: Probe) -> Feedback:
        """One forward; with `apart`, of a batch that holds the rows once for each modality."""
        modalities, clean = tuple(probe.deltas), self._clean
        if clean is not None and not probe.update and self._is_clean_pass(probe):
            return self._serve(clean, probe, modalities)
        groups = [modalities]
        last = probe.update and not (clean is not None and clean.owes and not self._jointly)
        with nullcontext() if last else self.quiet(), self._stats(), _grad(probe):
            run = self._forward(probe.deltas, wants=probe.delta_gradients)
            tasks = [run.task]
            whole = self._logits(run)
            logits = [None] * len(groups) if whole is None else whole.tensor_split(len(groups))
            penalties = [self._penalty(clean, own, probe) for own in logits]
            objective = sum([*tasks[1:], *(penalty for penalty in penalties if penalty is not None)], tasks[0])
            gradients = self._gradients(probe, run, objective, clean)
        if probe.update:
            if not last and clean is not None:
                self._finish(clean)
            self._clean = self._random = None
        for group, task, penalty, own in zip(groups, tasks, penalties, logits, strict=True):
            self.tally.add(group, probe.weight, own, task, penalty, run.leaves, gradients)
        self.effective.update(run.effective)
        return self.passes.feedback(run, gradients, modalities, of=len(groups))

    def _needs_clean(self) -> bool:
        return self.regularizer is not None or self.clean_weight > 0

    def _is_clean_pass(self, probe: Probe) -> bool:
        at_zero = all(isinstance(delta, Zero) for delta in probe.deltas.values())
        same = self.regularizer is None or self.regularizer.vanishes_at_equality
        return self.shared and at_zero and same

    def _run_clean(self) -> CleanBranch:
        live = self.clean_weight > 0 or (self.regularizer is not None and self.regularizer.through_clean)
        zeros = {m: start for m, start in self.passes.perturber.starts().items() if isinstance(start, Zero)}
        serves = self.shared and bool(zeros)  # then later probes at zero are answered from this graph
        with torch.enable_grad() if live or serves else torch.no_grad():
            run = self._forward(zeros if serves else {}, wants=True)
        logits = self._logits(run)
        branch = CleanBranch(run, logits, live=self.regularizer is not None and self.regularizer.through_clean)
        branch.task_weight = self.clean_weight
        self.tally.add((), self.clean_weight, logits, run.task, None, {}, {})
        return branch

    def _stats(self) -> AbstractContextManager[None]:
        """Around all but the clean pass's forward, since a backward may run a forward again."""
        return kept_stats(self.passes.adapter.model) if self.freeze_stats else nullcontext()

    def _serve(self, clean: CleanBranch, probe: Probe, modalities: tuple[str, ...]) -> Feedback:
        with self.quiet(), self._stats(), self.passes.adapter.bound(clean.run.binding):
            clean.run.binding.begin_backward()
            gradients = clean.gradients(self.passes) if probe.delta_gradients else {}
        clean.task_weight += probe.weight
        penalty = None if self.regularizer is None else clean.run.task.detach() * 0
        self.tally.add(modalities, probe.weight, clean.logits, clean.run.task, penalty, clean.run.leaves, gradients)
        return self.passes.feedback(clean.run, gradients, modalities)

    def _logits(self, run: Pass) -> Tensor | None:
        """Those of a pass, where something looks at them; a regulariser needs them, a trace does without."""
        if self.regularizer is not None:
            return self.passes.logits(run)
        return None if self.tally.trace is None else self.passes.logits_if_any(run.outputs)

    def _penalty(self, clean: CleanBranch | None, logits: Tensor | None, probe: Probe) -> Tensor | None:
        if self.regularizer is None or clean is None or logits is None:
            return None
        against = clean.compared(whole=probe.update and self._jointly, learns=bool(probe.weight))
        penalty: object = self.regularizer(against, logits, self.passes.adapter.positions(self.passes.batch))
        if not isinstance(penalty, Tensor) or penalty.ndim:
            got = tuple(penalty.shape) if isinstance(penalty, Tensor) else type(penalty).__name__
            raise ConfigurationError(
                f"expected a scalar tensor from {type(self.regularizer).__name__}, got {got}; reduce over the rows in it"
            )
        return penalty

    def _gradients(self, probe: Probe, run: Pass, objective: Tensor, clean: CleanBranch | None) -> dict[str, Tensor]:
        """Those of the perturbations, if they are asked for; with a weight, the parameters get theirs as well."""
        if probe.weight:
            return self._learn(probe, run, objective, clean)
        if not probe.delta_gradients:
            return {}
        run.binding.begin_backward()
        return self.passes.input_gradients(objective, run)

    def _learn(self, probe: Probe, run: Pass, objective: Tensor, clean: CleanBranch | None) -> dict[str, Tensor]:
        total, refusal = probe.weight * objective, None
        if probe.update and self._jointly and clean is not None and clean.owes:
            total, refusal = total + clean.remainder(), _CHECKPOINTED
        run.binding.begin_backward(refusal=refusal)
        factor = self.passes.accumulate(total, self._backward, run)
        if clean is not None:
            clean.collect(factor)
        if not probe.delta_gradients:
            return {}
        gradients = self.passes.all_found({modality: leaf.grad for modality, leaf in run.leaves.items()}, run)
        scale = probe.weight if factor is None else factor * probe.weight
        return {modality: gradient / scale for modality, gradient in gradients.items()}

    def _finish(self, clean: CleanBranch) -> None:
        """Give the clean graph its backward."""
        with torch.enable_grad(), self._stats(), self.passes.adapter.bound(clean.run.binding):
            clean.run.binding.begin_backward()
            self.passes.accumulate(clean.remainder(), self._backward, clean.run)

    def _forward(self, deltas: Mapping[str, Tensor | Start], *, wants: bool, apart: bool = False) -> Pass:
        self.count += 1
        first = self.shared and self._random is None
        if first:
            self._random = RandomState.of(self.passes.adapter.model)
        elif self._random is not None:
            self._random.replay()
        run = self.passes.forward(deltas, wants=wants, apart=apart)
        if self._random is not None and first and not self.passes.adapter.replay_verified:
            self._verify(self._random, run)
        if not apart:
            self._rows = None if run.losses is None else len(run.losses)
        return run

    def _verify(self, random: RandomState, run: Pass) -> None:
        """Run the first pass again, without a graph, and see that replay gives the same logits."""
        adapter = self.passes.adapter
        after = RandomState.of(adapter.model)
        random.replay()
        deltas = {modality: leaf.detach() for modality, leaf in run.leaves.items()}
        with torch.no_grad(), kept_buffers(adapter.model), adapter.inject(deltas):
            again = adapter.forward(self.passes.batch)
        first, second = self.passes.comparable(run.outputs), self.passes.comparable(again)
        close = (
            torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())) if first.numel() else True
        )
        if not close or not RandomState.of(adapter.model).equals(after):
            raise RandomnessError(
                "expected replaying torch's random state to repeat a pass, but its outputs differ; the model draws from "
                "elsewhere (a generator of its own, numpy, another device): use dropout='fresh'"
            )
        adapter.replay_verified = True


_CHECKPOINTED = (
    "expected the site of {modality!r} outside any activation-checkpointed region, but it was run again in a backward "
    "that covers both the clean and the last perturbed pass, as one under DDP, with sync=… or with modules sharded each by "
    "itself does, where it cannot be told which of them it belongs to; checkpoint only layers above the site, or train "
    "without a regulariser through the clean branch"
)


def _grad(probe: Probe) -> AbstractContextManager[object]:
    """A graph only where something is differentiated."""
    return torch.enable_grad() if probe.weight or probe.delta_gradients else torch.no_grad()
