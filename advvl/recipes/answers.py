"""Answers of a language model: their tokens and likelihood, and losses over pairs of an answer to shun and one to give.

A batch is that of a decoder: `input_ids`, `attention_mask`, and `labels`, which are the ids of the answer's tokens and
-100 elsewhere. In a batch of pairs, row i of the first half is a prompt with the answer to shun, and row i of the
second half is the same prompt with the answer to give; both are padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advvl.adapters.injection import Batch
from advvl.adapters.outputs import Outputs, read_logits
from advvl.adapters.positions import IGNORED
from advvl.errors import DataError
from advvl.passes.objective import Loss


class Answers(NamedTuple):
    """The logits `(B, T, V)` that predict the tokens of the answers, and those tokens `(B, T)`, -100 elsewhere."""

    logits: Tensor
    labels: Tensor

    @property
    def counts(self) -> Tensor:
        """The mask of the answers' tokens, `(B, T)` bool."""
        return self.labels != IGNORED

    @property
    def logps(self) -> Tensor:
        """The log-probability of each token, `(B, T)`; 0 elsewhere."""
        losses = F.cross_entropy(
            self.logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return -losses.view(self.labels.shape)

    @property
    def others(self) -> Tensor:
        """The log-probability log(1 − p) of all other tokens, `(B, T)`: summed over them, since 1 − p rounds to 0."""
        tokens = self.labels.clamp(min=0).unsqueeze(-1)
        return F.log_softmax(self.logits, dim=-1).scatter(-1, tokens, -math.inf).logsumexp(-1)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values of tokens over each answer, `(B,)`."""
        return torch.where(self.counts, values, 0.0).sum(1) / self.counts.sum(1)


def prompts(batch: Batch) -> Tensor:
    """The mask of the prompts' tokens `(B, T)`, bool: the real ones outside the answer; as in `Site("…", mask=prompts)`.

    Raises:
        DataError: as `answers`.
    """
    labels, real = batch["labels"], batch["attention_mask"].bool()
    mask: Tensor = real & (labels == IGNORED)
    _check_predicted(labels)
    return mask


def answers(outputs: Outputs, batch: Batch) -> Answers:
    """The answers with what predicts them, in fp32 at least; the logits at a position predict the token after it.

    Raises:
        DataError: a row without a token of an answer; reads from the device.
    """
    logits, labels = read_logits(outputs)[:, :-1], batch["labels"]
    _check_predicted(labels)
    return Answers(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:])


def _check_predicted(labels: Tensor) -> None:
    """Refuse a row without a token of the answer that something predicts."""
    counts = labels[:, 1:] != IGNORED
    if not bool(counts.any(1).all()):
        rows = (~counts.any(1)).nonzero().flatten().tolist()
        raise DataError(
            f"expected labels with a token of the answer in each row, got none in rows {rows}; give its ids there"
        )


def cross_entropy(found: Answers) -> Tensor:
    """The mean cross-entropy of each answer, `(B,)`."""
    return found.mean(-found.logps)


def unlikely(found: Answers) -> Tensor:
    """The mean of −log(1 − p) over each answer's tokens, `(B,)`; those with log p below −5 count as 0 (LAT)."""
    inner = found.counts & (found.logps >= -5)
    return found.mean(torch.where(inner, -found.others, 0.0))


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
        _check_pairs(len(found.labels))
        halves = [Answers(*half) for half in zip(*(side.chunk(2) for side in found), strict=True)]
        return torch.cat(
            [
                half.logits.new_zeros(len(half.labels)) if term is None else term(half)
                for term, half in zip((shunned, given), halves, strict=True)
            ]
        )

    return loss


def ipo(beta: float) -> Loss:
    """The loss (h − 1/(2β))² of a batch of pairs, a scalar, where h measures the preference for the given answer.

    h is the difference of the mean log-probabilities of the given and the shunned answer, each minus its entry in the
    batch's `reference_logps` `(B,)`, which get no gradient. Without a pair the loss is 0. Azar et al., "A General
    Theoretical Paradigm to Understand Learning from Human Preferences", AISTATS 2024.

    Raises (when called):
        DataError: an odd number of rows, no finite `reference_logps` for each row, or as `answers`; reads from the device.
    """

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        logps, reference = forcing(outputs, batch), batch.get("reference_logps")
        _check_pairs(len(logps))
        if not isinstance(reference, Tensor) or reference.shape != logps.shape:
            got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
            raise DataError(
                f"expected pairs with reference_logps ({len(logps)},), got {got}; give forcing(…) of the reference's outputs"
            )
        finite = reference.isfinite()
        if not bool(finite.all()):  # a step would say that the loss is NaN, not why
            rows = (~finite).nonzero().flatten().tolist()
            raise DataError(f"expected finite reference_logps, got others in rows {rows}; compute those again")
        shunned, given = (logps - reference.detach()).chunk(2)
        return (given - shunned - 1 / (2 * beta)).square().sum() / max(len(given), 1)  # 0 of no pairs, not NaN

    return loss


def _check_pairs(rows: int) -> None:
    if rows % 2:
        raise DataError(f"expected a batch of pairs, got {rows} rows; see advvl.recipes.answers")
