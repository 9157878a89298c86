"""Modality interference: what a model loses where a modality does not belong to the example, or is perturbed.

Legend: N examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapted
from advvl.checks import check_functions, check_seed, shown
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.attempts import check_eval
from advvl.evaluation.measurement import Budget, Flag
from advvl.evaluation.replacements import outputs_under, places_of, replacements
from advvl.evaluation.scoring import Batch, Score, Targets, answer_score, own_targets, targets_of
from advvl.evaluation.statistics import Interval, accuracy_interval
from advvl.evaluation.worst_case import each, worst_case
from advvl.runtime.randomness import derive_seed


@dataclass(frozen=True, eq=False)
class Interference:
    """The scores of N examples under each condition, the same examples in the same order.

    Arguments:
        scores: from "clean", "other text", "perturbed text" and so on to `(N,)` fp64 in [0, 1], on the CPU.
        flags: findings that put the scores under attack in doubt.
    """

    scores: Mapping[str, Tensor]
    flags: tuple[Flag, ...] = ()

    def accuracy(self, *, confidence: float = 0.95) -> dict[str, Interval]:
        """The mean score under each condition, with Wilson's interval over the examples."""
        return {
            name: accuracy_interval([scores.tolist()], confidence=confidence) for name, scores in self.scores.items()
        }

    def __str__(self) -> str:
        lines = [
            f"{name:<24} {100 * found.estimate:5.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
            for name, found in self.accuracy().items()
        ]
        return "\n".join([*lines, *(f"{flag.name}: {flag.detail}" for flag in self.flags)])


def modality_interference(
    model: Adapter | nn.Module,
    loader: Iterable[Batch],
    *,
    modalities: Sequence[str] | None = None,
    budget: Budget | None = None,
    targets: Targets | None = None,
    score: Score | None = None,
    seed: int = 0,
) -> Interference:
    """Score a model with each modality replaced by another example's, one at a time, or perturbed.

    Where a modality is irrelevant to the answer, a score that falls with it shows interference; where it is needed, one
    that does not fall shows that the model ignores it.

    Arguments:
        model: in eval mode, on the device of the batches; or its adapter.
        loader: batches as mappings, of two examples or more; each is given the modality of
            another one in its batch, the nearest before it with another target; of any target where there is none.
        modalities: those to replace; None: all that the adapter has.
        budget: the ball of each modality to attack as well, by itself, as `worst_case` does; None: none.
        targets, score: as `worst_case` takes them.
        seed: of all random draws.

    Raises:
        ConfigurationError: a model in training mode.
        DataError: no example; a batch of one; a modality whose rows are not those of examples, or of an example that has
            more or fewer of them than any other of its batch.
        SiteError: the adapter has no such modality.
    """
    check_functions(targets=targets, score=score)
    check_seed(seed)
    if not (modalities is None or isinstance(modalities, list | tuple)):
        raise ConfigurationError(f"expected modalities as a list of names, or None, got {shown(modalities)}")
    if not (budget is None or isinstance(budget, Mapping)):
        raise ConfigurationError(f"expected budget as a mapping from modality to ball, or None, got {shown(budget)}")
    if not isinstance(loader, Iterable):
        raise DataError(f"expected an iterable of batches, got {type(loader).__name__}; of one batch pass [batch]")
    batches = list(loader) if budget else loader
    with adapted(model) as adapter:
        check_eval(adapter.model)
        names = tuple(adapter.sites) if modalities is None else tuple(modalities)
        if not names:
            raise ConfigurationError("expected one modality to replace or more, got none; leave modalities out for all")
        adapter.check_modalities(names)
        judge = score or answer_score(adapter, targets or own_targets)

        def record(number: int, batch: Batch) -> dict[str, Tensor]:
            drawn = derive_seed(seed, "interference", number)
            clean = outputs_under(adapter, batch, {}, judge, seed=drawn)[0]
            found = {"clean": clean}
            kinds = targets_of(batch, targets or own_targets, score)
            for name in names:
                others = replacements(places_of(adapter, batch, (name,)), kinds, len(clean))
                if not others or not others[0].made.all():
                    raise DataError(
                        f"expected two examples or more in a batch, with equally many rows of {name!r}, got {len(clean)}; "
                        "give larger batches, or other modalities"
                    )
                found[f"other {name}"] = outputs_under(adapter, batch, others[0].deltas, judge, seed=drawn)[0]
            return {condition: scores.cpu() for condition, scores in found.items()}

        records = each(adapter, batches, record)
        if not records:
            raise DataError("expected one example or more to score, got none")
        scores = {condition: torch.cat([one[condition] for one in records]) for condition in records[0]}
        flags: list[Flag] = []
        for name, ball in (budget or {}).items():
            measured = worst_case(adapter, batches, {name: ball}, targets=targets, score=score, seed=seed)
            scores[f"perturbed {name}"] = measured.worst()[0]
            flags += measured.flags
        return Interference(scores, tuple(dict.fromkeys(flags)))
