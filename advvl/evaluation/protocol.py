"""The protocol of an evaluation: which attacks, radii and examples, and the scores they come to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from advvl.adapters.base import Adapter
from advvl.checks import at_least, choice, choices, increasing, positive
from advvl.data.source import BatchSource
from advvl.evaluation.robustness import WorstCase, clean_scores, robustness_curve
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import fingerprints
from advvl.runtime.randomness import derive_seed

ObjectiveName = Literal["cross-entropy", "margin"]
Split = Literal["test", "validation"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The attacks that measure robustness: L2 PGD on one modality at a time, the worst of all restarts and objectives.

    Arguments:
        radii: L2 radii of the attacks on the image features, per example.
        text_radii: L2 radii of the attacks on the word embeddings, per example.
        steps: ascent steps of an attack.
        step_fraction: the ascent's step size as a fraction of the radius.
        restarts: attacks from as many random starts.
        objectives: what the attacks climb, each in attacks of its own.
        examples: how many questions are attacked; None: all of them.
        split: the questions to evaluate on; hyper-parameters are chosen on the validation ones.
        batch_size: examples attacked at a time; random starts, those of `restarts` above 1, depend on it.
    """

    radii: tuple[float, ...] = (0.25, 0.5, 1.0)
    text_radii: tuple[float, ...] = (0.5,)
    steps: int = 20
    step_fraction: float = 0.125
    restarts: int = 3
    objectives: tuple[ObjectiveName, ...] = ("cross-entropy", "margin")
    examples: int | None = None
    split: Split = "test"
    batch_size: int = 200

    def __post_init__(self) -> None:
        increasing(self, "radii", "text_radii")
        at_least(1, self, "steps", "restarts", "batch_size")
        positive(self, "step_fraction")
        choices(self, "objectives", ObjectiveName)
        choice(self, "split", Split)
        if self.examples is not None:
            at_least(1, self, "examples")


def constant_score(source: BatchSource, options: EvaluationOptions) -> float:
    """The chance level of the attacked examples: the mean score of the one answer that is right most often."""
    attacked = len(source) if options.examples is None else min(options.examples, len(source))
    targets = torch.as_tensor(source.batch(range(attacked), torch.Generator())["targets"])
    if targets.ndim == 1:  # class ids
        return float(torch.bincount(targets).max()) / attacked
    return float(targets.double().mean(0).max())


def data_fingerprint(source: BatchSource, options: EvaluationOptions) -> str:
    """A number of what the test examples hold, in hexadecimal: equal for equal examples in the same order."""
    digest = hashlib.sha256()
    for first in range(0, len(source), options.batch_size):
        rows = range(first, min(first + options.batch_size, len(source)))
        digest.update(fingerprints(source.batch(rows, torch.Generator()), len(rows)).numpy().tobytes())
    return digest.hexdigest()[:16]


def attacked_scores(
    target: Adapter,
    source: BatchSource,
    options: EvaluationOptions,
    *,
    device: torch.device,
    seed: int,
    boxes: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Scores in [0, 1]: of every example "clean", of the attacked ones the worst, by modality and radius.

    Arguments:
        boxes: bounds of the perturbed tensors, as `WorstCase` takes them.
    """
    attacks = WorstCase(
        steps=options.steps,
        step_fraction=options.step_fraction,
        restarts=options.restarts,
        objectives=options.objectives,
        boxes=boxes or {},
    )
    attacked = len(source) if options.examples is None else min(options.examples, len(source))

    def batches(count: int) -> Iterator[Any]:
        for first in range(0, count, options.batch_size):
            rows = range(first, min(first + options.batch_size, count))
            yield send_to_device(source.batch(rows, torch.Generator()), device)

    scores: dict[str, Any] = {"clean": clean_scores(target, batches(len(source))).tolist()}
    for modality, radii in (("image", options.radii), ("text", options.text_radii)):
        if radii:
            curve = robustness_curve(
                target,
                batches(attacked),
                modality=modality,
                radii=radii,
                attacks=attacks,
                rows=_cut,
                seed=derive_seed(seed, "attack", modality),
            )
            scores[modality] = {str(radius): row.tolist() for radius, row in zip(radii, curve.scores, strict=True)}
    return scores


def _cut(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Take some rows of a batch; UNITER's `position_ids` have one row, which is that of all examples."""
    positions = batch.get("position_ids")
    shared = isinstance(positions, Tensor) and len(positions) == 1
    return take_rows(batch, rows, whole=("position_ids",) if shared else ())
