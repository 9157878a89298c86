"""Visual question answering: one score per answer, trained on soft targets."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from advvl.errors import ConfigurationError
from advvl.models.uniter.model import UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.models.uniter.task import UniterTask, answer_head, freeze
from advvl.tasks.losses import answer_losses


class UniterForVQA(UniterTask):
    """UNITER and a head of two layers over its pooled first token (published code, `model/vqa.py`).

    Arguments:
        num_answers: A, the number of answers.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"targets"}

    def __init__(self, config: UniterConfig, *, num_answers: int) -> None:
        super().__init__(config)
        if num_answers < 1:
            raise ConfigurationError(f"expected num_answers of 1 or more, got {num_answers!r}")
        self.num_answers = num_answers
        self.vqa_output = answer_head(self.config, num_answers, nn.GELU())
        initialise(self.vqa_output, self.config)
        freeze(self.uniter.img_embeddings.mask_embedding)  # no region is masked here

    def forward(self, *, targets: Tensor | None = None, **fields: Tensor) -> UniterOutput:
        """Scores of the answers `(B, A)`, and with `targets` `(B, A)` in [0, 1] each row's loss `(B,)`.

        `losses` are those of each answer, `(B, A)`. Other fields are those of `UniterModel.forward`.
        """
        pooled = given("pooler_output", self.uniter(**fields).pooler_output)
        logits: Tensor = self.vqa_output(pooled)
        if targets is None:
            return UniterOutput(logits=logits)
        losses = answer_losses(logits, targets)
        return UniterOutput(loss=losses.sum(1), losses=losses, logits=logits)
