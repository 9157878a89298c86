"""Answers of a language model: their tokens and likelihood, and losses over pairs of an answer to shun and one to give.

A batch is a decoder's: `input_ids`, `attention_mask`, and `labels`, which are the ids where a token belongs to the answer
and -100 elsewhere. In a batch of pairs row i of the first half is a prompt with the answer to shun, and row i of the second
the same prompt with the answer to give, both padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs, read_logits
from advvl.errors import DataError
from advvl.passes.objective import Loss

IGNORED = -100  # the label of a token that is not predicted, as of torch's cross_entropy


class Answers(NamedTuple):
    """The log-probability of each token of the answers `(B, T)`, 0 elsewhere, and where they are, bool."""

    logps: Tensor
    counts: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values of tokens over each answer, `(B,)`."""
        return torch.where(self.counts, values, 0.0).sum(1) / self.counts.sum(1)


def prompts(batch: Batch) -> Tensor:
    """The mask of the prompts' tokens `(B, T)`, bool: real, and not the answer's; as in `Site("…", mask=prompts)`.

    Raises:
        DataError: as `answers`.
    """
    labels, real = batch["labels"], batch["attention_mask"].bool()
    mask: Tensor = real & (labels == IGNORED)
    _predicted(labels)
    return mask


def answers(outputs: Outputs, batch: Batch) -> Answers:
    """The likelihood of the answers; the logits at a position predict the token after it.

    Raises:
        DataError: a row without a token of an answer; reads from the device.
    """
    logits, counts = read_logits(outputs)[:, :-1], _predicted(batch["labels"])
    labels, wide = batch["labels"][:, 1:], logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return Answers(-losses.view(labels.shape), counts)


def _predicted(labels: Tensor) -> Tensor:
    """Where the answers' tokens are that something predicts, `(B, T-1)`; refuse a row without one."""
    counts = labels[:, 1:] != IGNORED
    if not bool(counts.any(1).all()):
        rows = (~counts.any(1)).nonzero().flatten().tolist()
        raise DataError(
            f"expected labels with a token of the answer in each row, got none in rows {rows}; give its ids there"
        )
    return counts


def cross_entropy(found: Answers) -> Tensor:
    """The mean cross-entropy of each answer, `(B,)`."""
    return found.mean(-found.logps)


def unlikely(found: Answers) -> Tensor:
    """The mean of −log(1 − p) over each answer's tokens, `(B,)`; those with log p below −5 count as 0 (LAT)."""
    inner = found.counts & (found.logps >= -5)
    logps = torch.where(inner, found.logps, -1.0).clamp(max=-torch.finfo(found.logps.dtype).eps)
    return found.mean(torch.where(inner, -torch.log(-torch.expm1(logps)), 0.0))


def away(found: Answers) -> Tensor:
    """−CE of each answer, `(B,)`; below −5 only a thousandth of it (CAT)."""
    loss = -cross_entropy(found)
    return torch.where(loss < -5, -5 + 0.001 * loss, loss)


def toward(found: Answers) -> Tensor:
    """CE of each answer, `(B,)`; below 0.5 only a thousandth of it (CAT)."""
    loss = cross_entropy(found)
    return torch.where(loss < 0.5, 0.5 + 0.001 * loss, loss)


def forcing(outputs: Outputs, batch: Batch) -> Tensor:
    """Minus the cross-entropy of each row's answer `(B,)`: an attack that climbs it forces that answer."""
    return -cross_entropy(answers(outputs, batch))


def of_pairs(shunned: Callable[[Answers], Tensor] | None, given: Callable[[Answers], Tensor] | None) -> Loss:
    """The loss of a batch of pairs, `(B,)`: one function of the first half's answers and another of the second's.

    Arguments:
        shunned, given: from the `Answers` of a half to one loss per row; None: 0.

    Raises (when called):
        DataError: an odd number of rows, or as `answers`.
    """

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        found = answers(outputs, batch)
        if len(found.logps) % 2:
            raise DataError(f"expected a batch of pairs, got {len(found.logps)} rows; see advvl.recipes.answers")
        halves = [Answers(*half) for half in zip(*(side.chunk(2) for side in found), strict=True)]
        return torch.cat(
            [
                half.logps.sum(1) * 0 if term is None else term(half)
                for term, half in zip((shunned, given), halves, strict=True)
            ]
        )

    return loss
