"""Options of `advvl evaluate`: those of training, and the attacks and radii that measure robustness."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from advvl.adapters.base import Adapter
from advvl.checks import at_least, check_each, text
from advvl.errors import ConfigurationError
from advvl.evaluation.measurement import Budget
from advvl.evaluation.named_attacks import NamedAttack
from advvl.evaluation.objectives import dlr, margin
from advvl.experiments.database_options import are_names
from advvl.experiments.options import own
from advvl.experiments.train_options import TrainOptions
from advvl.maximizers.auto_pgd import AutoPGD
from advvl.maximizers.minimum_norm import MinimumNorm
from advvl.maximizers.pgd import PGD
from advvl.maximizers.random_search import RandomSearch
from advvl.perturbers.balls import L2, Ball, Linf

ATTACKS: Final = ("pgd", "pgd-margin", "auto-pgd", "auto-pgd-dlr", "fmn", "transfer", "random")
"""The names of `--attack`, in the order in which they are made: those by gradients first."""

_BALLS: Final[Mapping[str, type[L2 | Linf]]] = {"L2": L2, "Linf": Linf}
_PART: Final = re.compile(r"(\w+)=(L2|Linf)(/token)?:([\d.eE,-]+)")
_FORM: Final = "MODALITY=NORM:R1,R2, such as image=L2:0.5,1"


def budgets_of(text: str) -> list[Budget]:
    """Return the budgets of one `--radius`, such as "image=L2:0.5,1" or, jointly, "image=L2:0.5,1+text=Linf/token:0.1,0.2".

    Raises:
        ValueError: another form, radii that do not rise, or another number of them for each modality.
    """
    found: dict[str, list[Ball]] = {}
    for part in text.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None or match[1] in found:
            raise ValueError(text)
        radii = [float(radius) for radius in match[4].split(",")]
        if radii != sorted(set(radii)) or radii[0] <= 0 or radii[-1] == math.inf:
            raise ValueError(text)
        found[match[1]] = [_BALLS[match[2]](radius, per="token" if match[3] else "sample") for radius in radii]
    if len({len(balls) for balls in found.values()}) != 1:
        raise ValueError(text)
    return [dict(zip(found, balls, strict=True)) for balls in zip(*found.values(), strict=True)]


def _kept(text: str) -> list[str]:
    """Check one `--radius`, and keep its text."""
    budgets_of(text)
    return [text]


@dataclass(frozen=True, kw_only=True)
class RobustnessOptions:
    """The measurement of robustness by `advvl evaluate`; without an attack, clean scores are taken.

    Raises:
        ConfigurationError: attacks without radii or radii without attacks; unknown attacks.
    """

    attack: tuple[str, ...] = field(
        default=(), metadata={"help": f"attacks, of {', '.join(ATTACKS)}; their worst counts", "flags": ("--attack",)}
    )
    radius: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "radii of a modality, or of several jointly with + between; L2/token: of each position by itself",
            "flags": ("--radius",),
            "parse": _kept,
            "metavar": "MODALITY=NORM:R1,R2",
            "wanted": _FORM,
        },
    )
    checkpoints: tuple[str, ...] = field(
        default=(), metadata={"help": "several files of weights to compare", "flags": ("--checkpoints",)}
    )
    surrogate: str | None = field(
        default=None,
        metadata={
            "help": "file of weights of the same task and sizes that transfer attacks are made on",
            "flags": ("--surrogate",),
            "metavar": "FILE",
        },
    )
    steps: int = field(
        default=20,
        metadata={"help": "of each attack by gradients; a random one has as many points in all"},
    )
    restarts: int = field(default=3, metadata={"help": "of each attack by gradients"})
    examples: int | None = field(default=None, metadata={"help": "how many examples are attacked; None: all"})
    drawn: int = field(default=8, metadata={"help": "most damaging examples that the page shows of each model"})
    report: str = field(
        default="robustness", metadata=own("folder of measurements and page, in the output directory unless absolute")
    )

    def __post_init__(self) -> None:
        names = ("attack", "radius", "checkpoints")
        check_each(self, names, are_names, "a list of texts")
        at_least(1, self, "steps", "restarts", "drawn", *(() if self.examples is None else ("examples",)))
        text(self, "report")
        unknown = [name for name in self.attack if name not in ATTACKS]
        if unknown or len(set(self.attack)) < len(self.attack):
            raise ConfigurationError(
                f"expected attacks of {', '.join(ATTACKS)}, each once, got {', '.join(self.attack)}"
            )
        if bool(self.attack) != bool(self.radius):
            raise ConfigurationError(
                f"expected attacks and radii, got {list(self.attack)} and {list(self.radius)}; give --attack and --radius"
            )
        if ("transfer" in self.attack) != (self.surrogate is not None):
            raise ConfigurationError(
                f"expected a surrogate with the attack transfer and no other, got {self.surrogate!r} and "
                f"{', '.join(self.attack) or 'no attack'}; give both or neither"
            )
        _ = self.budgets

    @property
    def budgets(self) -> list[Budget]:
        """The budgets of all radii, those of one modality first, since they lie inside those of several."""
        found: list[Budget] = []
        for given in self.radius:
            try:
                found += budgets_of(given)
            except ValueError as error:
                raise ConfigurationError(
                    f"expected a radius as {_FORM} that rise, got {given!r}; see --help"
                ) from error
        return sorted(found, key=len)

    def attacks(self, surrogate: Adapter | None) -> tuple[NamedAttack, ...]:
        """Return the attacks that are made.

        Arguments:
            surrogate: the model of transfer attacks; None where there is none.
        """
        auto = {"maximizer": AutoPGD(self.steps), "step_fraction": 2.0}
        search = {"maximizer": RandomSearch(self.steps * self.restarts), "step_fraction": 2.0}
        made: dict[str, Any] = {
            "pgd": {"maximizer": PGD(self.steps)},
            "pgd-margin": {"maximizer": PGD(self.steps), "objective": margin},
            "auto-pgd": auto,
            "auto-pgd-dlr": {**auto, "objective": dlr},
            "fmn": {"maximizer": MinimumNorm(self.steps), "objective": margin, "step_fraction": 1.0},
            "transfer": {"maximizer": PGD(self.steps), "surrogate": surrogate},
            "random": {**search, "objective": margin, "restarts": 1},
        }
        return tuple(
            NamedAttack(**{"name": name, "restarts": self.restarts, **made[name]})
            for name in ATTACKS
            if name in self.attack
        )

    def check_answers(self, task: str, least: int) -> None:
        """Raise ConfigurationError if an attack needs more answers than some example of the task may have."""
        if "auto-pgd-dlr" in self.attack and least < 3:
            raise ConfigurationError(
                f"expected three answers or more of each example for auto-pgd-dlr, got {least} of {task}; use pgd-margin"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(TrainOptions):
    """A task of UNITER, its databases, and what its trained models are held against."""

    robustness: RobustnessOptions = field(default_factory=RobustnessOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.robustness.checkpoints and self.checkpoint is not None:
            raise ConfigurationError("expected checkpoint or checkpoints, got both; put all into checkpoints")
        if self.robustness.checkpoints and not self.robustness.attack:
            raise ConfigurationError(
                "expected an attack beside checkpoints, got none; clean scores are of one: give --checkpoint"
            )
