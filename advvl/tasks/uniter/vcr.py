"""Visual commonsense reasoning: which of four answers, and which of four rationales of the right one?"""

from __future__ import annotations

from typing import ClassVar, Final

from torch import Tensor, nn

from advvl.models.uniter.model import UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.models.uniter.task import UniterTask, answer_head, freeze
from advvl.tasks.losses import class_losses
from advvl.tasks.uniter.pretraining import UniterForPretraining

VCR_TYPE_ROWS: Final = (0, 1, 0, 0)
"""Types of VCR: question 0, region 1, answer 2, rationale 3; with the type of pre-training that each starts from."""

VCR_WORDS: Final = 81
"""Words that VCR adds at the end of the vocabulary, for the people and things that its texts point at."""


class UniterForVCR(UniterTask):
    """UNITER that judges each choice of a question separately (published code, `model/vcr.py`).

    A row is a question with one answer, or a question, its right answer, and one rationale; the choice of the highest
    score for 1 is taken. Each row has its own perturbation.

    Arguments:
        config: of pre-training; four types in all and 81 words are added.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"targets"}
    type_rows: ClassVar[tuple[int, ...]] = VCR_TYPE_ROWS
    new_words: ClassVar[int] = VCR_WORDS

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.vcr_output = answer_head(self.config, 2, nn.ReLU())
        initialise(self.vcr_output, self.config)
        freeze(self.uniter.img_embeddings.mask_embedding)

    def forward(self, *, targets: Tensor | None = None, **fields: Tensor) -> UniterOutput:
        """Scores of wrong and right `(B, 2)`, and with `targets` `(B,)` or `(B, 1)`, 1 for right, each row's loss `(B,)`.

        Other fields are those of `UniterModel.forward`.
        """
        pooled = given("pooler_output", self.uniter(**fields).pooler_output)
        logits: Tensor = self.vcr_output(pooled)
        losses = None if targets is None else class_losses(logits, targets)
        return UniterOutput(loss=losses, losses=losses, logits=logits)


class UniterForVCRPretraining(UniterForPretraining):
    """`UniterForPretraining` with VCR's types and words, for a second stage of pre-training on VCR's own texts.

    Started from a first stage, it keeps all of the masked-word head; the published code keeps none of it.
    """

    type_rows: ClassVar[tuple[int, ...]] = VCR_TYPE_ROWS
    new_words: ClassVar[int] = VCR_WORDS
