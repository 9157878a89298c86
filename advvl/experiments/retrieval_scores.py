"""Recall of retrieval: every text with every image, one image at a time with as many texts as a batch holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]

from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.retrieval import HardNegativeSource, Pairs
from advvl.errors import DataError
from advvl.experiments.progress import timed
from advvl.experiments.train_options import ScoringOptions
from advvl.models.uniter.task import UniterTask
from advvl.runtime.processes import collected, process_count, process_index
from advvl.tasks.uniter.metrics import recall

SHOWN = 10
"""The images that a prediction lists, the best first."""


def retrieved(
    model: UniterTask, shards: Sequence[Shard], options: ScoringOptions, *, quick: bool, skip_bad: bool
) -> tuple[dict[str, float], dict[str, Any], Sequence[str], dict[str, int]]:
    """Score the texts of one database with its images.

    Arguments:
        model: in eval mode.
        quick: take the first `options.images` images and their texts, and count recall plainly.
        skip_bad: leave out texts that cannot be used.

    Returns:
        Recall at 1, 5 and 10 both ways; of each text the names of its first images; reasons why others were left out; the
        number of queries of each recall that is a share.

    Raises:
        DataError: several databases, whose images are not each other's candidates.
    """
    if len(shards) != 1:
        raise DataError(f"expected one database to retrieve from, got {len(shards)}; score one split")
    pairs = Pairs(shards, skip_bad=skip_bad)
    keys: list[str] = list(pairs.examples.keys[0])
    names = list(dict.fromkeys(map(shards[0].image, keys)))[: options.images if quick else None]
    places = {name: place for place, name in enumerate(names)}
    keys = [key for key in keys if shards[0].image(key) in places]
    longest = max(shards[0].texts.lengths[key] for key in keys) + 2
    source, device = HardNegativeSource(pairs, "texts"), next(model.parameters()).device
    found = {}
    for number, name in enumerate(timed(names, "images scored")):
        if number % process_count() == process_index():
            size = max(options.tokens // (longest + shards[0].regions(name)), 1)
            parts = []
            for start in range(0, len(keys), size):
                first, *others = keys[start : start + size]
                batch = _expanded(send_to_device(source.collate(0, (first, name), others), device))
                parts.append(model(**batch).logits.flatten().cpu())
            found[number] = torch.cat(parts)
    scores = torch.stack(list(collected(found).values()), 1)
    of_texts = torch.tensor([places[shards[0].image(key)] for key in keys])
    published = options.published_recall and not quick
    ranks = recall(scores, of_texts, published=published)
    metrics = {f"text_recall_{k}": share for k, share in ranks.text.items()}
    metrics |= {f"image_recall_{k}": share for k, share in ranks.image.items()}
    best = scores.topk(min(SHOWN, len(names)), 1).indices.tolist()
    ranked = {key: [names[place] for place in row] for key, row in zip(keys, best, strict=True)}
    counts = {name: len(names) if name.startswith("text") else len(keys) for name in metrics}
    if published:  # image recall is no share then, and may pass 1
        counts = {name: count for name, count in counts.items() if name.startswith("text")}
    return {"mean_recall": ranks.mean, **metrics}, ranked, pairs.examples.skipped, counts


def _expanded(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give the shared image a row with each text."""
    rows = len(batch["num_bbs"])
    return {
        name: value.expand(rows, *value.shape[1:]) if name in ("img_feat", "img_pos_feat") else value
        for name, value in batch.items()
    }
