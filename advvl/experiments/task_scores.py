"""Clean scores of UNITER's tasks on databases, and predictions for the tasks' servers.

Examples are shared out over the processes of a run, longest first, in batches that fill a budget of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Examples, Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.pretraining import PretrainingSource
from advvl.data.uniter.datasets.referring import DETECTED, DRAWN, ReferringSource
from advvl.data.uniter.datasets.vcr import ChoiceEvaluationSource
from advvl.data.uniter.datasets.vcr_pretraining import VCRPretrainingSource
from advvl.errors import CheckpointError, ConfigurationError, DataError
from advvl.evaluation.objectives import score
from advvl.evaluation.statistics import Interval, proportion_interval, score_interval
from advvl.experiments.database_options import MIXED
from advvl.experiments.progress import timed
from advvl.experiments.retrieval_scores import retrieved
from advvl.experiments.train_options import TrainOptions
from advvl.experiments.train_setup import accelerator_of, check_fit, model_of, report_skipped, val_shards
from advvl.models.uniter.checkpoint import load_checkpoint
from advvl.models.uniter.task import UniterTask
from advvl.runtime.processes import collected, process_count, process_index
from advvl.runtime.states import kept_modes
from advvl.tasks.metrics import nlvr2_accuracy, nlvr2_consistency
from advvl.tasks.uniter.metrics import region_accuracy, vcr_accuracy

HEADLINES: Final[Mapping[str, str]] = {
    "vqa": "accuracy",
    "ve": "accuracy",
    "nlvr2": "accuracy",
    "vcr": "both",
    "retrieval": "mean_recall",
    "hard-retrieval": "mean_recall",
    "referring": "accuracy",
    "pretraining": "mlm_accuracy",
    "vcr-pretraining": "mlm_accuracy",
}
"""The score of each task by which the best checkpoint is chosen; of pre-training without MLM, the first one there is."""


@dataclass(frozen=True)
class Scored:
    """The outcome of an evaluation.

    Arguments:
        scores: by name; empty where no target is known.
        predictions: by the examples' keys, in the order of the databases.
        skipped: reasons why other examples were left out, with `data.skip_bad`.
        each: of a mean over examples, the score of each.
        counts: of other shares of right and wrong, how many they are shares of.
    """

    scores: Mapping[str, float]
    predictions: Mapping[str, Any] = field(default_factory=dict, repr=False)
    skipped: Sequence[str] = field(default=(), repr=False)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)
    counts: Mapping[str, int] = field(default_factory=dict)

    def intervals(self) -> dict[str, Interval]:
        """Return the 95 % interval over examples of each score that is a mean over examples."""
        shares = {
            name: proportion_interval(round(self.scores[name] * count), count) for name, count in self.counts.items()
        }
        return shares | {name: score_interval(scores) for name, scores in self.each.items()}

    def headline(self, task: str) -> float:
        """Return the score that says which model is the better."""
        return self.scores.get(HEADLINES[task], next(iter(self.scores.values())))


class Source(Protocol):
    """A source of one task's examples from databases."""

    @property
    def examples(self) -> Examples:
        """The examples, with their lengths and keys."""

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """Make the batch of these examples."""


def evaluate(model: UniterTask, options: TrainOptions, shards: Sequence[Shard], *, quick: bool = False) -> Scored:
    """Score a model that is in eval mode, without gradients; every process gets the whole outcome.

    Arguments:
        shards: the val databases.
        quick: score retrieval on its first images alone.

    Raises:
        DataError: examples that the task cannot use.
    """
    with torch.no_grad():
        if options.pretraining:
            return _pretrained(model, options, shards)
        if options.task in ("retrieval", "hard-retrieval"):
            how = {"quick": quick, "skip_bad": options.data.skip_bad}
            scores, ranked, skipped, counts = retrieved(model, shards, options.evaluation, **how)
            return Scored(scores, ranked, skipped, counts=counts)
        return _READERS[options.task](model, options, shards)


def judged(options: TrainOptions) -> tuple[Scored, Sequence[Shard]]:
    """Score a trained model on the val databases.

    Raises:
        CheckpointError: no file of weights, or one that does not fit.
        ConfigurationError: no database.
    """
    if not options.data.val_texts:
        raise ConfigurationError("expected a database or more in data.val_texts, got none; name one")
    path = Path(options.output) / "best.safetensors" if options.checkpoint is None else Path(options.checkpoint)
    if not path.is_file():
        raise CheckpointError(f"expected a file of weights at {str(path)!r}, got none; give --checkpoint FILE")
    accelerator = accelerator_of(options)
    model = model_of(options)
    shards = val_shards(options)
    check_fit(model, shards)
    load_checkpoint(model, path)
    model.to(accelerator.device)
    with kept_modes(model):
        found = evaluate(model.eval(), options, shards)
    report_skipped(found.skipped)
    return found, shards


