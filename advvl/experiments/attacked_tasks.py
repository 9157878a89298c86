"""The tasks of UNITER that `advvl evaluate --attack` takes: the answers of each example, and which of them are right.

Legend: B examples, A answers, R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from advvl.adapters.base import Adapter
from advvl.adapters.outputs import read_logits
from advvl.adapters.registry import adapt
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.datasets.referring import DETECTED, DRAWN, ReferringSource
from advvl.data.uniter.datasets.retrieval import Pairs, RetrievalSource
from advvl.data.uniter.datasets.vcr import CHOICES, ChoiceEvaluationSource
from advvl.evaluation.attempts import Rows
from advvl.evaluation.rows import take_rows
from advvl.evaluation.scoring import Batch, Targets, own_targets
from advvl.experiments.predictions import answers_of
from advvl.experiments.task_scores import Source
from advvl.experiments.train_options import TrainOptions
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.metrics import overlaps
from advvl.tasks.uniter.ve import VE_LABELS

_ONE_ROW: Final = partial(take_rows, whole=("position_ids",))

ATTACKED: Final = ("vqa", "ve", "nlvr2", "vcr", "retrieval", "hard-retrieval", "referring")
"""The tasks whose examples have answers to choose from, which attacks climb; pre-training has none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackedTask:
    """A task as attacks see it.

    Arguments:
        source: of the examples.
        least: the number of answers that each example has at least.
        words: of an answer, by its number.
        targets: from a batch to the right answers `(B,)`, or to scores of all `(B, A)`.
        adapter: from a model to the adapter whose logits are `(B, A)`.
        rows: from a batch and numbers of examples to the batch of those; None: an example has several rows.
        shown: from how hard each position of an example's rows is hit, `(n, T)`, to those of the rows that are drawn.
        constant: the answers mean the same for every example, so that one that is given to all has an accuracy.
    """

    source: Source
    least: int
    words: Callable[[int], str]
    targets: Targets = own_targets
    adapter: Callable[[UniterTask], Adapter] = adapt
    rows: Rows | None = _ONE_ROW
    shown: Callable[[Tensor], Tensor] = lambda heat: heat
    constant: bool = True


def attacked_task(options: TrainOptions, shards: Sequence[Shard]) -> AttackedTask:
    """Open the examples of a task of `ATTACKED`."""
    skip_bad = options.data.skip_bad
    match options.task:
        case "nlvr2":
            return AttackedTask(
                source=PairSource(shards, options.layout, skip_bad=skip_bad),
                least=2,
                words=("false", "true").__getitem__,
                rows=None,
            )
        case "vcr":
            return AttackedTask(
                source=ChoiceEvaluationSource(shards, "val", skip_bad),
                least=CHOICES**2,
                words=lambda number: f"answer {number // CHOICES + 1}, rationale {number % CHOICES + 1}",
                targets=_chosen,
                adapter=_choosing,
                rows=None,
                shown=lambda heat: heat.square().sum(dim=0, keepdim=True).sqrt(),  # all about one picture
            )
        case "retrieval" | "hard-retrieval":
            count = options.sampling.negatives
            return AttackedTask(
                source=RetrievalSource(Pairs(shards, skip_bad), count),
                least=1 + 2 * count,
                words=lambda number: "the match" if not number else f"another {'image' if number <= count else 'text'}",
                targets=_matches,
                rows=None,
                shown=lambda heat: heat[:1],  # the match
                constant=False,
            )
        case "referring":
            names = DETECTED if options.data.detected else DRAWN
            return AttackedTask(
                source=ReferringSource(shards, names, targets=False, boxes=True, skip_bad=skip_bad),
                least=1,
                words=lambda number: f"region {number + 1}",
                targets=_meant,
                constant=False,
            )
    words: Callable[[int], str] = "answer {}".format
    if options.task == "ve":
        words = VE_LABELS.__getitem__
    elif options.data.answers is not None:
        words = answers_of(options).__getitem__
    source = AnswerSource(shards, options.answer_count, skip_bad)
    return AttackedTask(source=source, least=options.answer_count, words=words)


def _meant(batch: Batch) -> Tensor:
    """The regions that overlap the one that is meant by more than half of their union, `(B, R)`."""
    found, meant = batch["region_boxes"], batch["target_boxes"]
    rows = overlaps(found.flatten(0, 1), meant.repeat_interleave(found.shape[1], dim=0))
    return (rows > 0.5).reshape(found.shape[:2]).to(found.dtype)


def _matches(batch: Batch) -> Tensor:
    """The match, the first of each group, `(B,)`."""
    groups = len(batch["input_ids"]) // batch["sample_size"]
    return torch.zeros(groups, dtype=torch.long, device=batch["input_ids"].device)


def _chosen(batch: Batch) -> Tensor:
    """The right answer with its right rationale, one of 16, `(B,)`."""
    right: Tensor = CHOICES * batch["qa_targets"][:, 0] + batch["qar_targets"][:, 0]
    return right


def _choosing(model: UniterTask) -> Adapter:
    """An adapter whose logits are those of an answer of VCR with a rationale, `(B, 16)`.

    They are sums, so that the largest is that of the best answer with the best rationale.
    """
    rows = 2 * CHOICES

    def questions(batch: Mapping[str, Any]) -> Tensor:
        words = batch["input_ids"]
        return torch.arange(len(words), device=words.device) // rows

    def pairs(outputs: Any) -> Tensor:
        scores = read_logits(outputs)[:, 1].reshape(-1, rows)
        return (scores[:, :CHOICES, None] + scores[:, None, CHOICES:]).flatten(1)

    plain = adapt(model)
    sites = {name: replace(site, examples=questions) for name, site in plain.sites.items()}
    return Adapter(model, sites, call=plain.call, logits=pairs)
