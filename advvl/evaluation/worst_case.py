"""The worst case: the lowest score of each example over attacks, restarts and budgets, verified, with doubts said aloud.

An attack proposes perturbations; what counts is measured afterwards. Each is held against its ball, box and mask, and
scored in a fresh forward. An example that is lost is not attacked again, except by the first attack at every budget,
whose own curve shows whether more room made it better, as it should.

Legend: N examples, B rows of a batch, R budgets, A attacks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter
from advvl.adapters.registry import adapted
from advvl.checks import check_functions, shown
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.attempts import Plan, Rows, check_answers, checked_attacks, checked_budgets
from advvl.evaluation.doubts import doubts
from advvl.evaluation.flags import made, raised
from advvl.evaluation.measurement import Budget, Measurement, lowest, versions
from advvl.evaluation.named_attacks import DEFAULT, AnyAttack, in_order
from advvl.evaluation.scoring import Batch, Score, Targets, fingerprints, own_targets
from advvl.ops import Box
from advvl.perturbers.pixels import Normalised
from advvl.runtime.descriptions import described
from advvl.runtime.processes import collected, process_count, process_index
from advvl.runtime.reductions import check_alone

Record = Mapping[str, Tensor]
"""The record of one batch: tensors by name, on the CPU, whose last axis is the batch's examples."""

Cache = Callable[[int, Callable[[], Record]], Record]
T = TypeVar("T")