def _answers(model: UniterTask, options: TrainOptions, shards: Sequence[Shard]) -> Scored:
    """VQA and visual entailment: the answer of the highest logit, and the mean of its soft scores."""
    source = AnswerSource(shards, options.answer_count, skip_bad=options.data.skip_bad)

    def read(batch: Mapping[str, Any], logits: Tensor) -> list[tuple[int, float | None]]:
        found = logits.argmax(1).tolist()
        targets = batch.get("targets")
        scores = [None] * len(found) if targets is None else score(logits, targets).tolist()
        return list(zip(found, scores, strict=True))

    results = _results(model, options, source, read)
    scores = [score for _, score in results if score is not None]
    found, skipped = _keyed(source, [answer for answer, _ in results]), source.examples.skipped
    if len(scores) < len(results):
        return Scored({}, found, skipped)
    return Scored({"accuracy": sum(scores) / len(scores)}, found, skipped, {"accuracy": scores})


def _judgements(model: UniterTask, options: TrainOptions, shards: Sequence[Shard]) -> Scored:
    """NLVR2: true or false, accuracy and consistency."""
    source = PairSource(shards, options.layout, skip_bad=options.data.skip_bad)

    def read(batch: Mapping[str, Any], logits: Tensor) -> list[tuple[bool, bool | None]]:
        targets = batch.get("targets")
        known = [None] * len(logits) if targets is None else [bool(target) for target in targets.tolist()]
        return list(zip((logits.argmax(1) == 1).tolist(), known, strict=True))

    results = _results(model, options, source, read)
    found = _keyed(source, [judgement for judgement, _ in results])
    labels = {key: known for key, (_, known) in zip(found, results, strict=True) if known is not None}
    if len(labels) < len(found):
        return Scored({}, found, source.examples.skipped)
    scores, counts = {"accuracy": nlvr2_accuracy(found, labels)}, {"accuracy": len(found)}
    if all(key.count("-") == 3 for key in found):  # NLVR2's own identifiers, which say what shares a sentence
        scores["consistency"] = nlvr2_consistency(found, labels)
        counts["consistency"] = len({(*key.split("-")[:2], key.split("-")[3]) for key in found})
    return Scored(scores, found, source.examples.skipped, counts=counts)


def _choices(model: UniterTask, options: TrainOptions, shards: Sequence[Shard]) -> Scored:
    """VCR: all 20 scores of a question, and the three accuracies."""
    source = ChoiceEvaluationSource(shards, "test", options.data.skip_bad)

    def read(batch: Mapping[str, Any], logits: Tensor) -> list[tuple[list[float], tuple[int, int] | None]]:
        scores = logits[:, 1].reshape(-1, 20).tolist()
        known: list[tuple[int, int] | None] = [None] * len(scores)
        if "qa_targets" in batch:
            right = (batch[name][:, 0].tolist() for name in ("qa_targets", "qar_targets"))
            known = list(zip(*right, strict=True))
        return list(zip(scores, known, strict=True))

    results = _results(model, options, source, read)
    found = _keyed(source, [scores for scores, _ in results])
    known = [right for _, right in results if right is not None]
    if len(known) < len(results):
        return Scored({}, found, source.examples.skipped)
    answers, rationales = torch.tensor(known).t()
    all_scores = torch.tensor([scores for scores, _ in results], dtype=torch.float64)
    accuracy = vcr_accuracy(all_scores, answers, rationales)
    shares = {"qa": accuracy.qa, "qar": accuracy.qar, "both": accuracy.both}
    return Scored(shares, found, source.examples.skipped, counts=dict.fromkeys(shares, len(results)))


def _boxes(model: UniterTask, options: TrainOptions, shards: Sequence[Shard]) -> Scored:
    """Referring expressions: the box of the region of the highest score, against the one that is meant."""
    names = DETECTED if options.data.detected else DRAWN
    source = ReferringSource(shards, names, targets=False, boxes=True, skip_bad=options.data.skip_bad)

    def read(batch: Mapping[str, Any], logits: Tensor) -> list[tuple[list[float], list[float]]]:
        rows = torch.arange(len(logits), device=logits.device)
        found = batch["region_boxes"][rows, logits.argmax(1)]
        return list(zip(found.tolist(), batch["target_boxes"].tolist(), strict=True))

    results = _results(model, options, source, read)
    found, meant = (torch.tensor(boxes) for boxes in zip(*results, strict=True))
    accuracy, predictions = {"accuracy": region_accuracy(found, meant)}, _keyed(source, found.tolist())
    return Scored(accuracy, predictions, source.examples.skipped, counts={"accuracy": len(results)})


