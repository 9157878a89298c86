"""The rows of the experiment's table: which checkpoint each starts from, how it is fine-tuned, and what that costs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from advvl.experiments.options import AdversaryOptions, ExperimentOptions, Method
from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2
from advvl.regularizers.kl import SymmetricKL
from advvl.training import AdversarialTraining

Start = Literal["standard", "adversarial", "given"]


@dataclass(frozen=True)
class Row:
    """One way to a fine-tuned model.

    Arguments:
        name: in the table.
        key: in file names.
        start: the stage one it begins at: standard or adversarial pre-training, or a checkpoint given by the user.
        method: of fine-tuning.
        equal_compute: with as many more updates as make it cost what VILLA's fine-tuning costs.
    """

    name: str
    key: str
    start: Start
    method: Method
    equal_compute: bool = False


BASELINE: Final = "standard"

_ROWS: Final = (
    Row(BASELINE, "standard", "standard", "standard"),
    Row("standard, equal compute", "standard-equal-compute", "standard", "standard", equal_compute=True),
    Row("freelb", "freelb", "standard", "freelb"),
    Row("villa", "villa", "standard", "villa"),
    Row("villa pre-training, standard", "adversarial-standard", "adversarial", "standard"),
    Row("villa pre-training, villa", "adversarial-villa", "adversarial", "villa"),
)


def rows_of(methods: Collection[Method], *, given: bool = False) -> tuple[Row, ...]:
    """The rows that these fine-tuning methods have; with a `given` checkpoint, those without a stage one of their own."""
    chosen = [row for row in _ROWS if row.method in methods]
    if not given:
        return tuple(chosen)
    return tuple(
        Row(row.name, row.key, "given", row.method, row.equal_compute) for row in chosen if row.start == "standard"
    )


def adversary_of(row: Row, options: ExperimentOptions) -> AdversaryOptions | None:
    """How the row's fine-tuning perturbs; None where it does not."""
    return {"standard": None, "freelb": options.freelb, "villa": options.villa}[row.method]


def training_of(adversary: AdversaryOptions | None) -> AdversarialTraining | None:
    """The method that these options describe, on UNITER's sites "text" and "image"."""
    if adversary is None:
        return None
    return AdversarialTraining(
        EmbeddingPerturber(
            text=Ascent(L2(adversary.text_radius), step_size=adversary.text_step),
            image=Ascent(L2(adversary.image_radius), step_size=adversary.image_step),
        ),
        FreeLB(adversary.steps, modalities=adversary.modalities),
        SymmetricKL(weight=adversary.kl_weight) if adversary.kl_weight else None,
        clean_weight=adversary.clean_weight,
        dropout=adversary.dropout,
    )


def update_cost(adversary: AdversaryOptions | None) -> int:
    """What an update costs, in units of one forward; a backward is 2, one to the inputs alone 1.

    A plain update is 3. An adversarial one has a forward and a backward for each of its passes and, where predictions are
    compared with clean ones or a clean loss is kept, of the clean pass. With shared dropout each modality's first pass,
    at zero, is the clean one, and wants one backward to the inputs.
    """
    if adversary is None:
        return 3
    turns = 2 if adversary.modalities == "in turn" else 1
    passes = adversary.steps * turns
    if not (adversary.kl_weight or adversary.clean_weight):
        return 3 * passes
    if adversary.dropout == "fresh":
        return 3 * (passes + 1)
    return 3 * (passes + 1 - turns) + 1


def updates_of(row: Row, options: ExperimentOptions, updates: int) -> int:
    """How many updates the row's fine-tuning takes where the others take `updates`."""
    if not row.equal_compute:
        return updates
    return round(updates * update_cost(options.villa) / update_cost(None))
