"""Flags: signs that a measured robustness is not what it looks like, each with the figures behind it.

Legend: N examples.

Source: the checks of Athalye et al., ICML 2018, Carlini et al., arXiv 1902.06705, and of AutoAttack (Croce & Hein, ICML
2020); docs/evaluation.md says of each what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from advvl.evaluation.looks import SKIPPED, Skip
from advvl.evaluation.measurement import Budget, Flag, lies_inside, lowest, name_of
from advvl.evaluation.named_attacks import AnyAttack, in_order, is_search

Found = Mapping[str, Tensor]


def raised(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> tuple[Flag, ...]:
    """The flags that the records of all batches raise.

    Arguments:
        found: tensors by name, their last axis the N examples.
    """
    if not len(found["clean"]):
        return ()
    checks = (_random, _coupled, _nonfinite, _vanishing, _unmoved, _loss, _accuracy, _beaten, _unlimited_holds)
    return tuple(flag for check in checks for flag in check(found, budgets, attacks))


def made(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> dict[str, str]:
    """Say of each check, by the name of its flag, "made", or why it was not, on which of the examples.

    A flag that was not raised speaks for a measurement only where its check was made.
    """
    asks = found["by_gradients"].any(dim=1).tolist()
    tried = (~found["scores"].isnan()).any(dim=0).any(dim=1).tolist()
    order = in_order(attacks)
    own = [a for a in order if asks[a] and attacks[a].surrogate is None]
    early = order[: order.index(own[0])] if own else []  # what they broke, no gradients tried
    first = "" if asks[order[0]] else f"{attacks[order[0]].name}, the first attack, asked for no gradients"
    gradients = "" if any(asks) else "no attack asked for gradients"
    passes = "" if "varies" in found else "checks=False leaves it out"
    nested = "" if any(True for _ in _chains(budgets)) else "no budget lies inside another of its kind"
    others = [a for a in order if a not in own]
    searches, transfers = (
        _compared(kind, attacks, others, tried, early) if own else "no attack by the model's own gradients was made"
        for kind in ("random search", "transfer attack")
    )
    coupled, depends, unlimited = (
        _skipped(found, f"skipped.{check}.") for check in ("coupled", "depends", "unlimited")
    )
    why = {
        "random outputs": passes,
        "coupled examples": passes or coupled,
        "gradients not finite": gradients,
        "vanishing gradients": gradients or passes or depends,
        "unmoved examples": gradients or passes or depends,
        "loss not rising with radius": gradients or first or passes or nested or depends,
        "accuracy rising with radius": passes or nested,
        "random search beats gradients": searches,
        "transfer attack beats gradients": transfers,
        "unlimited attack fails": passes or unlimited,
    }
    return {check: f"not made: {reason}" if reason else "made" for check, reason in why.items()}


def _compared(
    kind: str, attacks: Sequence[AnyAttack], others: Sequence[int], tried: Sequence[bool], early: Sequence[int]
) -> str:
    """Say why no attack of a kind can be compared with those by the model's own gradients; empty where one can."""
    of_kind = [a for a in others if (attacks[a].surrogate is not None) == (kind == "transfer attack")]
    done = [a for a in of_kind if tried[a]]
    waiting = [attacks[a].name for a in of_kind if attacks[a].surrogate is not None or is_search(attacks[a])]
    if not done:
        return f"no example was left for {waiting[0]}" if waiting else f"no {kind} was made"
    return next((f"{attacks[a].name} was made before the attacks by gradients" for a in done if a in early), "")


def _skipped(found: Found, prefix: str) -> str:
    """The reasons why a check was not made on some examples, of each set of modalities."""
    reasons = []
    for name, numbers in found.items():
        if name.startswith(prefix):
            for number in sorted(set(numbers.tolist()) - {0}):
                count = int((numbers == number).sum())
                reasons.append(
                    f"{name.removeprefix(prefix)} on {count} of {len(numbers)} examples, {SKIPPED[Skip(number)]}"
                )
    return "; ".join(reasons)


Flags = Iterator[Flag]


def _many(count: float, of: int) -> bool:
    """True if so many of the examples are more than luck."""
    return count > max(1.0, 0.02 * of)