_READERS: Final[Mapping[str, Callable[[UniterTask, TrainOptions, Sequence[Shard]], Scored]]] = {
    "vqa": _answers,
    "ve": _answers,
    "nlvr2": _judgements,
    "vcr": _choices,
    "referring": _boxes,
}


def _pretrained(model: UniterTask, options: TrainOptions, shards: Sequence[Shard]) -> Scored:
    """The loss of each task of pre-training, a mean over what it masks, and the share of what it gets right."""
    make = VCRPretrainingSource if options.task == "vcr-pretraining" else PretrainingSource
    scores: dict[str, float] = {}
    skipped: dict[str, None] = {}
    for task in MIXED:
        if not any(options.mixture.ratios(task)):
            continue
        source = make(shards, task, skip_bad=options.data.skip_bad)  # type: ignore[arg-type]
        skipped |= dict.fromkeys(source.examples.skipped)
        totals = [torch.tensor(found) for found in _in_batches(model, options, source, _corrupted_sums)]
        loss, right, count = torch.stack(totals).double().sum(0).tolist()
        name = task.replace("-", "_")
        scores[f"{name}_loss"] = loss / count
        if task != "mrfr":
            scores[f"{name}_accuracy"] = right / count
    ordered = dict(sorted(scores.items(), key=lambda item: item[0].endswith("loss")))
    return Scored(ordered, skipped=list(skipped))


def _corrupted_sums(batch: Mapping[str, Any], output: Any) -> tuple[float, float, float]:
    """Of one batch of pre-training: the sum of its losses, the number of right predictions, and of predictions."""
    losses, task = output.losses, batch["task"]
    entries = losses.flatten(1).mean(1) if losses.ndim > 1 else losses
    if task == "mrfr":
        return float(entries.sum()), 0.0, len(entries)
    right = {
        "mlm": lambda: batch["txt_labels"][batch["txt_labels"] != -1],
        "itm": lambda: batch["targets"],
        "mrc": lambda: batch["label_targets"][:, 1:].argmax(-1) + 1,
        "mrc-kl": lambda: batch["label_targets"].argmax(-1),
    }[task]()
    return float(entries.sum()), float((output.logits.argmax(-1) == right).sum()), len(entries)


def _results(
    model: UniterTask, options: TrainOptions, source: Source, read: Callable[[Mapping[str, Any], Tensor], list[Any]]
) -> list[Any]:
    """Return a result for each example, in order of the examples."""
    cut = list(pieces(source.examples.lengths, options.evaluation.tokens))
    parts = _in_batches(model, options, source, lambda batch, output: read(batch, output.logits))
    found = {row: one for rows, part in zip(cut, parts, strict=True) for row, one in zip(rows, part, strict=True)}
    return [found[row] for row in sorted(found)]


def _in_batches(
    model: UniterTask, options: TrainOptions, source: Source, read: Callable[[Mapping[str, Any], Any], Any]
) -> list[Any]:
    """Return what is read of each batch, whichever process computed it."""
    device = next(model.parameters()).device
    found = {}
    cut = list(pieces(source.examples.lengths, options.evaluation.tokens))
    for number, rows in enumerate(timed(cut, "batches scored")):
        if number % process_count() == process_index():
            made = source.batch(rows, torch.Generator().manual_seed(options.seed))
            batch = send_to_device(made, device)
            fields = {name: value for name, value in batch.items() if name in model.fields}
            found[number] = read(batch, model(**fields))
    return list(collected(found).values())


def pieces(lengths: Tensor, tokens: int) -> Iterator[list[int]]:
    """Cut the examples, the longest first, into batches that fill the budget; an example over it is one by itself."""
    order = lengths.argsort(descending=True, stable=True).tolist()
    place = 0
    while place < len(order):
        size = max(tokens // int(lengths[order[place]]), 1)
        yield order[place : place + size]
        place += size


def _keyed(source: Source, results: Sequence[Any]) -> dict[str, Any]:
    """Return results by the examples' keys.

    Raises:
        DataError: two databases have a key in common.
    """
    keys = [source.examples.key(row) for row in range(len(results))]
    if len(set(keys)) < len(keys):
        raise DataError(f"expected examples of different keys, got {len(keys) - len(set(keys))} twice; score one split")
    return dict(zip(keys, results, strict=True))
