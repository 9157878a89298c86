"""One update: its batch is split over processes and micro-batches, its gradient is that of the whole batch.

The run's seed and the update's number decide the examples of an update. Part p of P, where P is the number of processes
times the number of micro-batches, takes every P-th example from the p-th on, or the examples that a sampler gives it.
All randomness in a part (dropout, adversarial starts) comes from generators seeded by the run, the update and the part.
So four processes, two with two micro-batches each, and one with four do the same, up to the order of sums.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import nn

from advvl.adapters.base import Adapter
from advvl.adapters.outputs import read_loss
from advvl.data.source import BatchSource, Sampler
from advvl.errors import ConfigurationError, NonFiniteError
from advvl.fit.loading import Batches, Updates
from advvl.fit.options import LoopOptions, OptimizerOptions
from advvl.fit.schedules import schedule
from advvl.fit.shares import Count, Share, cut, of_part
from advvl.maximizers.base import AscentState
from advvl.passes.readouts import rows_of
from advvl.passes.traces import PassTrace
from advvl.perturbers.discrete import DiscretePerturber
from advvl.regularizers.references import Averaged, Frozen
from advvl.runtime.randomness import derive_seed
from advvl.runtime.states import remembered_buffers
from advvl.training import AdversarialTraining


@dataclass
class Adversary:
    """The parts of an adversarial update: the method, its tasks, the adapter, the state it carries, its first update.

    The method is one for all of the tasks, or one for each by its name.
    """

    method: AdversarialTraining | Mapping[str, AdversarialTraining]
    tasks: Collection[str] | None
    target: Adapter
    state: AscentState
    first: int = 0

    def method_for(self, batch: Mapping[str, Any]) -> AdversarialTraining | None:
        """Return the method that a batch is for; None: the plain step.

        Raises:
            ConfigurationError: methods go by tasks, and the batch names none.
        """
        if isinstance(self.method, AdversarialTraining) and self.tasks is None:
            return self.method
        if "task" not in batch:
            raise ConfigurationError(
                f"expected batches with an entry 'task', by which methods are chosen, got {sorted(map(str, batch))}; "
                "let the source add it"
            )
        by_task = self.method if isinstance(self.method, Mapping) else dict.fromkeys(self.tasks or (), self.method)
        return by_task.get(batch["task"])

    @property
    def methods(self) -> Collection[AdversarialTraining]:
        return [self.method] if isinstance(self.method, AdversarialTraining) else list(self.method.values())

    @property
    def averages(self) -> list[Averaged]:
        """The averages of the model that regularisers compare with, each once."""
        found = [one.reference for method in self.methods for one in method.regularizers]
        return list(dict.fromkeys(one for one in found if isinstance(one, Averaged)))

    @property
    def others(self) -> list[nn.Module]:
        """The modules other than the model that methods run: references held by regularisers, discretisers."""
        references = [one.reference for method in self.methods for one in method.regularizers]
        perturbers = [method.perturber for method in self.methods]
        held = [
            *(one.average for one in references if isinstance(one, Averaged)),
            *(one.frozen for one in references if isinstance(one, Frozen)),
            *(one.discretise for one in perturbers if isinstance(one, DiscretePerturber)),
        ]
        return [one for one in held if isinstance(one, nn.Module)]

    def compared(self, batch: Mapping[str, Any]) -> list[float | None]:
        """Return how many rows the mean of each regulariser of each method is over.

        None: it is of a method for other batches, or over as many rows for each example.
        """
        own = self.method_for(batch)
        masks = [
            rows_of(one, self.target, batch) if method is own else None
            for method in self.methods
            for one in method.regularizers
        ]
        return [None if mask is None else float(mask.bool().sum()) for mask in masks]

    def compared_in(self, share: Share) -> Sequence[float | None]:
        """Return what the regularisers of the part's own method weigh, in their order."""
        own, start = self.method_for(share.batch), 0
        for method in self.methods:
            if method is own:
                return share.compared[start : start + len(method.regularizers)]
            start += len(method.regularizers)
        return ()

    def for_part(self, method: AdversarialTraining, share: Share) -> AdversarialTraining:
        """Return the method that does to a part what `method` does to all of the batch."""
        weights = self.compared_in(share)
        return of_part(method, share.weight, penalties=[1.0 if one is None else one / share.weight for one in weights])

    def compares_rows(self, share: Share) -> bool:
        """Return True if a regulariser's mean over logits is assumed to be over examples with equally many rows."""
        method = self.method_for(share.batch)
        if method is None or share.whole or share.weight == 1:
            return False
        weights = zip(method.regularizers, self.compared_in(share), strict=True)
        return any(one.reads is None and weight is None for one, weight in weights)


