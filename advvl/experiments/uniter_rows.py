"""The rows of an experiment with VILLA on a UNITER: which model each starts from, how it is trained, and what that costs."""

from __future__ import annotations

from pathlib import Path

from advvl.experiments.experiment import Row
from advvl.experiments.uniter_options import AdversaryOptions, VillaOptions
from advvl.maximizers.freelb import FreeLB
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2
from advvl.regularizers.kl import SymmetricKL
from advvl.training import AdversarialTraining


def rows_of(options: VillaOptions) -> list[Row]:
    """Return the rows of the chosen methods, and the stages one that they start from.

    "standard, equal compute" has as many more updates as make it cost what VILLA's fine-tuning costs. Rows that start from
    adversarial pre-training are left out where a checkpoint is given.
    """
    plainly = _pretrained("standard", None)
    adversarially = _pretrained("adversarial", options.pretrain_adversary)
    start = plainly if options.checkpoint is None else Path(options.checkpoint)
    more = update_cost(options.villa) / update_cost(None)
    known = {
        "standard": _row("standard", None, start),
        "equal-compute": _row("standard, equal compute", None, start, updates=more),
        "freelb": _row("FreeLB", options.freelb, start),
        "villa": _row("VILLA", options.villa, start),
    }
    if options.checkpoint is None:
        known |= {
            "pre-training": _row("VILLA, stage one only", None, adversarially, file="adversarial-standard"),
            "both-stages": _row("VILLA, both stages", options.villa, adversarially, file="adversarial-villa"),
        }
    rows = [row for name, row in known.items() if name in options.methods]
    starts = [stage for stage in (adversarially, plainly) if any(row.start is stage for row in rows)]
    return [
        *(starts if options.stage != "finetune" else []),
        *(rows if options.stage != "pretrain" else []),
    ]


def training_of(adversary: AdversaryOptions | None) -> AdversarialTraining | None:
    """Return the method that these options describe, on UNITER's sites "text" and "image"."""
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
    """Return the cost of an update, in units of one forward; a backward is 2, one to the inputs alone 1.

    A plain update is 3. An adversarial one has a forward and a backward for each of its passes and, where predictions are
    compared with clean ones or a clean loss is kept, of the clean pass. With shared dropout each modality's first pass,
    at zero, is the clean one, and needs one backward to the inputs.
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


def _pretrained(kind: str, adversary: AdversaryOptions | None) -> Row:
    return Row(
        f"{kind} pre-training",
        training_of(adversary),
        stage="pretrain",
        file=f"pretrained-{kind}",
        update_cost=update_cost(adversary),
    )


def _row(
    name: str,
    adversary: AdversaryOptions | None,
    start: Row | Path,
    *,
    updates: float = 1.0,
    file: str | None = None,
) -> Row:
    cost = update_cost(adversary)
    return Row(name, training_of(adversary), start=start, updates=updates, update_cost=cost, file=file)
