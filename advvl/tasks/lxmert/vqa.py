"""LXMERT for visual question answering: VQA and GQA."""

from __future__ import annotations

from transformers.models.lxmert.configuration_lxmert import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertVisualAnswerHead

from advvl.errors import ConfigurationError
from advvl.tasks.losses import vqa_losses
from advvl.tasks.lxmert.base import LxmertWithAnswers


class LxmertForVQA(LxmertWithAnswers):  # type: ignore[no-untyped-call]
    """LXMERT that answers questions, VQA's or GQA's: a head of two layers over the pooled first token.

    `targets` are soft scores in [0, 1], `(B, A)`; the mean of the losses is the published loss.

    Arguments:
        config: `num_qa_labels` is A, the number of answers (VQA 3129, GQA 1842).

    Raises:
        ConfigurationError: no answer.
    """

    _losses = staticmethod(vqa_losses)

    def __init__(self, config: LxmertConfig) -> None:
        super().__init__(config)
        if config.num_qa_labels < 1:
            raise ConfigurationError(
                f"expected num_qa_labels of 1 or more, got {config.num_qa_labels!r}; give the number of answers, as of the "
                "task's table"
            )
        self.answer_head = LxmertVisualAnswerHead(config, config.num_qa_labels)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]
