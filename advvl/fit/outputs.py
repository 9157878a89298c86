"""The forwards of a model inside a trainer's `compute_loss`, which gives the loss alone.

A loss may run the model again without gradients: for the reference of DPO, which is the model with its adapter off, or
for metrics. The outputs of such a forward are not those of the pass, and it is not perturbed.

A trainer of TRL requests only the probabilities of the labels, by `fused_lm_head=True`, so that the full logits are
never in memory. A regulariser, or a loss of the method's own, reads full logits: then the model computes them, and the
values for the trainer are computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def kept_outputs(model: nn.Module, *, logits: bool) -> Iterator[list[Any]]:
    """Keep the outputs of the forwards inside this context, in order; not of those that gradients are switched off for.

    Arguments:
        logits: make a model with a fused head return logits too.
    """
    kept: list[Any] = []
    head, with_gradients = _WholeHead(), torch.is_grad_enabled()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if torch.is_grad_enabled() or not with_gradients:
            kept.append(output)

    handles = []
    if logits:
        handles += [
            model.register_forward_pre_hook(head.before, with_kwargs=True),
            model.register_forward_hook(head.after),
        ]
    handles.append(model.register_forward_hook(keep))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def clean_without_gradients(model: nn.Module, clean: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Run those forwards of the model clean that gradients are switched off for inside this context.

    Arguments:
        clean: gives the context in which a forward is not perturbed.
    """
    opened: list[ExitStack] = []

    def before(module: nn.Module, args: Any) -> None:
        del module, args
        opened.append(ExitStack())
        if not torch.is_grad_enabled():
            opened[-1].enter_context(clean())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        opened.pop().close()

    handles = []
    if torch.is_grad_enabled():  # otherwise the pass itself has no gradients
        handles = [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WholeHead:
    """Answers a call with `fused_lm_head=True` from whole logits."""

    def __init__(self) -> None:
        self._labels: Tensor | None = None

    def before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        rest = dict(kwargs)
        asked = rest.pop("fused_lm_head", False)
        self._labels = rest.pop("labels") if asked else None
        return args, rest

    def after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        del module, args
        if self._labels is not None:
            for name, value in _of_labels(outputs.logits, self._labels).items():
                setattr(outputs, name, value)
        return outputs


def _of_labels(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The fields of TRL's `FusedCausalLMOutput` at temperature 1: of each next word, 0 where it has no label (-100).

    Arguments:
        logits: `(B, T, V)`, longer where PEFT puts virtual tokens before the words.
        labels: `(B, T)`.
    """
    scores = logits[:, -labels.shape[1] : -1].to(torch.promote_types(logits.dtype, torch.float32))
    log_probs = scores.log_softmax(-1)
    mask = labels[:, 1:] != -100
    words = labels[:, 1:].clamp(min=0)
    found = {
        "log_probs": log_probs.gather(-1, words.unsqueeze(-1)).squeeze(-1),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "log_sum_sq_probs": (2 * log_probs.detach()).logsumexp(-1),
        "mean_logits": scores.detach().mean(-1),
    }
    fields = {name: value.masked_fill(~mask, 0) for name, value in found.items()}
    return {**fields, "is_top1": (log_probs.argmax(-1) == words) & mask, "label_mask": mask}