def _random(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    varies = found.get("varies")
    if varies is not None and varies.any():
        yield Flag(
            "random outputs",
            f"Two clean forwards differ on {int(varies.sum())} of {len(varies)} examples: one draw says little of a model "
            "that draws, and attacks by one draw's gradients are weak.",
        )


def _coupled(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    coupled = found.get("coupled")
    if coupled is not None and coupled.any():
        yield Flag(
            "coupled examples",
            f"The outputs of {int(coupled.sum())} of {len(coupled)} examples change with other examples of their batch: "
            "the accuracy depends on which examples share one.",
        )


def _nonfinite(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    for a, attack in enumerate(attacks):
        rows = found["nonfinite"][:, a].any(dim=0)
        if rows.any():
            yield Flag(
                "gradients not finite",
                f"{attack.name} met gradients that are not finite on {int(rows.sum())} of {_right(found)} examples.",
            )


def _vanishing(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    """Zero gradients say nothing where a model ignores the modality, and a lot where it does not."""
    for a, attack in enumerate(attacks):
        for modality in dict.fromkeys(name for budget in budgets for name in budget):
            if (depends := found.get(f"depends.{modality}")) is None:
                continue
            made = ~found["scores"][:, a].isnan() & depends
            still = found[f"still.{modality}"][:, a] & made
            shares = still.sum(dim=1) / made.sum(dim=1).clamp(min=1)
            r = int(shares.argmax())
            if shares[r] > 0.05:
                yield Flag(
                    "vanishing gradients",
                    f"{attack.name} found no gradient of {modality!r} on {int(still[r].sum())} of {int(made[r].sum())} "
                    "examples whose outputs do change with it.",
                )


def _unmoved(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    if not any(name.startswith("depends.") for name in found):
        return
    for r, budget in enumerate(budgets):
        depends = torch.stack([found[f"depends.{modality}"] for modality in budget]).any(dim=0)
        made = ~found["scores"][r].isnan() & found["by_gradients"]
        holds = lowest(found["clean"], found["scores"], budgets, budget) > 0
        stuck = made.any(dim=0) & (found["unmoved"][r] | ~made).all(dim=0) & depends & holds
        if stuck.any():
            yield Flag(
                "unmoved examples",
                f"No attack by gradients moved {int(stuck.sum())} of {_right(found)} examples within {name_of(budget)}.",
            )


def _loss(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    first = in_order(attacks)[0]
    if "own_losses" not in found or not found["by_gradients"][first].any():
        return
    for i, j in _chains(budgets):
        small, large = found["own_losses"][i], found["own_losses"][j]
        depends = torch.stack([found[f"depends.{modality}"] for modality in budgets[j]]).any(dim=0)
        rows = ~small.isnan() & ~large.isnan() & (found["own_scores"][i] > 0) & depends
        flat = rows & (large <= small)
        if flat.sum() > max(1.0, 0.75 * int(rows.sum())):
            yield Flag(
                "loss not rising with radius",
                f"The loss of {attacks[first].name} is no higher within {name_of(budgets[j])} than within "
                f"{name_of(budgets[i])} on {int(flat.sum())} of {int(rows.sum())} examples.",
            )


def _accuracy(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    if "own_scores" not in found:
        return
    first = in_order(attacks)[0]
    for i, j in _chains(budgets):
        rows = ~found["own_scores"][[i, j]].isnan().any(dim=0)
        small, large = (float(found["own_scores"][r][rows].sum()) for r in (i, j))
        if _many(large - small, _right(found)):
            yield Flag(
                "accuracy rising with radius",
                f"{attacks[first].name} leaves {large:g} of {int(rows.sum())} examples right within "
                f"{name_of(budgets[j])}, and {small:g} within {name_of(budgets[i])}.",
            )


def _beaten(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    """Gradients know more than random draws and other models do; where these find more, the gradients mislead."""
    asks = found["by_gradients"].any(dim=1)
    white = [a for a, attack in enumerate(attacks) if asks[a] and attack.surrogate is None]
    if not white:
        return
    for a, attack in enumerate(attacks):
        if a in white:
            continue
        kind = "random search" if attack.surrogate is None else "transfer attack"
        for r, budget in enumerate(budgets):
            inner = [i for i, one in enumerate(budgets) if lies_inside(one, budget)]
            by_white = found["scores"][inner][:, white].flatten(0, 1)
            tried = ~by_white.isnan().all(dim=0)
            beaten = tried & (
                found["scores"][r, a] < lowest(found["clean"], found["scores"][:, white], budgets, budget)
            )
            if _many(int(beaten.sum()), _right(found)):
                yield Flag(
                    f"{kind} beats gradients",
                    f"{attack.name} broke {int(beaten.sum())} of {_right(found)} examples within {name_of(budget)} that no "
                    "attack by the model's own gradients broke.",
                )


def _unlimited_holds(found: Found, budgets: Sequence[Budget], attacks: Sequence[AnyAttack]) -> Flags:
    for name in [name.removeprefix("unlimited.") for name in found if name.startswith("unlimited.")]:
        floor, reached = found[f"blind.{name}"], found[f"unlimited.{name}"]
        rows = ~floor.isnan()
        left, least = float(reached[rows].sum()), float(floor[rows].sum())
        if _many(left - least, _right(found)):
            yield Flag(
                "unlimited attack fails",
                f"Without a limit on {name}, attacks by gradients leave {left:g} of {int(rows.sum())} examples right, where "
                f"{least:g} should be: others' in their place.",
            )


def _chains(budgets: Sequence[Budget]) -> Iterator[tuple[int, int]]:
    """For each largest budget, the smallest that lies inside and itself."""
    for j, outer in enumerate(budgets):
        inner = [i for i, one in enumerate(budgets) if i != j and lies_inside(one, outer) and set(one) == set(outer)]
        if inner and not any(
            i != j and lies_inside(outer, one) and set(one) == set(outer) for i, one in enumerate(budgets)
        ):
            yield inner[0], j


def _right(found: Found) -> int:
    return int((found["clean"] > 0).sum())
