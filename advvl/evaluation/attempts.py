"""Attempts: one attack on some rows of a batch within one budget, and what is left of its claims after verification.

Legend: B rows of a batch, n of them attacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs
from advvl.checks import is_whole, shown
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.measurement import Budget, lies_inside
from advvl.evaluation.named_attacks import AnyAttack, NamedAttack, PixelAttack
from advvl.evaluation.objectives import Objective, as_scores
from advvl.evaluation.pixels import search_pixels
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import Batch, Score, Targets, answer_score, checked_scores, fresh, targets_of
from advvl.evaluation.searches import Searched, search
from advvl.evaluation.verification import Untouched, Verified, verify
from advvl.ops import Box
from advvl.passes.from_clean import FromClean
from advvl.passes.objective import Loss
from advvl.perturbers.ascents import Ascent
from advvl.perturbers.balls import L2, Linf
from advvl.perturbers.pixels import Normalised
from advvl.runtime.randomness import derive_seed

Rows = Callable[[Batch, Tensor], Batch]


@dataclass(frozen=True)
class Attempt:
    """The outcome of an attack on n examples.

    Arguments:
        scores: `(n,)` fp64, verified.
        lengths: modality to `(n,)` fp64, of the perturbations that gave the scores.
        losses: `(n,)` fp64, the highest that the attack saw.
        still: modality to the examples `(n,)`, bool, that no gradient moved.
        nonfinite: `(n,)` bool, those with a gradient that was not finite.
        by_gradients: whether it asked for gradients.
    """

    scores: Tensor
    lengths: Mapping[str, Tensor]
    losses: Tensor
    still: Mapping[str, Tensor]
    nonfinite: Tensor
    by_gradients: bool


@dataclass(frozen=True)
class Plan:
    """The way batches are attacked and judged: the arguments of `worst_case`."""

    adapter: Adapter
    budgets: tuple[Budget, ...]
    attacks: tuple[AnyAttack, ...]
    targets: Targets
    score: Score | None
    rows: Rows | None
    boxes: Mapping[str, Box]
    pixels: Mapping[str, Normalised]
    draws: int
    seed: int

    def __post_init__(self) -> None:
        if not is_whole(self.seed) or self.seed < 0:
            raise ConfigurationError(f"expected seed to be a whole number of 0 or more, got {shown(self.seed)}")
        if not is_whole(self.draws) or not 1 <= self.draws <= 10_000:
            raise ConfigurationError(f"expected draws to be a whole number from 1 to 10000, got {shown(self.draws)}")
        for adapter in (self.adapter, *(attack.surrogate for attack in self.attacks)):
            if adapter is not None:
                check_eval(adapter.model)
        check_bounds(self.adapter, boxes=self.boxes, pixels=self.pixels)
        for attack in self.attacks:
            for budget in self.budgets:
                attack.ascents(budget, 0, self.boxes, self.pixels)  # refuses what does not go together

    def scored(self, adapter: Adapter) -> Score:
        """The score by which answers of a model are judged, the evaluated one or a surrogate."""
        return self.score or answer_score(adapter, self.targets)

    def clean(self, batch: Batch, number: int) -> Tensor:
        """The score of each example of a batch without perturbation, `(B,)` fp64."""
        score, found = self.scored(self.adapter), []
        for draw in range(self.draws):
            with fresh(self.adapter.model, derive_seed(self.seed, "clean", number, draw)), self.adapter.clean():
                found.append(checked_scores(score(self.adapter.forward(batch), batch)))
        return torch.stack(found).mean(dim=0)

    def attempt(
        self,
        attack: AnyAttack,
        batch: Batch,
        left: Tensor,
        budget: Budget,
        restart: int,
        purpose: tuple[str | int, ...],
    ) -> Attempt:
        """Make an attack on some rows of a batch, and verify what it found.

        Arguments:
            left: the rows `(n,)`.
            restart: its number.
            purpose: tells its random draws from those of any other attempt.

        Raises:
            DataError: `rows` that gives others than asked for.
            ConfigurationError: an attack that leaves its ball, box or mask, or changes the model.
        """
        part = batch if self.rows is None else cut(self.rows, batch, left, self.targets, self.score)
        made_on, seed = attack.surrogate or self.adapter, derive_seed(self.seed, *purpose)
        ascents = attack.ascents(budget, restart, self.boxes, self.pixels)
        untouched = [Untouched(one.model) for one in (self.adapter, attack.surrogate) if one is not None]
        found = searched(
            attack, made_on, part, ascents, self.targets, self.scored(made_on), rows=self.rows or take_rows, seed=seed
        )
        for model in untouched:
            model.check(attack.name)
        if self.rows is not None and len(found.seen) != len(left):
            raise DataError(
                f"expected rows to give the {len(left)} rows asked for, got {len(found.seen)}; cut each field"
            )

        def tried(deltas: Mapping[str, Tensor]) -> Verified:
            judge = self.scored(self.adapter)
            return verify(self.adapter, part, ascents, deltas, judge, name=attack.name, seed=seed + 1, draws=self.draws)

        verified = tried(found.ended)
        if (found.seen < verified.scores).any():
            verified = verified.or_lower(tried(found.worst))
        here = left if self.rows is None else torch.arange(len(left), device=left.device)
        none = torch.zeros_like(found.seen, dtype=torch.bool)
        return Attempt(
            verified.scores[here],
            {modality: lengths[here] for modality, lengths in verified.lengths.items()},
            found.losses[here],
            {modality: found.unmoved.get(modality, none)[here] for modality in budget},
            torch.stack([none, *found.nonfinite.values()]).any(dim=0)[here],
            found.by_gradients,
        )


def cut(rows: Rows, batch: Batch, numbers: Tensor, targets: Targets, score: Score | None = None) -> Batch:
    """The batch of the rows `(n,)` asked for.

    Raises:
        DataError: other rows, or these in another order, as far as their targets tell.
    """
    part = rows(batch, numbers)
    asked, found = targets_of(batch, targets, score), targets_of(part, targets, score)
    if asked is None or found is None or len(asked) <= int(numbers.max()):
        return part
    asked = asked[numbers.to(asked.device)]
    if asked.shape == found.shape and not torch.equal(asked, found.to(asked.device)):
        raise DataError(
            "expected rows to give the rows asked for, in that order, got others' targets; take value[numbers] of each field"
        )
    return part


def check_answers(adapter: Adapter, rows: Rows, batch: Batch, count: int, targets: Targets) -> None:
    """Raise DataError where fewer of the batch's `count` examples have fewer answers: `rows` cut what belongs to all.

    Class prompts are cut like examples where there happen to be as many.
    """
    if count < 2:
        return
    part = cut(rows, batch, torch.arange(count - 1), targets)
    with fresh(adapter.model, seed=0), adapter.clean():
        whole, some = (adapter.logits(adapter.forward(one)).shape[1:] for one in (batch, part))
    if whole != some:
        raise DataError(
            f"expected answers {tuple(whole)} for the examples that rows takes, got {tuple(some)}; "
            "name the fields of all: partial(take_rows, whole=(…))"
        )


def searched(
    attack: AnyAttack,
    adapter: Adapter,
    batch: Batch,
    ascents: Mapping[str, Ascent],
    targets: Targets,
    score: Score,
    *,
    rows: Rows = take_rows,
    seed: int,
) -> Searched:
    """Make an attack on a batch, by the maximiser that it names or by the one that it brings."""
    if isinstance(attack, PixelAttack):
        return search_pixels(adapter, batch, attack, ascents[attack.modality], targets, score, rows=rows, seed=seed)
    return search(adapter, batch, ascents, attack.maximizer, loss_of(attack, adapter, targets), score, seed=seed)


def loss_of(attack: NamedAttack, adapter: Adapter, targets: Targets) -> Loss | FromClean:
    """The loss that an attack climbs on a model."""
    if attack.loss is not None:
        return attack.loss
    return adapter.loss if attack.objective is None else objective_loss(adapter, attack.objective, targets)


def objective_loss(adapter: Adapter, objective: Objective, targets: Targets) -> Loss:
    """The loss that an objective is of a model's logits and a batch's targets, one per row `(B,)`."""

    def climbed(outputs: Outputs, batch: Batch) -> Tensor:
        logits = adapter.logits(outputs)
        return objective(logits, as_scores(targets(batch), logits))

    return climbed


def checked_attacks(attacks: Sequence[AnyAttack]) -> tuple[AnyAttack, ...]:
    """The attacks of an evaluation.

    Raises:
        ConfigurationError: none, something else, or two of one name.
    """
    given: object = attacks
    if not isinstance(given, list | tuple) or not given or not all(isinstance(one, AnyAttack) for one in given):
        raise ConfigurationError(f"expected attacks as a list of one NamedAttack(…) or more, got {shown(given)}")
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"expected attacks of different names, got {names}; name each for what it does")
    return tuple(attacks)


def checked_budgets(budgets: Budget | Sequence[Budget], adapter: Adapter) -> tuple[Budget, ...]:
    """The budgets of an evaluation, a single one as a tuple of one.

    Raises:
        ConfigurationError: anything but balls of finite radii above 0 by modality; a ball relative to the batch, whose size
            would change with the number of examples in it; a budget that lies in an earlier one.
        SiteError: a modality that the adapter lacks.
    """
    found: object = (budgets,) if isinstance(budgets, Mapping) else budgets
    if not isinstance(found, list | tuple) or not found:
        raise ConfigurationError(f"expected budgets as mappings from modality to ball, got {shown(budgets)}")
    for budget in found:
        if not isinstance(budget, Mapping) or not budget or not all(map(_is_bounded, budget.values())):
            raise ConfigurationError(
                f"expected a ball of a finite radius above 0 for each modality, got {shown(budget)}; "
                'as in {"image": L2(0.5)}'
            )
        if any(ball.relative == "batch" for ball in budget.values()):
            raise ConfigurationError(
                f"expected balls that do not depend on the batch, got {shown(budget)}; use relative='row', or absolute radii"
            )
        adapter.check_modalities(budget)
    for i, outer in enumerate(found):
        for inner in found[i + 1 :]:
            if lies_inside(inner, outer):
                raise ConfigurationError(
                    f"expected budgets from small to large, each once, got {shown(outer)} before {shown(inner)}; sort them"
                )
    return tuple(dict(budget) for budget in found)


def check_bounds(adapter: Adapter, *, boxes: object, pixels: object = None) -> None:
    """Check boxes and normalisations by modality, also of modalities that no budget names.

    Raises:
        ConfigurationError: anything but mappings from modality to (low, high), and to `Normalised`.
        SiteError: a modality that the adapter lacks.
    """
    for name, given in (("box", boxes), ("pixels", pixels)):
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"expected a mapping from modality to {name}, got {shown(given)}")
        adapter.check_modalities(given)
        for one in given.values():
            Ascent(L2(), step_size=1.0, **{name: one})


def _is_bounded(ball: object) -> bool:
    return isinstance(ball, L2 | Linf) and 0 < ball.radius < math.inf


def check_eval(model: nn.Module) -> None:
    """Raise ConfigurationError for a model in training mode: its dropout would pass for robustness."""
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ConfigurationError(
            f"expected a model in eval mode, got {len(training)} modules in training mode, {training[0]!r} first; "
            "call model.eval()"
        )
