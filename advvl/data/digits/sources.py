"""The digits' sources of batches: questions for VQA, captions for pre-training, and the scenes that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from advvl.data.digits.captions import Caption
from advvl.data.digits.questions import Question
from advvl.data.digits.scenes import Scene
from advvl.data.uniter import sources
from advvl.data.uniter.sources import LabelledSource


@dataclass(frozen=True, eq=False)
class QuestionSource(LabelledSource):
    """Questions about scenes: question `i` is about the scene `image_rows[i]`; their label is `targets`."""

    _: KW_ONLY
    scenes: Sequence[Scene]
    questions: Sequence[Question]

    @property
    def targets(self) -> Tensor:
        """The soft scores of the answers, (N, A)."""
        return self.labels["targets"]


@dataclass(frozen=True, eq=False)
class CaptionSource(sources.CaptionSource):
    """Captions of scenes for pre-training."""

    _: KW_ONLY
    scenes: Sequence[Scene]
    captions: Sequence[Caption]
