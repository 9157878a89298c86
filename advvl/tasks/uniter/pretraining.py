"""UNITER's pre-training: one model, one task per batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from advvl.errors import ConfigurationError
from advvl.models.uniter.model import UniterConfig, UniterModel, UniterOutput, given, initialise, region_mask, text_mask
from advvl.models.uniter.task import UniterTask
from advvl.tasks.uniter.itm import alignment_distances, match
from advvl.tasks.uniter.mlm import MaskedWordHead
from advvl.tasks.uniter.regions import FeatureRegression, RegionClassifier

PretrainingTask = Literal["mlm", "itm", "mrfr", "mrc", "mrc-kl"]


class UniterForPretraining(UniterTask):
    """UNITER and the heads of its pre-training tasks, named as in the published checkpoints.

    The word embeddings also score the words, and the features' projection also gives features back.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields | {
        "task",
        "txt_labels",
        "img_mask_tgt",
        "feat_targets",
        "label_targets",
        "targets",
    }

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        config = self.config
        self.cls = MaskedWordHead(config, self.uniter.embeddings.word_embeddings)
        self.feat_regress = FeatureRegression(config, self.uniter.img_embeddings.img_linear)
        self.region_classifier = RegionClassifier(config)
        self.itm_output = nn.Linear(config.hidden_size, 2)
        initialise(self, config)

    def forward(
        self,
        *,
        task: PretrainingTask,
        txt_labels: Tensor | None = None,
        img_mask_tgt: Tensor | None = None,
        feat_targets: Tensor | None = None,
        label_targets: Tensor | None = None,
        targets: Tensor | None = None,
        **fields: Tensor,
    ) -> UniterOutput:
        """The loss of one task; `loss` is the scalar of the published training, `losses` unreduced.

        Arguments:
            task: "mlm", "itm", "mrfr", "mrc" or "mrc-kl".
            txt_labels: for "mlm": the masked words, -1 elsewhere, `(B, L)`.
            img_mask_tgt: for the region tasks: the masked places of the sequences, `(B, S)` bool.
            feat_targets: for "mrfr": the true features of the N masked regions, `(N, F)`.
            label_targets: for "mrc" and "mrc-kl": their distributions over classes, `(N, C)`.
            targets: for "itm": 1 for a match, `(B,)`.
            fields: those of `UniterModel.forward`.

        Raises:
            ConfigurationError: another task.
            DataError, ShapeError: a field that is missing or does not fit.
        """
        if task not in get_args(PretrainingTask):
            raise ConfigurationError(f"expected task to be one of {', '.join(get_args(PretrainingTask))}, got {task!r}")
        encoded = self.uniter(**fields)
        hidden: Tensor = encoded.last_hidden_state
        output: UniterOutput
        if task == "mlm":
            output = self.cls(hidden, given("txt_labels", txt_labels))
        elif task == "itm":
            weight = self.config.itm_ot_lambda
            distances = alignment_distances(hidden, text_mask(fields), region_mask(fields)) if weight else None
            logits = self.itm_output(encoded.pooler_output)
            output = match(logits, given("targets", targets), distances, weight=weight)
        elif task == "mrfr":
            masked = given("img_mask_tgt", img_mask_tgt)
            output = self.feat_regress(hidden, masked, given("feat_targets", feat_targets))
        else:
            masked, classes = given("img_mask_tgt", img_mask_tgt), given("label_targets", label_targets)
            output = self.region_classifier(hidden, masked, classes, soft=task == "mrc-kl")
        return output


def loss_entries(batch: Mapping[str, Any]) -> int:
    """The number of entries that a batch's loss is the mean of, for `fit(count=…)`: masked words, regions, or texts."""
    if batch["task"] == "mlm":
        return int((batch["txt_labels"] != -1).sum())
    return len(batch["targets"]) if batch["task"] == "itm" else int(batch["img_mask_tgt"].sum())
