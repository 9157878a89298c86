"""Image-text retrieval: a score for each pair, trained to rank a match above mismatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advvl.checks import is_whole, positive
from advvl.data.source import BatchSource
from advvl.errors import ConfigurationError, DataError, ShapeError
from advvl.models.uniter.layout import gather_index
from advvl.models.uniter.model import UniterConfig, UniterModel, UniterOutput, given, initialise
from advvl.models.uniter.task import UniterTask, freeze
from advvl.runtime.states import kept_modes


class UniterForRetrieval(UniterTask):
    """UNITER and a score of its pooled first token, trained in groups (published code, `model/itm.py`).

    A group is `sample_size` rows: a text and its image, then mismatches of either. The loss is a margin between the
    match's probability, the sigmoid of its score, and each mismatch's. Logits have a row for each group, `(G,
    sample_size)`: `SymmetricKL()` compares the choice of the match in the group, a softmax of the scores;
    `SymmetricKL(head="sigmoid")` compares each pair's own probability. Each pair has its own perturbation.

    Arguments:
        margin: that of the published configurations is 0.2.

    Raises:
        ConfigurationError: a margin that is not above 0.
    """

    fields: ClassVar[frozenset[str]] = UniterModel.fields - {"img_masks"} | {"sample_size"}

    def __init__(self, config: UniterConfig, *, margin: float = 0.2) -> None:
        super().__init__(config)
        self.margin = margin
        positive(self, "margin")
        self.itm_output = nn.Linear(config.hidden_size, 2)  # of pre-training; kept so that checkpoints are whole
        self.rank_output = nn.Linear(config.hidden_size, 1)
        initialise(self.itm_output, config)
        initialise(self.rank_output, config)
        freeze(self.itm_output, self.uniter.img_embeddings.mask_embedding)

    def examples(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The group of each row; None where the batch has none."""
        words: Tensor = batch["input_ids"]
        size = _size(batch.get("sample_size"), len(words))
        return None if size == 1 else torch.arange(len(words), device=words.device) // size

    def derived(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranking head, of a file that has none: pre-training's score of a match, copied."""
        names = {f"rank_output.{last}": f"itm_output.{last}" for last in ("weight", "bias")}
        return {
            name: state[of][1:]
            for name, of in names.items()
            if name not in state and of in state and len(state[of]) == 2
        }

    def forward(self, *, sample_size: int | Tensor | None = None, **fields: Tensor) -> UniterOutput:
        """Scores of the pairs `(G, sample_size)`, and in groups of two or more each group's loss `(G,)`.

        Arguments:
            sample_size: rows of a group, the match first; None: a row is a group, which has no loss.
            fields: those of `UniterModel.forward`.

        Returns:
            `losses` are those of each mismatch, `(G, sample_size - 1)`; a group's loss is their mean.

        Raises:
            ShapeError: rows that are no whole number of groups.
        """
        size = _size(sample_size, len(given("input_ids", fields.get("input_ids"))))
        scores: Tensor = self.rank_output(self.uniter(**fields).pooler_output)
        logits = scores.reshape(-1, size)
        if size == 1:
            return UniterOutput(logits=logits)
        chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        losses = (self.margin + chances[:, 1:] - chances[:, :1]).clamp(min=0)
        return UniterOutput(loss=losses.mean(1), losses=losses, logits=logits)


def hardest(model: nn.Module, batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The group of a match and its hardest mismatches: those of the highest scores, found in eval mode without gradients.

    Chen et al., ECCV 2020 (published code, `UniterForImageTextRetrievalHardNeg`). Train on the group as on any other.

    Arguments:
        model: a `UniterForRetrieval`, wrapped or not; modes are as before afterwards.
        batch: one text and N images, or one image and N texts, the match first. The one text or image has one row.
            `txt_lens` and `num_bbs`, `(N,)`, say what is real.
        count: mismatches to take.

    Returns:
        The fields of `1 + count` rows, in no promised order but for the match, with `sample_size`. Regions are cut to the
        most in a row; texts are not cut, as published.

    Raises:
        DataError: two shared sides, or none; a field that is missing.
        ConfigurationError: a count below 1 or above the number of mismatches.
    """
    words, regions = given("input_ids", batch.get("input_ids")), given("img_feat", batch.get("img_feat"))
    lengths, boxes = given("txt_lens", batch.get("txt_lens")), given("num_bbs", batch.get("num_bbs"))
    rows = len(boxes)
    if rows < 2 or sorted((len(words), len(regions))) != [1, rows]:
        raise DataError(
            f"expected one text and {rows} images, or the reverse, got {len(words)} and {len(regions)} for "
            f"num_bbs {tuple(boxes.shape)}; give the shared side one row"
        )
    if not is_whole(count) or not 1 <= count < rows:
        raise ConfigurationError(f"expected count of hardest mismatches in 1..{rows - 1}, got {count!r}")
    fields = {name: batch[name] for name in UniterModel.fields if batch.get(name) is not None}
    whole = {name: value.expand(rows, *value.shape[1:]) for name, value in fields.items()}
    with kept_modes(model), torch.no_grad():
        scores: Tensor = model.eval()(**whole).logits.flatten()
    chosen = torch.cat([torch.zeros(1, dtype=torch.long, device=scores.device), 1 + scores[1:].topk(count).indices])
    group = {name: value[chosen] for name, value in whole.items()}
    if len(words) == 1:
        most = int(boxes[chosen].max())
        for name in ("img_feat", "img_pos_feat", "img_type_ids"):
            if name in group:
                group[name] = group[name][:, :most]
        group["gather_index"] = gather_index(lengths[chosen], boxes[chosen], words.shape[1])
        group["attn_masks"] = group["attn_masks"][:, : group["gather_index"].shape[1]]
    return group | {"sample_size": 1 + count}


@dataclass(frozen=True, eq=False)
class HardestSource:
    """Groups for `fit`: a match and the mismatches that are hardest for the model when the batch is made.

    Arguments:
        model: the one that is trained, not wrapped.
        candidates: gives a match and its candidates, one example at a time, as `hardest` takes them.
        count: mismatches of a group; 31 as published.
    """

    model: UniterForRetrieval
    candidates: BatchSource
    count: int = 31

    def __len__(self) -> int:
        return len(self.candidates)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        """The group of the example at the one index, on the model's device.

        Raises:
            DataError, ConfigurationError: as `hardest`, or as the candidates' source.
        """
        from accelerate.utils import send_to_device  # type: ignore[import-untyped]  # the models need torch alone

        found = send_to_device(self.candidates.batch(indices, generator), next(self.model.parameters()).device)
        return hardest(self.model, found, self.count)


def _size(sample_size: int | Tensor | None, rows: int) -> int:
    size = 1 if sample_size is None else int(sample_size)
    if size < 1 or rows % size:
        raise ShapeError(f"expected rows in groups of sample_size = {size}, got {rows} rows; give each group whole")
    return size
