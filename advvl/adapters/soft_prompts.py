"""Soft prompts: positions inserted into texts, which alone are perturbed.

Legend: B rows, T positions, k inserted ones, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from advvl.adapters.injection import Batch
from advvl.adapters.positions import IGNORED
from advvl.checks import at_least, is_choice, shown
from advvl.errors import ConfigurationError, DataError, ShapeError, more

At = Literal["start", "end", "before_labels"]

_PACKED: Final = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens", "seq_idx")
_BEYOND: Final = ("inputs_embeds", "past_key_values", *_PACKED)
_JOINED: Final = ("gather_index", "attn_masks", "txt_lens")


@dataclass(frozen=True)
class SoftPrompt:
    """Adds k positions to each text of a batch, with a mask for a site; a perturbation there is a soft prompt.

        prompt = SoftPrompt(8, token=3)
        target = adapt(model, {"prompt": Site("model.embed_tokens", mask=prompt.mask)})
        found = attack(target, prompt.insert(batch))

    The embedding of an inserted position is that of `token` plus the perturbation. The mask finds positions by that
    token, so the batch needs no other field; padding may use the token too.

    Arguments:
        count: k.
        token: id of the inserted tokens, which no text may contain.
        at: before each text, after it, or before its first label; padding stays outside, on either side. Padding is
            defined by `attention_mask`: without one every position counts as text.

    `UniversalPerturber` gives one vector to each *column* of a batch: pad so that inserted positions share columns (on the
    right for `at="start"`, on the left for `at="end"`).

    Raises:
        ConfigurationError: a count below 1, something else than an id, another place.

    Source: Lester et al., EMNLP 2021 (trained); Schwinn et al., "Soft Prompt Threats", NeurIPS 2024 (as an attack).
    """

    count: int
    _: KW_ONLY
    token: int
    at: At = "start"

    def __post_init__(self) -> None:
        at_least(1, self, "count")
        at_least(0, self, "token")
        if not is_choice(self.at, get_args(At)):
            raise ConfigurationError(f"expected at to be one of {', '.join(get_args(At))}, got {shown(self.at)}")

    def mask(self, batch: Batch) -> Tensor:
        """Return the inserted positions of a lengthened batch, `(B, T)` bool.

        Raises:
            DataError: a batch without `input_ids` `(B, T)`, or with an `attention_mask` of another shape.
        """
        ids = _ids(batch)
        real = batch.get("attention_mask")
        return ids == self.token if real is None else (ids == self.token) & _mask(real, ids).bool()

    def insert(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with k more positions in each text: attended to, without a label, counted by `position_ids`.

        It lengthens `input_ids` `(B, T)` and, if present, `attention_mask` and `labels` of that shape, and `position_ids`
        and `token_type_ids` `(B, T)` or `(1, T)`, and Qwen-VL's `mm_token_type_ids`, where inserted positions count as
        words. Labels of an encoder-decoder's answers do not have that shape: add them afterwards.

        Raises:
            DataError: packed texts, `inputs_embeds`, words joined with regions as UNITER's, another field with an
                entry per token, a text with `token` in it or with gaps in its mask or positions; with `at="before_labels"` a
                row without a label at a real position.
        """
        ids = _ids(batch)
        _check_texts(batch)
        real = _real(batch.get("attention_mask"), ids)
        if bool((real & (ids == self.token)).any()):
            raise DataError(
                f"expected texts without token {self.token}, which marks inserted positions, got some; give an unused id"
            )
        first = real.int().argmax(1)
        start = self._place(batch, real, first)
        length = ids.shape[1]
        columns = torch.arange(length + self.count, device=ids.device)[None]
        before = columns < start[:, None]
        source = torch.where(before, columns, columns - self.count).clamp(min=0)
        new = ~before & (columns < start[:, None] + self.count)

        def lengthened(values: Tensor, inserted: int | Tensor) -> Tensor:
            return torch.where(new, inserted, values.gather(1, source)).to(values.dtype)

        result = dict(batch)
        for name, value in batch.items():
            if name == "input_ids":
                result[name] = lengthened(ids, self.token)
            elif name == "attention_mask" and value is not None:
                result[name] = lengthened(value, 1)
            elif name == "position_ids" and value is not None:
                positions = _positions(value, ids, real)
                shifted = lengthened(positions, 0) + torch.where(before, 0, self.count)
                counted = positions.gather(1, first[:, None]) + columns - first[:, None]
                result[name] = torch.where(new, counted, shifted).to(value.dtype)
            elif name == "token_type_ids" and value is not None:
                types = _per_token(name, value, ids)
                near = torch.where(start > first, start - 1, first)  # the token before, or else the one after
                result[name] = lengthened(types, types.gather(1, near[:, None]))
            elif name == "mm_token_type_ids" and value is not None:
                result[name] = lengthened(_per_token(name, value, ids), 0)  # 0: a word, neither image nor video
            elif name == "labels" and isinstance(value, Tensor) and value.ndim == 2:
                result[name] = self._labels(value, ids, lengthened)
            elif _has_entries(value, ids, scored=name == "labels"):
                raise DataError(
                    f"expected fields that can be lengthened, got {name!r} with an entry per token of {tuple(ids.shape)}; "
                    f"add it to the result{more('inserted-positions')}"
                )
        return result

    def place(self, vectors: Tensor, batch: Batch) -> Tensor:
        """Return perturbations `(B, T, D)` of a lengthened batch for `Adapter.inject`: these vectors, and 0 elsewhere.

        Arguments:
            vectors: `(k, D)`, for all rows, or `(B, k, D)`.

        Raises:
            ShapeError: vectors of another shape, or a batch without exactly k inserted positions in each row.
        """
        if not isinstance(vectors, Tensor):
            raise ShapeError(
                f"expected vectors as a tensor (k, D) or (B, k, D), got {type(vectors).__name__}; give one"
            )
        mask = self.mask(batch)
        rows = len(mask)
        if not bool((mask.sum(1) == self.count).all()):
            raise ShapeError(
                f"expected {self.count} inserted positions in each row, got {mask.sum(1).tolist()}; see insert"
            )
        if vectors.ndim not in (2, 3) or vectors.shape[-2] != self.count or vectors.shape[:-2] not in ((), (rows,)):
            raise ShapeError(
                f"expected vectors (k, D) or (B, k, D) of {self.count} positions in {rows} rows, got "
                f"{tuple(vectors.shape)}; as delta[mask].view(B, k, D) is"
            )
        found = vectors.new_zeros(*mask.shape, vectors.shape[-1])
        found[mask.to(vectors.device)] = vectors.expand(rows, -1, -1).flatten(0, 1)
        return found

    def _place(self, batch: Mapping[str, Any], real: Tensor, first: Tensor) -> Tensor:
        """The column `(B,)` at which they are inserted."""
        if self.at != "before_labels":
            return first if self.at == "start" else first + real.sum(1)
        labels = batch.get("labels")
        words = isinstance(labels, Tensor) and labels.shape == real.shape and not labels.is_floating_point()
        counts = (labels != IGNORED) & real if words else torch.zeros_like(real)  # padding may be labelled
        if not bool(counts.any(1).all()):
            rows = (~counts.any(1)).nonzero().flatten().tolist()
            raise DataError(
                f"expected a label other than -100 at a real position of each row, got none in rows {rows}; give labels, or "
                "at='end'"
            )
        return counts.int().argmax(1)

    def _labels(self, labels: Tensor, ids: Tensor, lengthened: Any) -> Any:
        """Labels of words with nothing to predict at inserted positions; scores `(B, A)` of whole texts as they are."""
        if labels.is_floating_point():
            return labels
        if labels.shape != ids.shape:
            raise DataError(
                f"expected labels of input_ids' shape {tuple(ids.shape)}, got {tuple(labels.shape)}; those of a decoder's "
                f"answers are added to the result{more('inserted-positions')}"
            )
        return lengthened(labels, IGNORED)


