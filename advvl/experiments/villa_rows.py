"""The rows of an experiment with VILLA on a UNITER: which model each starts from, how it is trained, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from advvl.experiments.experiment import Row
from advvl.experiments.villa_options import VillaAdversary, VillaOptions
from advvl.maximizers.free_at import FreeAT
from advvl.maximizers.freelb import FreeLB
from advvl.maximizers.pgd import PGD
from advvl.passes.objective import Objective
from advvl.perturbers.ascents import Ascent, EmbeddingPerturber
from advvl.perturbers.balls import L2
from advvl.perturbers.starts import Normal
from advvl.regularizers.kl import SymmetricKL
from advvl.training import AdversarialTraining


def rows_of(options: VillaOptions) -> list[Row]:
    """Return the rows of the chosen methods, and the pre-training rows that they start from.

    "standard, equal compute" has as many more updates as make it cost what VILLA's fine-tuning costs. Rows that start from
    adversarial pre-training are left out where a checkpoint is given.
    All other rows have the same number of updates, also free AT, which does K of them per batch.
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
        **_others(options, start),
        **_ablations(options, start),
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


def _others(options: VillaOptions, start: Row | Path) -> dict[str, Row]:
    """Methods of others, with step sizes and the number of moves of VILLA's options, and a radius that they just reach.

    Free AT updates after each of its K replays, and so takes a K-th of the batches.
    """
    villa, moves = options.villa, options.villa.steps
    sizes = {"text": villa.text_step, "image": villa.image_step}
    far = EmbeddingPerturber(**{name: Ascent(L2(moves * size), step_size=size) for name, size in sizes.items()})
    near = {name: Ascent(L2(size), step_size=size, start=Normal(size / 100)) for name, size in sizes.items()}
    penalty = SymmetricKL(weight=1.0)  # λ as published
    smart = AdversarialTraining(
        EmbeddingPerturber(**near), PGD(1), penalty, clean_weight=1.0, teach=Objective(task=0.0)
    )
    return {
        "pgd": Row("PGD", AdversarialTraining(far, PGD(moves)), start=start, update_cost=2 * moves + 3),
        "free-at": Row(
            "free AT", AdversarialTraining(far, FreeAT(moves)), start=start, updates=1 / moves, update_cost=3 * moves
        ),
        "smart": Row("SMART", smart, start=start, update_cost=8),
    }


def _ablations(options: VillaOptions, start: Row | Path) -> dict[str, Row]:
    """VILLA with one ingredient changed."""
    villa = options.villa
    alone = replace(villa, modalities="together")
    return {
        "villa-text": _row("VILLA, words alone", alone, start, modalities=["text"]),
        "villa-image": _row("VILLA, regions alone", alone, start, modalities=["image"]),
        "villa-together": _row("VILLA, together", alone, start),
        "villa-no-kl": _row("VILLA without KL", replace(villa, kl_weight=0.0), start),
        "villa-no-clean": _row("VILLA without clean loss", replace(villa, clean_weight=0.0), start),
        "villa-more-steps": _row(f"VILLA, K={2 * villa.steps}", replace(villa, steps=2 * villa.steps), start),
        "villa-near": _row("VILLA, half as far", _scaled(villa, 0.5), start),
        "villa-far": _row("VILLA, twice as far", _scaled(villa, 2.0), start),
    }


def _scaled(adversary: VillaAdversary, by: float) -> VillaAdversary:
    """Multiply the radii and the step sizes."""
    names = ("text_radius", "image_radius", "text_step", "image_step")
    return replace(adversary, **{name: by * getattr(adversary, name) for name in names})


def training_of(
    adversary: VillaAdversary | None, modalities: Sequence[str] = ("text", "image")
) -> AdversarialTraining | None:
    """Return the method that these options describe, on UNITER's sites "text" and "image", or on one of them."""
    if adversary is None:
        return None
    ascents = {
        "text": Ascent(L2(adversary.text_radius), step_size=adversary.text_step),
        "image": Ascent(L2(adversary.image_radius), step_size=adversary.image_step),
    }
    return AdversarialTraining(
        EmbeddingPerturber(**{name: ascents[name] for name in modalities}),
        FreeLB(adversary.steps, modalities=adversary.modalities),
        SymmetricKL(weight=adversary.kl_weight) if adversary.kl_weight else None,
        clean_weight=adversary.clean_weight,
        dropout=adversary.dropout,
    )


def update_cost(adversary: VillaAdversary | None) -> int:
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


def _pretrained(kind: str, adversary: VillaAdversary | None) -> Row:
    return Row(
        f"{kind} pre-training",
        training_of(adversary),
        stage="pretrain",
        file=f"pretrained-{kind}",
        update_cost=update_cost(adversary),
    )


def _row(
    name: str,
    adversary: VillaAdversary | None,
    start: Row | Path,
    *,
    updates: float = 1.0,
    file: str | None = None,
    modalities: Sequence[str] = ("text", "image"),
) -> Row:
    cost = update_cost(adversary)
    return Row(name, training_of(adversary, modalities), start=start, updates=updates, update_cost=cost, file=file)
