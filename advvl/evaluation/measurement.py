"""The measurement of a model's robustness: scores of the same examples, clean and under every attack at every budget.

Everything that is said of a model, its curves, intervals, comparisons and pages, is computed from this one record.

Legend: N examples, R budgets, A attacks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from advvl import __version__
from advvl.checks import shown
from advvl.errors import DataError
from advvl.evaluation.statistics import accuracy_interval
from advvl.files import plain_json, write_safetensors
from advvl.perturbers.balls import L2, Ball, Linf

Budget = Mapping[str, Ball]
"""The ball in which each modality may be perturbed, by name; a modality that is not named stays clean."""

_NORMS: Final = {"L2": L2, "Linf": Linf}


@dataclass(frozen=True)
class Flag:
    """A finding that puts the measured robustness in doubt.

    Arguments:
        name: of the check, such as "random search beats gradients".
        detail: one sentence with the figures behind it.
    """

    name: str
    detail: str


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """Scores of N examples without perturbation, and the worst that each of A attacks reached at each of R budgets.

    Arguments:
        budgets: R of them, from small to large where they are of one kind.
        attacks: names of the A attacks.
        clean: `(N,)` fp64 in [0, 1], on the CPU like all others.
        scores: `(R, A, N)` fp64; NaN where an attack was not made, since the example was lost before.
        norms: modality to `(R, A, N)` fp64, the length of the perturbation that gave the score, measured on its tensor by
            the budget's ball; NaN where none was made.
        unmoved: `(R, A, N)` bool: rows that the attack did not move.
        flags: findings that put the scores in doubt.
        about: whatever else a reader needs: configuration, data, versions, seconds; plain JSON.

    Raises:
        DataError: parts that do not fit each other, or scores that are none.
    """

    budgets: tuple[Budget, ...]
    attacks: tuple[str, ...]
    clean: Tensor
    scores: Tensor
    norms: Mapping[str, Tensor]
    unmoved: Tensor
    flags: tuple[Flag, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.clean) if self.clean.ndim else 0
        shape = (len(self.budgets), len(self.attacks), count)
        shapes = {"clean": (self.clean, (count,)), "scores": (self.scores, shape), "unmoved": (self.unmoved, shape)}
        shapes |= {f"norms of {modality!r}": (norms, shape) for modality, norms in self.norms.items()}
        for name, (tensor, expected) in shapes.items():
            if tensor.shape != expected or (tensor.dtype == torch.bool) != (name == "unmoved"):
                got = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                raise _unfit(f"{name} {expected}", got)
        for name, scores in (("clean", self.clean), ("scores", self.scores[~self.scores.isnan()])):
            if not ((scores >= 0) & (scores <= 1)).all():
                raise _unfit(f"{name} in [0, 1]", f"{scores.min():g} to {scores.max():g}")
        missing = {name for budget in self.budgets for name in budget} - set(self.norms)
        if missing or not self.budgets:
            raise _unfit("budgets of modalities with norms", f"none of {sorted(missing)}" if missing else "no budget")
        names = [*self.attacks, *(text for flag in self.flags for text in (flag.name, flag.detail))]
        if not all(isinstance(name, str) for name in names) or len(set(self.attacks)) < len(self.attacks):
            raise _unfit("different names of attacks, and flags in words", shown(names))
        if not isinstance(self.about, Mapping):
            raise _unfit("about as a mapping", shown(self.about))

    def __repr__(self) -> str:
        """Tell the accuracy within each budget, in per cent with a Wilson interval, and the flags."""
        rows = [("clean", self.clean), *zip(map(name_of, self.budgets), self.worst(), strict=True)]
        lines = [f"{name}: {accuracy_interval([scores.tolist()]).percent()}" for name, scores in rows if len(scores)]
        flags = [f"flag: {flag.name}. {flag.detail}" for flag in self.flags]
        head = f"{len(self.clean)} examples, {len(self.attacks)} attacks; accuracy in per cent [95 % interval]"
        return "\n".join([head, *lines, *flags])

    def worst(self) -> Tensor:
        """The lowest score of each example within each budget, `(R, N)`, over attacks and all budgets that lie inside."""
        return torch.stack([lowest(self.clean, self.scores, self.budgets, budget) for budget in self.budgets])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file that `load` reads; it replaces what was there only when it is whole."""
        tensors = {"clean": self.clean, "scores": self.scores, "unmoved": self.unmoved}
        tensors |= {f"norms.{modality}": norms for modality, norms in self.norms.items()}
        said = {
            "budgets": [{name: _described(ball) for name, ball in budget.items()} for budget in self.budgets],
            "attacks": list(self.attacks),
            "flags": [[flag.name, flag.detail] for flag in self.flags],
            "about": dict(self.about),
        }
        return write_safetensors(path, tensors, metadata={"advvl_measurement": json.dumps(said, allow_nan=False)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Measurement:
        """Read what `save` wrote.

        Raises:
            DataError: another file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("advvl_measurement")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, since it is no mapping
        except (OSError, SafetensorError) as error:
            raise DataError(f"expected a measurement in {str(path)!r}, got {error}; give what save() wrote") from error
        if said is None:
            raise DataError(f"expected a measurement in {str(path)!r}, got other tensors; give what save() wrote")
        try:
            return cls._of(plain_json(said), tensors)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(
                f"expected a whole measurement in {str(path)!r}, got {error!r}; give what save() wrote"
            ) from error

    @classmethod
    def _of(cls, found: Any, tensors: Mapping[str, Tensor]) -> Measurement:
        return cls(
            tuple({name: _ball(one) for name, one in budget.items()} for budget in found["budgets"]),
            tuple(found["attacks"]),
            tensors["clean"],
            tensors["scores"],
            {name.removeprefix("norms."): one for name, one in tensors.items() if name.startswith("norms.")},
            tensors["unmoved"],
            tuple(Flag(*one) for one in found["flags"]),
            found["about"],
        )


def versions() -> dict[str, str]:
    """The versions that figures depend on, by package."""
    return {"advvl": __version__, "torch": str(torch.__version__)}


def _unfit(expected: str, got: str) -> DataError:
    return DataError(f"expected a measurement with {expected}, got {got}; measure it again")


def lowest(clean: Tensor, scores: Tensor, budgets: Sequence[Budget], budget: Budget) -> Tensor:
    """The lowest score `(N,)` within one of R budgets: what broke an example within a smaller one breaks it there.

    Arguments:
        clean: `(N,)`.
        scores: `(R, A, N)`; NaN where none was made.
    """
    inner = [r for r, one in enumerate(budgets) if lies_inside(one, budget)]
    return torch.fmin(clean, scores[inner].nan_to_num(nan=1.0).amin(dim=(0, 1)))


def name_of(budget: Budget) -> str:
    """Name a budget, such as "image L2 0.5 + text Linf per token 0.1"."""
    named = (f"{modality} {norm_of(ball)} {length_of(ball)}" for modality, ball in budget.items())
    return " + ".join(named) or "nothing"


def norm_of(ball: Ball) -> str:
    """Name the norm of a ball, such as "Linf per token"."""
    relative = getattr(ball, "relative", False)
    words = [type(ball).__name__, *(["per token"] if ball.per == "token" else []), *(["relative"] if relative else [])]
    return " ".join(words)


def length_of(ball: Ball) -> str:
    """Name the radius of a ball."""
    return "unlimited" if math.isinf(radius_of(ball)) else f"{radius_of(ball):g}"


def radius_of(ball: Ball) -> float:
    """The radius of a ball, in the units of its modality."""
    found: float = ball.radius  # type: ignore[attr-defined]  # of both kinds that a measurement holds
    return found


def lies_inside(inner: Budget, outer: Budget) -> bool:
    """True if every perturbation within `inner` is within `outer`: the same kinds of balls, none of them larger."""
    return all(
        name in outer
        and type(ball) is type(outer[name])
        and _described(ball) | {"radius": 0} == _described(outer[name]) | {"radius": 0}
        and _described(ball)["radius"] <= _described(outer[name])["radius"]
        for name, ball in inner.items()
    )


def _described(ball: Ball) -> dict[str, Any]:
    assert isinstance(ball, L2 | Linf)
    return {"norm": type(ball).__name__, "radius": ball.radius, "per": ball.per, "relative": ball.relative}


def _ball(said: Mapping[str, Any]) -> Ball:
    return _NORMS[said["norm"]](said["radius"], per=said["per"], relative=said["relative"])
