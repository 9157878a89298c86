"""The sample of each word, and the masks of words, read from a batch.

A row may hold several texts, one after another, without padding. Such a batch marks their starts by `cu_seq_lens_q`,
`seq_idx`, a mask with an entry for each pair of words, or `position_ids` that start again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from advvl.adapters.injection import Batch
from advvl.errors import DataError, more

# names in transformers' collators and models for the ends of concatenated texts
_ENDS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")

_LOWEST = -1e4  # of an additive mask: the value that some models still use for a word that is not attended to


def attended(batch: Batch) -> Tensor:
    """The real words, of the shape of `input_ids`: those that some word attends to; without an `attention_mask` all."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    found = [real.any(1) if of_pairs else real for real, of_pairs in _masks(mask, ids)]
    return torch.stack([real.expand(ids.shape) for real in found]).any(0)


class UnmaskedPadding:
    """The mask of words, which warns once of padding in a batch without an `attention_mask`.

    On a device other than the CPU only the first batch is checked, because that waits for the device.

    Arguments:
        mask: from the batch to the mask.
        pad: the id that padding has.
    """

    def __init__(self, mask: Callable[[Batch], Tensor], pad: int) -> None:
        self.mask, self.pad = mask, pad
        self._seen = self._warned = False

    def __call__(self, batch: Batch) -> Tensor:
        if not self._warned and batch.get("attention_mask") is None:
            ids = batch["input_ids"]
            if (ids.is_cpu or not self._seen) and ids.shape[-1] > 1:
                self._seen, self._warned = True, bool((ids[..., (0, -1)] == self.pad).any())
                if self._warned:
                    warnings.warn(
                        f"expected an attention_mask beside padded input_ids, got none: padding (id {self.pad}) counts as "
                        "words; give the tokenizer's",
                        stacklevel=2,
                    )
        return self.mask(batch)


def samples(batch: Batch, *, by_position: bool) -> Tensor | None:
    """The sample of each word `(B, T)`, numbered through the batch; None: a row is a sample.

    Arguments:
        batch: with `input_ids` `(B, T)`.
        by_position: the model separates texts by `position_ids` that start again.

    Raises:
        DataError: ends of texts that are not those of `input_ids`.
    """
    ids = batch["input_ids"]
    if ids.ndim != 2:
        return None
    starts = _starts(batch, ids, by_position=by_position)
    if starts is None or not starts[:, 1:].any():
        return None
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view(ids.shape) - 1


def row_samples(batch: Batch, *, by_position: bool) -> Tensor:
    """The sample of each word `(B, T)`, also where a row is a sample."""
    found = samples(batch, by_position=by_position)
    ids = batch["input_ids"]
    return torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape) if found is None else found


def separates_by_position(model: PreTrainedModel) -> bool:
    """True if a part of the model makes its causal mask by transformers' functions, which read `position_ids`."""
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return any("create_causal_mask" in _names(part) for part in parts)


def _names(part: PreTrainedModel) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return () if code is None else code.co_names


def _starts(batch: Batch, ids: Tensor, *, by_position: bool) -> Tensor | None:
    """The words `(B, T)` that begin a text, as far as the batch marks them; the first word of a row always does."""
    ends = next((batch[name] for name in _ENDS if batch.get(name) is not None), None)
    if ends is not None:
        if int(ends[-1]) != ids.numel():
            raise DataError(
                f"expected the ends of texts up to the {ids.numel()} words of input_ids, got {ends.tolist()[-3:]} last; "
                f"give those of one collator{more('packed-text')}"
            )
        marks = torch.zeros(ids.numel() + 1, dtype=torch.bool, device=ids.device)
        return marks.index_fill(0, ends.long().to(ids.device), True)[:-1].view(ids.shape)
    if (index := batch.get("seq_idx")) is not None:
        return _changes(index.expand(ids.shape))
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    pairs = [] if mask is None else [pairs for pairs, of_pairs in _masks(mask, ids) if of_pairs]
    if pairs and pairs[0].shape[1:] == (ids.shape[1],) * 2:
        either = torch.stack([(p | p.transpose(1, 2)).diagonal(1, 1, 2).expand(len(ids), -1) for p in pairs]).any(0)
        real = attended(batch)
        return torch.nn.functional.pad(real[:, 1:] & real[:, :-1] & ~either, (1, 0))
    if mask is None and positions is not None and by_position:
        return _restarts(positions, ids)
    return None


def _restarts(positions: Tensor, ids: Tensor) -> Tensor:
    """The words at which `position_ids` start again; of three axes of an image's positions all do so at 0."""
    if positions.ndim == 3 and len(positions) == 3:
        return (positions == 0).all(0).expand(ids.shape).clone()
    positions = positions[0] if positions.ndim == 3 else positions
    return torch.nn.functional.pad((positions.diff(dim=1) != 1).expand(len(ids), -1), (1, 0))


def _changes(index: Tensor) -> Tensor:
    return torch.nn.functional.pad(index.diff(dim=1) != 0, (1, 0))


def _masks(mask: Any, ids: Tensor) -> list[tuple[Tensor, bool]]:
    """The masks of a batch, bool, each with whether it is of pairs `(B, T, T)`, word that attends first, or of words.

    Raises:
        DataError: a mask that is no tensor, or of other words than `input_ids`.
    """
    found = []
    for one in mask.values() if isinstance(mask, Mapping) else [mask]:
        if not isinstance(one, Tensor) or one.shape[-1:] != ids.shape[-1:] or one.ndim < ids.ndim:
            got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise DataError(
                f"expected attention_mask over the words of input_ids {tuple(ids.shape)}, got {got}; give one such, or a "
                f"mask of your own{more('packed-text')}"
            )
        of_pairs = one.ndim > ids.ndim
        if one.is_cpu and not of_pairs and not one.is_floating_point() and (one > 1).any():
            raise DataError(
                f"expected attention_mask of 0 and 1, got numbers up to {int(one.max())}; give position_ids that start "
                f"again at each text{more('packed-text')}"
            )
        real = one > _LOWEST if of_pairs and one.is_floating_point() else one.bool()
        if of_pairs and real.ndim == 4:
            real = real.any(1)  # of any head
        found.append((real, of_pairs))
    return found
