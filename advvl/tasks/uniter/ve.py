"""Visual entailment: does a picture entail a sentence, contradict it, or neither?"""

from __future__ import annotations

from advvl.data.uniter.datasets.answers import VE_LABELS as VE_LABELS
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.uniter.vqa import UniterForVQA


class UniterForVE(UniterForVQA):
    """`UniterForVQA` with the three answers of `VE_LABELS`; `targets` are shares of the annotators, `(B, 3)`.

    The loss is a sum of three sigmoid losses, not one softmax's, as published (`model/ve.py`).
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config, num_answers=len(VE_LABELS))
