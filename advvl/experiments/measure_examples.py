"""The examples of UNITER's databases that are attacked: their batches, and how a person looks at one.

Legend: T text positions, G regions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from advvl.adapters.base import Adapter
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import ConfigurationError, DataError
from advvl.evaluation.examples import Damage, Example
from advvl.evaluation.hits import hit
from advvl.evaluation.scoring import fingerprints
from advvl.experiments.attacked_tasks import AttackedTask, attacked_task
from advvl.experiments.measure_options import EvaluateOptions
from advvl.experiments.progress import timed
from advvl.experiments.task_scores import pieces
from advvl.experiments.train_setup import report_skipped, val_shards
from advvl.files import fingerprint
from advvl.models.uniter.task import UniterTask


@dataclass(frozen=True, eq=False)
class AttackedExamples:
    """The examples that are attacked, in batches of like length.

    Arguments:
        pieces: the numbers of each batch's examples in the databases.
        chance: the mean score of the one answer that is right most often; None: answers differ from example to example.
        seed: of what is drawn for an example, such as the mismatches of a match.
    """

    shards: Sequence[Shard]
    task: AttackedTask
    pieces: Sequence[Sequence[int]]
    chance: float | None
    seed: int

    @classmethod
    def of(cls, options: EvaluateOptions) -> AttackedExamples:
        """Open the val databases.

        Raises:
            ConfigurationError: no database, or one without targets.
        """
        shards = val_shards(options)
        if not shards:
            raise ConfigurationError("expected a database or more in data.val_texts, got none; name one")
        task = attacked_task(options, shards)
        report_skipped(task.source.examples.skipped)
        lengths = task.source.examples.lengths
        count = min(options.robustness.examples or len(lengths), len(lengths))
        found = cls(shards, task, list(pieces(lengths[:count], options.evaluation.tokens)), None, options.seed)
        return replace(found, chance=found._constant(count)) if task.constant else found

    def _constant(self, count: int) -> float:
        """The score of the one answer that is right most often."""
        totals: Tensor | float = 0.0
        for row in range(count):
            batch = self._batch([row])
            try:
                targets = self.task.targets(batch)
            except DataError as error:
                folders = ", ".join(str(shard.texts.folder) for shard in self.shards)
                raise ConfigurationError(
                    f"expected databases with targets, got none of example {self.task.source.examples.key(row)!r} in "
                    f"{folders}; give those of a split whose answers are known"
                ) from error
            right = torch.eye(self.task.least)[targets[0]] if targets.ndim == 1 else targets[0]
            totals = totals + right.double()
        assert isinstance(totals, Tensor)
        return float(totals.max()) / count

    def _batch(self, rows: Sequence[int]) -> dict[str, Any]:
        return self.task.source.batch(rows, torch.Generator().manual_seed(self.seed))

    def batches(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """Make the batches, on the device."""
        for rows in timed(self.pieces, "batches attacked"):
            yield send_to_device(self._batch(rows), device)

    @property
    def about(self) -> Mapping[str, Any]:
        """The databases and their examples, as a measurement tells them."""
        keys = [self.task.source.examples.key(row) for rows in self.pieces for row in rows]
        names = [Path(str(shard.texts.folder)).name for shard in self.shards]
        return {"databases": names, "examples": len(keys), "keys": fingerprint({"keys": keys})[:16]}

    @property
    def content(self) -> str:
        """A fingerprint of all that the batches hold."""
        digest = hashlib.sha256()
        for rows in self.pieces:
            digest.update(fingerprints(self._batch(rows), len(rows)).numpy().tobytes())
        return digest.hexdigest()

    def drawn(self, options: EvaluateOptions, model: UniterTask, surrogate: Adapter | None, damage: Damage) -> Example:
        """Attack an example once more, and show where it is hit.

        Arguments:
            model: that the damage was done to.
            surrogate: the model of transfer attacks.
        """
        asked, task = options.robustness, self.task
        row = [row for rows in self.pieces for row in rows][damage.example]
        batch = send_to_device(self._batch([row]), next(model.parameters()).device)
        budget, attack = asked.budgets[damage.budget], asked.attacks(surrogate)[damage.attack]
        found = hit(task.adapter(model), batch, budget, attack, targets=task.targets, seed=options.seed)
        heat = {modality: task.shown(norms) for modality, norms in found.heat.items()}
        target = task.targets(batch)[0]
        regions, region_heat = _regions(batch, heat)
        words = self._words(row)
        return Example(
            words=words,
            word_heat=heat["text"].square().sum(dim=0).sqrt()[: len(words)].tolist() if "text" in heat else (),
            regions=regions,
            region_heat=region_heat,
            before=task.words(int(found.before.argmax())),
            after=task.words(int(found.after.argmax())),
            truth=task.words(int(target if target.ndim == 0 else target.argmax())),
            taken=found.taken,
        )

    def _words(self, row: int) -> list[str]:
        """The word pieces of a text in words where its record has them, and else their numbers."""
        number, key = self.task.source.examples.at(row)
        record = self.shards[number].texts[key]
        ids = word_pieces(record)
        for value in record.values():
            if (
                isinstance(value, list | tuple)
                and len(value) == len(ids)
                and all(isinstance(one, str) for one in value)
            ):
                return ["[CLS]", *value, "[SEP]"]
        return ["[CLS]", *(f"#{number}" for number in ids), "[SEP]"]


def _regions(batch: Mapping[str, Any], heat: Mapping[str, Tensor]) -> tuple[list[Any], list[float]]:
    """The boxes of all regions and how hard each was hit; of two images the right one beside the left."""
    boxes, heats = [], []
    types = batch.get("img_type_ids")
    drawn = len(next(iter(heat.values())))
    for row, count in enumerate(batch["num_bbs"][:drawn].tolist()):
        for region in range(count):
            left, top, right, bottom = batch["img_pos_feat"][row, region, :4].double().clamp(0, 1).tolist()
            if types is not None:
                aside = 0.5 * (int(types[row, region]) == 2)
                left, right = aside + left / 2, aside + right / 2
            boxes.append((left, top, max(left, right), max(top, bottom)))
            if "image" in heat:
                heats.append(float(heat["image"][row, region]))
    return boxes, heats