def _ids(batch: Any) -> Tensor:
    """The `input_ids` `(B, T)` of a batch."""
    if not isinstance(batch, Mapping):
        raise DataError(f"expected a batch as a mapping with input_ids, got {type(batch).__name__}; give one")
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.shape[1] or ids.dtype not in (torch.int32, torch.int64):
        raise DataError(
            f"expected input_ids (B, T) of whole numbers, got {_described(ids)}; give a batch of token ids, int32 or int64"
        )
    return ids


def _check_texts(batch: Mapping[str, Any]) -> None:
    """Refuse rows that are not one text each, alone in its sequence and given by its ids."""
    for name in _BEYOND:
        if batch.get(name) is not None:
            raise DataError(
                f"expected rows of one text each, given by input_ids, got {name!r}, which cannot be lengthened; leave it "
                f"out{more('inserted-positions')}"
            )
    for name in _JOINED:
        if batch.get(name) is not None:
            raise DataError(
                f"expected texts alone in their sequences, got {name!r}, which places words beside regions; perturb the "
                f"words{more('inserted-positions')}"
            )


def _mask(mask: Any, ids: Tensor) -> Tensor:
    """An `attention_mask` that is one of the ids' shape."""
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise DataError(
            f"expected attention_mask of 0 and 1, of input_ids' shape {tuple(ids.shape)}, got {_described(mask)}; give the "
            f"tokeniser's{more('inserted-positions')}"
        )
    return mask