class Unusable(NonFiniteError):
    """A loss or gradient of an update is not finite, as every process knows; no parameter has been touched by it.

    With FreeAT's several updates per batch, the earlier ones stay.
    """


@dataclass(kw_only=True)
class Updater:
    """Does updates by their number; it changes only the model, the optimiser and the state that the method carries.

    Arguments:
        model, optimizer: as `accelerator.prepare` gave them.
        updates: the number of updates of the run, for the learning rate's schedule.
        count: from a batch to the number of entries in its scalar mean loss.
        sampler: decides the examples of each part; None: the seed and the options.
        equal: parts weigh the same, whatever their numbers of examples.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    source: BatchSource
    options: OptimizerOptions
    loop: LoopOptions
    seed: int
    updates: int
    count: Count | None
    adversary: Adversary | None
    sampler: Sampler | None = None
    equal: bool = False
    _rates: list[float] = field(init=False)
    _batches: Batches = field(init=False)
    _number: int = 0
    _losses: list[float] = field(default_factory=list)
    _logits: list[float] = field(default_factory=list)  # of each part, the rows of logits an example
    _reason: str = ""

    def __post_init__(self) -> None:
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        for module in self.adversary.others if self.adversary is not None else ():
            module.to(self.accelerator.device)
        mine = range(self.accelerator.process_index, self.parts, self.accelerator.num_processes)
        parts = Updates(self.source, self.sampler, self.options.batch_size, self.seed, self.parts, mine)
        pinned = self.accelerator.device.type == "cuda"
        self._batches = Batches(parts, self.updates, self.loop.workers, pinned)

    @property
    def parts(self) -> int:
        return int(self.accelerator.num_processes) * self.loop.accumulate

    def run(self, number: int) -> float:
        """Do the update of that number; return this process's part of its mean loss, the sum over processes.

        Raises:
            Unusable: in every process, a loss or the gradient is not finite.
        """
        factor = schedule(self.options, number, self.updates)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        put_back = remembered_buffers(self.model) if self.loop.nonfinite == "skip" else None
        try:
            return self._learn(number, self._apply)
        except Unusable:
            if put_back is not None:
                put_back()
            self.optimizer.zero_grad()
            raise

    def rehearse(self) -> None:
        """Make a resumed run reduce gradients as it did before; call it before its state is loaded.

        DDP rearranges its buckets after the first backward of a process, by the order in which gradients came; with
        three or more processes another arrangement means another order of sums and other bits. So the first update's
        backward is repeated and discarded.
        """
        if self.accelerator.num_processes > 2:
            with suppress(Unusable):
                self._learn(0, self._forget)
            self.optimizer.zero_grad()

    def total(self, *values: float) -> list[float]:
        """Each value's sum over the processes, the same in all of them."""
        if self.accelerator.num_processes == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        sums: list[float] = self.accelerator.reduce(mine, "sum").tolist()
        return sums

    def _learn(self, number: int, apply: Callable[[], object]) -> float:
        self._number, self._reason = number, ""
        self._losses, self._logits = [0.0] * self.parts, [0.0] * self.parts
        adversary = self.adversary if self.adversary is not None and number >= self.adversary.first else None
        shares = cut(
            self._batches.updates.divided(number),
            self._batches.of(number),
            mine=self._batches.updates.mine,
            count=self.count,
            compared=adversary.compared
            if adversary is not None and any(method.regularizers for method in adversary.methods)
            else None,
            total=self.total,
            equal=self.equal,
        )
        loss = 0.0
        for share in shares:
            last = share is shares[-1]
            _seed_everything(derive_seed(self.seed, "update", number, share.number))
            ahead = self._batches.workers > 0 and self._batches.pinned
            share.batch = send_to_device(share.batch, self.accelerator.device, non_blocking=ahead)
            method = None if adversary is None else adversary.method_for(share.batch)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                if method is None:
                    mean = self._learn_plainly(share, apply if last else None)
                else:
                    mean = self._learn_adversarially(method, share, apply if last else None)
            loss += share.weight * mean
        return loss

    def _learn_plainly(self, share: Share, apply: Callable[[], object] | None) -> float:
        loss = share.weigh(read_loss(self.model(**share.batch), share.batch)).mean()
        self.accelerator.backward(loss * (share.weight * self.accelerator.num_processes))  # DDP takes the mean
        value = self._losses[share.number] = float(loss.detach())
        if apply is not None:
            apply()
        return value

    def _learn_adversarially(
        self, method: AdversarialTraining, share: Share, apply: Callable[[], object] | None
    ) -> float:
        adversary, processes = self.adversary, self.accelerator.num_processes
        assert adversary is not None
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "method", self._number, share.number))
        learnt: list[torch.Tensor] = []  # the objectives differentiated since the parameters last changed

        def loss(outputs: Any, batch: Any) -> torch.Tensor:
            return share.weigh(adversary.target.loss(outputs, batch))

        def backward(loss: torch.Tensor) -> None:
            learnt.append(loss.detach())
            self.accelerator.backward(loss * (share.weight * processes))

        def update() -> None:
            """Update the parameters, unless the loss or gradient is not finite, which a method may allow."""
            assert apply is not None
            self._losses[share.number] = float(torch.stack(learnt).sum())
            learnt.clear()
            apply()

        def see(seen: PassTrace) -> None:
            if seen.logits is not None:
                self._logits[share.number] = seen.logits.shape[: max(seen.logits.ndim - 1, 1)].numel() / len(
                    share.examples
                )

        try:
            report = adversary.for_part(method, share).step(
                adversary.target,
                share.batch,
                loss=loss,
                backward=backward,
                update=None if apply is None else update,
                generator=generator,
                state=adversary.state,
                trace=see if adversary.compares_rows(share) else None,
            )
        except Unusable:
            raise
        except NonFiniteError as error:  # known only to this process, which has to continue until all know
            self._losses[share.number], self._reason = math.nan, f": {error}"
            if apply is not None:
                apply()
            return math.nan
        self._losses[share.number] = float(report.loss)
        return self._losses[share.number]

    def _forget(self) -> None:
        self._agree()
        self.optimizer.zero_grad()

    def _apply(self) -> None:
        self._agree()
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such steps, by design
            raise self._unusable("norm of the gradients", norm, [*chain(*self._batches.updates.divided(self._number))])
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.adversary.averages if self.adversary is not None else ():
            average.update(self.model)

    def _agree(self) -> None:
        """Raise the error of one process in every process, before a parameter changes.

        Raises:
            Unusable: a loss is not finite.
            ConfigurationError: means over logits with unknown weights.
        """
        losses = self.total(*self._losses, *self._logits)
        losses, logits = losses[: self.parts], {rows for rows in losses[self.parts :] if rows}
        bad = [part for part, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            parts = self._batches.updates.divided(self._number)
            examples = [example for part in bad for example in parts[part]]
            raise self._unusable("loss", losses[bad[0]], examples)
        if len(logits) > 1:
            raise ConfigurationError(
                f"expected as many rows of logits for each example, got {sorted(logits)} in parts of a batch; "
                "give the adapter positions=…"
            )

    def _unusable(self, what: str, value: float, examples: list[int]) -> Unusable:
        named = f"{examples[:20]}" + (f" and {len(examples) - 20} more" if len(examples) > 20 else "")
        return Unusable(
            f"expected a finite {what} in update {self._number}, got {value} of the examples {named}{self._reason}; "
            "look at those examples, lower learning_rate, or give LoopOptions(nonfinite='skip')"
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
