"""Where UNITER is perturbed: words after their embedding, regions before their projection (Gan et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.injection import Batch, Site
from advvl.errors import DataError, SiteError
from advvl.models.uniter.layout import region_mask, text_mask
from advvl.models.uniter.model import UniterModel
from advvl.models.uniter.task import UniterTask
from advvl.runtime.names import unwrapped


def uniter_adapter(model: nn.Module) -> Adapter:
    """The adapter of a UNITER, bare or with a task's head, wrapped or not; modalities "text" and "image".

    All tokens but padding are perturbed, including [CLS], [SEP] and masks. Fields of a batch that the model does not
    take are not passed on.

    Raises:
        SiteError: no UNITER in the model, or several.
    """
    uniters = [name for name, module in unwrapped(model).named_modules() if isinstance(module, UniterModel)]
    if len(uniters) != 1:
        raise SiteError(
            f"expected one UniterModel in {type(model).__name__}, got {len(uniters)}; give adapt() the sites"
        )
    prefix = f"{uniters[0]}." if uniters[0] else ""
    taken = next(fields for module in model.modules() if (fields := _fields(module)))
    examples = next((module.examples for module in model.modules() if isinstance(module, UniterTask)), None)

    def call(model: nn.Module, batch: Batch) -> Outputs:
        if not isinstance(batch, Mapping):
            raise DataError(f"expected a batch as a mapping of fields, got {type(batch).__name__}")
        return model(**{name: value for name, value in batch.items() if name in taken})

    return Adapter(
        model,
        {
            "text": Site(f"{prefix}embeddings.word_embeddings", at="output", mask=text_mask, examples=examples),
            "image": Site(f"{prefix}img_embeddings.img_linear", at="input", mask=region_mask, examples=examples),
        },
        call=call,
        positions=_compared,
    )


def _compared(batch: Batch) -> Tensor | None:
    """The rows of logits that count in a pre-training task: all of them, masked words or regions; None: one per example."""
    task = batch.get("task") if isinstance(batch, Mapping) else None
    if task == "mlm":
        labels: Tensor = batch["txt_labels"]
        return (labels != -1)[labels != -1]
    if task in ("mrc", "mrc-kl"):
        masked: Tensor = batch["img_mask_tgt"].bool()
        return masked[masked]
    return None


def _fields(module: Any) -> frozenset[str] | None:
    """The fields that a UNITER or a task's model takes; the outermost one in a wrapped model knows them all."""
    fields = getattr(module, "fields", None)
    return fields if isinstance(fields, frozenset) else None