def _real(mask: Any, ids: Tensor) -> Tensor:
    """The texts `(B, T)`, bool: one run of positions in each row."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    real = _mask(mask, ids).bool()
    if bool((mask != real).any()):
        raise DataError(
            "expected attention_mask of 0 and 1, got other numbers, as an additive mask has; give the tokeniser's"
            f"{more('inserted-positions')}"
        )
    starts = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
    if not bool((starts.sum(1) == 1).all()):
        raise DataError(
            f"expected one text without gaps in each row, got {starts.sum(1).tolist()} by attention_mask; pad on one side"
        )
    return real


def _per_token(name: str, values: Any, ids: Tensor) -> Tensor:
    """A field with an entry per token, `(B, T)`; given so, or `(1, T)` for all rows."""
    length = ids.shape[1]
    if not isinstance(values, Tensor) or values.shape not in (ids.shape, (1, length)):
        raise DataError(
            f"expected {name} {tuple(ids.shape)} or (1, {length}), got {_described(values)}; leave them out where the model "
            f"makes them{more('inserted-positions')}"
        )
    return values.expand(ids.shape)


def _positions(positions: Any, ids: Tensor, real: Tensor) -> Tensor:
    """The `position_ids` `(B, T)`, which count each text through."""
    found = _per_token("position_ids", positions, ids)
    both = real[:, 1:] & real[:, :-1]
    if bool((both & (found.diff(dim=1) != 1)).any()):
        raise DataError(
            "expected position_ids that count through one text in each row, got some that start again; do not pack"
            f"{more('inserted-positions')}"
        )
    return found


def _has_entries(value: Any, ids: Tensor, *, scored: bool) -> bool:
    """True of a field with an entry per token: a tensor `(B, T)` or `(B, T, n)`, or B lists or tensors of T entries.

    Floating-point numbers `(B, n, D)` may be features of as many regions; they count as entries of tokens if `scored`.
    """
    if isinstance(value, Tensor):
        features = value.ndim == 3 and value.is_floating_point() and not scored
        return value.shape[:2] == ids.shape and value.ndim <= 3 and not features
    rows, length = ids.shape
    if not isinstance(value, list | tuple) or len(value) != rows or not rows:
        return False
    lists = [one for one in value if isinstance(one, list | tuple) or (isinstance(one, Tensor) and one.ndim)]
    return [len(one) for one in lists] == [length] * rows


def _described(value: object) -> str:
    """The shape and dtype of a tensor, the type of anything else."""
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
