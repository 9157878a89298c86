"""Visual question answering: one score per answer, trained on soft targets."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from advvl.errors import ConfigurationError
from advvl.models.uniter.model import UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.tasks.losses import vqa_losses


class UniterForVQA(nn.Module):
    """UNITER and a head of two layers over its pooled first token (published code, `model/vqa.py`).

    Arguments:
        num_answers: A, the number of answers.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"targets"}

    def __init__(self, config: UniterConfig, *, num_answers: int) -> None:
        super().__init__()
        if num_answers < 1:
            raise ConfigurationError(f"expected num_answers of 1 or more, got {num_answers!r}")
        self.config = config
        self.num_answers = num_answers
        self.uniter = UniterModel(config)
        width = config.hidden_size
        self.vqa_output = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.LayerNorm(2 * width, eps=config.layer_norm_eps),
            nn.Linear(2 * width, num_answers),
        )
        initialise(self.vqa_output, config)
        # No region is masked here: a parameter that no backward reaches would keep DistributedDataParallel waiting.
        self.uniter.img_embeddings.mask_embedding.requires_grad_(False)

    def forward(self, *, targets: Tensor | None = None, **fields: Tensor) -> UniterOutput:
        """Scores of the answers `(B, A)`, and with `targets` `(B, A)` in [0, 1] each row's loss `(B,)`.

        Other fields are those of `UniterModel.forward`.
        """
        pooled = given("pooler_output", self.uniter(**fields).pooler_output)
        logits: Tensor = self.vqa_output(pooled)
        losses = None if targets is None else vqa_losses(logits, targets)
        return UniterOutput(loss=losses, losses=losses, logits=logits)
