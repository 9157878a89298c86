"""Scores: how well a model does on each example of a batch, from a forward that nothing else had a hand in.

Legend: N examples, B rows of a batch, A answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs
from advvl.errors import DataError, NonFiniteError, ShapeError
from advvl.evaluation.objectives import as_scores, score
from advvl.runtime.randomness import preserved
from advvl.runtime.states import kept_buffers, kept_modes

Batch = Mapping[str, Any]
Targets = Callable[[Batch], Tensor]
Score = Callable[[Outputs, Batch], Tensor]


def own_targets(batch: Batch) -> Tensor:
    """The batch's field `targets`.

    Raises:
        DataError: it has none.
    """
    targets = batch.get("targets")
    if not isinstance(targets, Tensor):
        raise DataError("expected a batch with a tensor 'targets', got none; pass targets=, from a batch to its scores")
    return targets


def targets_of(batch: Batch, targets: Targets, score: Score | None) -> Tensor | None:
    """The targets of a batch, `(B, …)`; None where a score of the user's needs none and the batch has none."""
    try:
        return targets(batch)
    except DataError:
        if score is None:
            raise
        return None


def answer_score(adapter: Adapter, targets: Targets = own_targets) -> Score:
    """The score of the answer of the largest logit, as `objectives.score` defines it.

    Arguments:
        adapter: reads the logits `(B, A)`.
        targets: from a batch to its soft scores `(B, A)` in [0, 1], or class ids `(B,)`, whole numbers.

    Returns:
        From outputs and batch to `(B,)`. It raises DataError for other targets, NonFiniteError for logits of NaN.
    """

    def scored(outputs: Outputs, batch: Batch) -> Tensor:
        logits = adapter.logits(outputs)
        soft = as_scores(targets(batch), logits)
        if not ((soft >= 0) & (soft <= 1)).all():
            raise DataError("expected targets that are scores in [0, 1], got some outside; divide counts by their cap")
        return judged(logits, soft)

    return scored


def judged(logits: Tensor, targets: Tensor) -> Tensor:
    """The score `(B,)`, fp64, of the answer of the largest logit.

    Raises:
        NonFiniteError: logits that are not a number.
    """
    if logits.isnan().any():
        raise NonFiniteError("expected logits to judge answers by, got some that are not a number; see the model")
    return score(logits.detach(), targets).double()


def checked_scores(scores: object) -> Tensor:
    """The scores that a function of the user's gave, `(B,)` in fp64.

    Raises:
        ShapeError: anything but one number for each example.
        NonFiniteError: one that is not a number.
        DataError: one that is not in [0, 1].
    """
    if not isinstance(scores, Tensor) or scores.ndim != 1:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ShapeError(f"expected score to give one number per example, a tensor (B,), got {got}; reduce other axes")
    wide = scores.detach().double()
    if wide.isnan().any():
        raise NonFiniteError("expected scores in [0, 1], got some that are not a number; see the model and score=")
    if not ((wide >= 0) & (wide <= 1)).all():
        raise DataError(f"expected scores in [0, 1], got {wide.min():g} to {wide.max():g}; divide by the largest one")
    return wide


def fingerprints(batch: Batch, examples: int) -> Tensor:
    """A number of each example's content `(B,)`, int64 on the CPU: equal for equal tensors, whatever the others are.

    Arguments:
        batch: of its tensors those with a row for each example count row by row, the others for all.
    """
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(examples)]
    for name, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            rows = value.detach().cpu().contiguous()
            own = rows.ndim > 0 and len(rows) == examples
            for i, one in enumerate(hashes):
                part = (rows[i] if own else rows).reshape(-1)
                one.update(
                    f"{name} {part.dtype} {tuple(part.shape)} ".encode() + part.view(torch.uint8).numpy().tobytes()
                )
    return torch.tensor([int.from_bytes(one.digest(), "little", signed=True) for one in hashes], dtype=torch.int64)


@contextmanager
def fresh(model: nn.Module, seed: int) -> Iterator[None]:
    """Around a forward that judges: in eval mode, without a graph, its randomness from `seed`; all is left as found.

    The seed keeps a model that draws numbers from drawing the very ones of another forward again.
    """
    with torch.no_grad(), preserved(model), kept_modes(model), kept_buffers(model):
        model.eval()
        torch.manual_seed(seed)
        yield