def worst_case(
    model: Adapter | nn.Module,
    loader: Iterable[Batch],
    budgets: Budget | Sequence[Budget],
    *,
    attacks: Sequence[AnyAttack] = DEFAULT,
    targets: Targets | None = None,
    score: Score | None = None,
    rows: Rows | None = None,
    boxes: Mapping[str, Box] | None = None,
    pixels: Mapping[str, Normalised] | None = None,
    draws: int = 1,
    seed: int = 0,
    checks: bool = True,
    cache: Cache | None = None,
    over_processes: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Measurement:
    """Attack every example within each budget and keep the worst.

        measured = worst_case(model, loader, [{"image": L2(0.5)}, {"image": L2(1.0)}])
        print(measured.worst().mean(dim=1), measured.flags)

    The model is left as found, with its gradients, buffers and the global random state.

    Arguments:
        model: in eval mode, on the device of the batches; or its adapter.
        loader: batches as mappings; the same in the same order give the same measurement. Random draws go by the number of
            a batch and of a row: in other batches an example has other random starts.
        budgets: a ball for each modality that may be perturbed, or a list of such mappings, small before large; one of
            several modalities gives each its whole ball at the same time.
        attacks: `NamedAttack` and `PixelAttack` in any order; those by the model's own gradients are made first, then those
            on another model, then searches without gradients.
        targets: from a batch to its soft scores `(B, A)` in [0, 1], or class ids `(B,)`, whole numbers; default: its field
            `targets`.
        score: from outputs and batch to `(B,)` in [0, 1], what attacks try to take away; default: the targets' score of
            the model's answer.
        rows: from a batch and numbers of rows `(n,)` to the batch of those, such as `rows.take_rows`: lost examples are
            then no longer run.
        boxes: bounds (low, high) of the perturbed tensor by modality, such as (0, 1) for pixels.
        pixels: the normalisation behind the tensor by modality; its ball and box are then in pixels.
        draws: forwards whose mean is the score of an example, for a model that draws numbers.
        seed: of all random draws.
        checks: make the passes that flags need beyond the attacks.
        cache: from the number of a batch and the function that attacks it to its record; it may keep records in files.
        over_processes: every process is given the same batches, attacks each n-th of them, and gets the whole.
        about: what else a reader needs, plain JSON. The measurement's `about` has it beside the attacks, versions, checks
            and `seconds`, the time of all batches, whichever call or process attacked them; `chance`, the accuracy of the
            best constant answer, is drawn on pages.

    Raises:
        ConfigurationError: a model in training mode; budgets that are none, out of order, or relative to their batch; boxes
            or pixels that are none; an `about` that is no JSON; an attack that leaves its ball, its box or its mask, or
            changes the model.
        DataError: no example; targets or scores that are not in [0, 1]; `rows` that gives others, or a `cache` that does.
        SiteError: the adapter has no such modality, in budgets, boxes or pixels.
    """
    check_functions(targets=targets, score=score, rows=rows, cache=cache)
    for name, said in (("checks", checks), ("over_processes", over_processes)):
        if not isinstance(said, bool):
            raise ConfigurationError(f"expected {name} to be True or False, got {shown(said)}")
    _check_about(about)
    with adapted(model) as adapter:
        plan = Plan(
            adapter,
            checked_budgets(budgets, adapter),
            checked_attacks(attacks),
            targets or own_targets,
            score,
            rows,
            {} if boxes is None else boxes,
            {} if pixels is None else pixels,
            draws,
            seed,
        )

        def made_of(number: int, batch: Batch) -> Record:
            began = time.monotonic()
            found = {name: one.cpu().clone() for name, one in _record(plan, number, batch, checks=checks).items()}
            # shared out over the examples, since the last axis of all is theirs; cloned: a file takes no tensor twice
            return found | {"seconds": torch.full_like(found["clean"], time.monotonic() - began) / len(found["clean"])}

        def record(number: int, batch: Batch) -> Record:
            if cache is None:
                return made_of(number, batch)
            kept = cache(number, partial(made_of, number, batch))
            _check_kept(kept, plan, number, batch, checks=checks)
            return kept

        records = each(adapter, loader, record, over_processes=over_processes)
    if not any(len(one["clean"]) for one in records):
        raise DataError("expected one example or more to attack, got none")
    found = {name: torch.cat([one[name] for one in records], dim=-1) for name in records[0]}
    names = tuple(attack.name for attack in plan.attacks)
    return Measurement(
        plan.budgets,
        names,
        found["clean"],
        found["scores"],
        {name.removeprefix("norms."): one for name, one in found.items() if name.startswith("norms.")},
        found["unmoved"],
        raised(found, plan.budgets, plan.attacks),
        {**_facts(plan, found), "seconds": float(found["seconds"].sum()), **(about or {})},
    )


def _check_about(about: object) -> None:
    """Raise ConfigurationError for anything but a mapping of plain JSON, or None."""
    if not (about is None or isinstance(about, Mapping)):
        raise ConfigurationError(f"expected about as a mapping, or None, got {shown(about)}")
    try:
        json.dumps(dict(about or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"expected about as plain JSON, to be saved, got {shown(about)}: {error}") from error


def _facts(plan: Plan, found: Record) -> dict[str, Any]:
    """Say how a measurement was made, in plain JSON."""
    return {
        "attacks": [_described(attack) for attack in plan.attacks],
        "boxes": {name: list(box) for name, box in plan.boxes.items()},
        "pixels": {name: described(normalised) for name, normalised in plan.pixels.items()},
        "seed": plan.seed,
        "draws": plan.draws,
        "data_fingerprint": hashlib.sha256(found["fingerprint"].numpy().tobytes()).hexdigest()[:16],
        "checks": made(found, plan.budgets, plan.attacks),
        "versions": versions(),
    }


def each(
    adapter: Adapter,
    loader: Iterable[Batch],
    record: Callable[[int, Batch], T],
    *,
    over_processes: bool = False,
) -> list[T]:
    """The record of every batch, in order: of this process's own, or of what all processes made of their shares.

    Arguments:
        record: from a batch's number and the batch.

    Raises:
        DataError: something else than batches.
        ConfigurationError: over processes, a wrapped model.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | Mapping):
        raise DataError(f"expected an iterable of batches, got {type(loader).__name__}; of one batch pass [batch]")
    count, index = (process_count(), process_index()) if over_processes else (1, 0)
    if over_processes:
        check_alone(adapter.model)
    mine = {}
    for number, batch in enumerate(loader):
        if not isinstance(batch, Mapping):
            raise DataError(f"expected batches as mappings from field to value, got {type(batch).__name__}")
        if number % count == index:
            mine[number] = record(number, batch)
    return list(collected(mine).values()) if over_processes else list(mine.values())


def _check_kept(kept: object, plan: Plan, number: int, batch: Batch, *, checks: bool) -> None:
    """Raise DataError for the record of other examples, or of another evaluation, as far as it shows."""
    found = kept if isinstance(kept, Mapping) else {}
    fields = [found.get(name) for name in ("clean", "fingerprint", "scores")]
    clean, fingerprint, scores = (one if isinstance(one, Tensor) else torch.empty(()) for one in fields)
    count = len(clean) if clean.ndim else 0
    shape = (len(plan.budgets), len(plan.attacks), count)
    alike = scores.shape == shape and checks == ("coupled" in found) and "seconds" in found
    if not alike or not torch.equal(fingerprint, fingerprints(batch, count)):
        raise DataError(
            f"expected the record of batch {number} from the cache, got one of other examples or settings; "
            "remove what it keeps"
        )


def _described(attack: AnyAttack) -> str:
    """An attack with its settings, of another model its kind and its sites alone."""
    alone = described(replace(attack, surrogate=None))
    return alone if attack.surrogate is None else alone.replace("surrogate=None", f"surrogate={attack.surrogate!r}")


def _record(plan: Plan, number: int, batch: Batch, *, checks: bool) -> Record:
    """Attack one batch within every budget."""
    clean = plan.clean(batch, number)
    if plan.rows is not None and plan.score is None:
        check_answers(plan.adapter, plan.rows, batch, len(clean), plan.targets)
    shape = (len(plan.budgets), len(plan.attacks), len(clean))
    modalities = dict.fromkeys(name for budget in plan.budgets for name in budget)
    scores, losses, *norms = (clean.new_full(shape, torch.nan) for _ in range(2 + len(modalities)))
    nonfinite, *still = (torch.zeros(shape, dtype=torch.bool, device=clean.device) for _ in range(1 + len(modalities)))
    found = {"scores": scores, "losses": losses, "nonfinite": nonfinite}
    found |= {f"norms.{name}": one for name, one in zip(modalities, norms, strict=True)}
    found |= {f"still.{name}": one for name, one in zip(modalities, still, strict=True)}
    by_gradients = torch.zeros(shape[1:], dtype=torch.bool, device=clean.device)
    own_scores, own_losses = (clean.new_full((shape[0], shape[2]), torch.nan) for _ in range(2))
    order = in_order(plan.attacks)
    attempts = [
        (r, a, restart) for r in range(len(plan.budgets)) for a in order for restart in range(plan.attacks[a].restarts)
    ]
    for r, a, restart in attempts:
        own_curve = checks and a == order[0] and restart == 0
        left = (clean if own_curve else lowest(clean, scores, plan.budgets, plan.budgets[r])).nonzero().squeeze(1)
        if not len(left):
            continue
        name = plan.attacks[a].name
        one = plan.attempt(plan.attacks[a], batch, left, plan.budgets[r], restart, (name, number, r, restart))
        if own_curve:
            own_scores[r, left], own_losses[r, left] = one.scores, one.losses
        first = scores[r, a, left].isnan()
        lower = first | (one.scores < scores[r, a, left])
        scores[r, a, left] = torch.where(lower, one.scores, scores[r, a, left])
        losses[r, a, left] = torch.fmax(losses[r, a, left], one.losses)
        nonfinite[r, a, left] |= one.nonfinite
        by_gradients[a] |= one.by_gradients
        for modality in plan.budgets[r]:
            length, stuck = found[f"norms.{modality}"], found[f"still.{modality}"]
            length[r, a, left] = torch.where(lower, one.lengths[modality], length[r, a, left])
            stuck[r, a, left] = one.still[modality] & (stuck[r, a, left] | first)
    unmoved = ~scores.isnan()
    for r, budget in enumerate(plan.budgets):
        unmoved[r] &= torch.stack([found[f"still.{modality}"][r] for modality in budget]).all(dim=0)
    found |= {"clean": clean, "unmoved": unmoved, "by_gradients": by_gradients}
    found["fingerprint"] = fingerprints(batch, len(clean))
    if not checks:
        return found
    own = [a for a, attack in enumerate(plan.attacks) if by_gradients[a].any() and attack.surrogate is None]
    found |= {"own_scores": own_scores, "own_losses": own_losses}
    if own:
        worst = torch.stack([lowest(clean, scores[:, own], plan.budgets, budget) for budget in plan.budgets])
    else:
        worst = clean.expand(len(plan.budgets), -1)
    return found | doubts(plan, batch, number, clean, worst, [plan.attacks[a] for a in own])
