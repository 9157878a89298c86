"""The examples of UNITER's databases that are attacked: their batches, and how a person looks at one.

Legend: T text positions, G regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from torch import Tensor

from advvl.adapters.registry import adapt
from advvl.data.uniter.datasets.answers import AnswerSource
from advvl.data.uniter.datasets.examples import Shard
from advvl.data.uniter.datasets.nlvr2 import PairSource
from advvl.data.uniter.word_pieces import word_pieces
from advvl.errors import ConfigurationError
from advvl.evaluation.curves import Damage
from advvl.evaluation.examples import Example
from advvl.evaluation.hits import Hit, hit
from advvl.experiments.measure_options import EvaluateOptions
from advvl.experiments.predictions import answers_of
from advvl.experiments.scoring import pieces
from advvl.experiments.train_setup import val_shards
from advvl.files import fingerprint
from advvl.models.uniter.checkpoint import load_checkpoint
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.ve import VE_LABELS


@dataclass(frozen=True, eq=False)
class AttackedExamples:
    """The examples that are attacked, in batches of like length.

    Arguments:
        pieces: the numbers of each batch's examples in the databases.
        chance: the mean score of the one answer that is right most often.
    """

    shards: Sequence[Shard]
    source: AnswerSource | PairSource
    pieces: Sequence[Sequence[int]]
    chance: float
    _loaded: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: EvaluateOptions) -> AttackedExamples:
        """Open the val databases.

        Raises:
            ConfigurationError: no database, or one without targets.
        """
        shards = val_shards(options)
        if not shards:
            raise ConfigurationError("expected a database or more in data.val_texts, got none; name one")
        source: AnswerSource | PairSource
        if options.task == "nlvr2":
            source = PairSource(shards, "triplet" if options.model.variant == "triplet" else "paired")
        else:
            source = AnswerSource(shards, options.model.answers if options.task == "vqa" else len(VE_LABELS))
        count = min(options.robustness.examples or len(source), len(source))
        totals: Tensor | float = 0.0
        for row in range(count):
            targets = source.batch([row]).get("targets")
            if targets is None:
                raise ConfigurationError(
                    f"expected databases with targets, got none of example {source.examples.key(row)!r} in "
                    f"{', '.join(options.data.val_texts)}; give those of a split whose answers are known"
                )
            totals = totals + (torch.eye(2)[targets[0]] if targets.ndim == 1 else targets[0]).double()
        assert isinstance(totals, Tensor)
        cut = list(pieces(source.examples.lengths[:count], options.evaluation.tokens))
        return cls(shards, source, cut, float(totals.max()) / count)

    def batches(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """Make the batches, on the device."""
        for rows in self.pieces:
            yield send_to_device(self.source.batch(rows), device)

    @property
    def about(self) -> Mapping[str, Any]:
        """The databases and their examples, as a measurement tells them."""
        keys = [self.source.examples.key(row) for rows in self.pieces for row in rows]
        names = [Path(str(shard.texts.folder)).name for shard in self.shards]
        return {"databases": names, "examples": len(keys), "keys": fingerprint({"keys": keys})[:16]}

    def drawn(self, options: EvaluateOptions, model: UniterTask, files: Mapping[str, Path], damage: Damage) -> Example:
        """Attack an example once more, and show where it is hit.

        Arguments:
            model: any of the compared ones; it gets the weights of the one that the damage was done to.
            files: of weights, by the models' names.
        """
        if self._loaded != [damage.model]:
            load_checkpoint(model, files[damage.model])
            self._loaded[:] = [damage.model]
        asked = options.robustness
        row = [row for rows in self.pieces for row in rows][damage.example]
        batch = send_to_device(self.source.batch([row]), next(model.parameters()).device)
        found = hit(adapt(model), batch, asked.budgets[damage.budget], asked.attacks[damage.attack], seed=options.seed)
        heat = {modality: norms.square().sum(dim=0).sqrt() for modality, norms in found.heat.items()}
        names = _answers(options)
        target = batch["targets"][0]
        regions, region_heat = _regions(batch, found)
        words = self._words(row)
        return Example(
            words=words,
            word_heat=heat["text"][: len(words)].tolist() if "text" in heat else (),
            regions=regions,
            region_heat=region_heat,
            before=names(int(found.before.argmax())),
            after=names(int(found.after.argmax())),
            truth=names(int(target if target.ndim == 0 else target.argmax())),
            taken=found.taken,
        )

    def _words(self, row: int) -> list[str]:
        """The word pieces of a text in words where its record has them, and else their numbers."""
        number, key = self.source.examples.at(row)
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


def _answers(options: EvaluateOptions) -> Any:
    """Return a function from an answer's number to its words."""
    if options.task == "nlvr2":
        return ("false", "true").__getitem__
    if options.task == "ve":
        return VE_LABELS.__getitem__
    if options.data.answers is None:
        return lambda number: f"answer {number}"
    return answers_of(options).__getitem__


def _regions(batch: Mapping[str, Any], found: Hit) -> tuple[list[Any], list[float]]:
    """The boxes of all regions and how hard each was hit; of two images the right one beside the left."""
    boxes, heats = [], []
    types = batch.get("img_type_ids")
    for row, count in enumerate(batch["num_bbs"].tolist()):
        for region in range(count):
            left, top, right, bottom = batch["img_pos_feat"][row, region, :4].double().clamp(0, 1).tolist()
            if types is not None:
                aside = 0.5 * (int(types[row, region]) == 2)
                left, right = aside + left / 2, aside + right / 2
            boxes.append((left, top, max(left, right), max(top, bottom)))
            if "image" in found.heat:
                heats.append(float(found.heat["image"][row, region]))
    return boxes, heats
