"""Random batches for tiny UNITERs, with UNITER's field names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advvl.models.uniter.model import UniterConfig, gather_index

LENGTHS = ((9, 6, 3, 8), (5, 7, 4, 1))  # tokens and regions of each row; the longest text has not the most regions


def uniter_batch(
    txt_lens: Sequence[int] = LENGTHS[0],
    num_bbs: Sequence[int] = LENGTHS[1],
    *,
    config: UniterConfig | None = None,
    more_text: int = 0,
    more_regions: int = 0,
    more_places: int = 0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A row's content depends on its lengths and the seed alone, not on the padding, which `more_…` widens."""
    config = config or UniterConfig.tiny()
    words, boxes = torch.tensor(txt_lens), torch.tensor(num_bbs)
    rows, longest, most = len(words), int(words.max()) + more_text, int(boxes.max()) + more_regions
    ids = torch.zeros(rows, longest, dtype=torch.long)
    features = torch.zeros(rows, most, config.img_dim, dtype=dtype)
    positions = torch.zeros(rows, most, 7, dtype=dtype)
    for row, (tokens, regions) in enumerate(zip(txt_lens, num_bbs, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + 100 * tokens + regions)
        ids[row, :tokens] = torch.randint(1, config.vocab_size, (tokens,), generator=generator)
        drawn = torch.randn(regions, config.img_dim, generator=generator, dtype=torch.float64)
        features[row, :regions] = drawn.to(dtype)
        positions[row, :regions] = torch.rand(regions, 7, generator=generator, dtype=torch.float64).to(dtype)
    index = gather_index(words, boxes, longest)
    index = torch.nn.functional.pad(index, (0, more_places))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(longest)[None],
        "img_feat": features,
        "img_pos_feat": positions,
        "attn_masks": (torch.arange(index.shape[1]) < (words + boxes)[:, None]).long(),
        "gather_index": index,
        "txt_lens": words,
        "num_bbs": boxes,
    }


def without_lengths(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("txt_lens", "num_bbs")}
