"""Where LXMERT is perturbed: words after their embedding, regions before their projection, as LXMERT-AdvTrain does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from transformers.models.lxmert.modeling_lxmert import (
    LxmertForPreTraining,
    LxmertForQuestionAnswering,
    LxmertModel,
    LxmertPreTrainedModel,
)

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.injection import Batch, Site
from advvl.adapters.outputs import field, read_logits
from advvl.errors import ConfigurationError, DataError, SiteError, more
from advvl.models.lxmert.layout import examples, region_mask, text_mask
from advvl.runtime.names import unwrapped


def lxmert_adapter(model: nn.Module) -> Adapter:
    """The adapter of an LXMERT of transformers or of a task here, wrapped or not; modalities "text" and "image".

    A regulariser compares the scores of the answers; for `LxmertForPreTraining` those of the masked words (`labels`
    other than -100). A bare `LxmertModel` has neither logits nor a loss: pass both with its sites, `adapt(model,
    lxmert_sites(model), logits=…, loss=…)`. The same works for any model that contains an LXMERT, or to compare another
    tensor. Fields of a batch that the model does not take are not passed on.

    Raises:
        SiteError: no LXMERT in the model, or several.
    """
    sites = lxmert_sites(model)
    inner = next((module for module in model.modules() if isinstance(module, LxmertPreTrainedModel)), model)
    taken = {name for name, p in inspect.signature(type(inner).forward).parameters.items() if p.kind != p.VAR_KEYWORD}

    def call(model: nn.Module, batch: Batch) -> Outputs:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"expected a batch as a mapping of fields, got {type(batch).__name__}; give the fields by the names that "
                f"{type(inner).__name__}.forward has for them"
            )
        if "inputs_embeds" in batch and "inputs_embeds" not in taken:
            raise DataError(
                f"expected input_ids for {type(inner).__name__}, got inputs_embeds, which go round the word embeddings; "
                "give the words themselves"
            )
        return model(**{name: value for name, value in batch.items() if name in taken})

    pretraining = isinstance(inner, LxmertForPreTraining)
    named = {LxmertForPreTraining: "prediction_logits", LxmertForQuestionAnswering: "question_answering_score"}
    logits = next((partial(_scores, name=name) for kind, name in named.items() if isinstance(inner, kind)), None)
    return Adapter(model, sites, call=call, logits=logits, positions=_masked_words if pretraining else None)


def lxmert_sites(model: nn.Module) -> dict[str, Site]:
    """The sites of the LXMERT that a model is or holds: "text" and "image".

    Raises:
        SiteError: no LXMERT in the model, or several.
    """
    found = [name for name, module in unwrapped(model).named_modules() if isinstance(module, LxmertModel)]
    if len(found) != 1:
        raise SiteError(f"expected one LxmertModel in {type(model).__name__}, got {len(found)}; give adapt() the sites")
    prefix = f"{found[0]}." if found[0] else ""
    return {
        "text": Site(f"{prefix}embeddings.word_embeddings", at="output", mask=text_mask, examples=examples),
        "image": Site(f"{prefix}encoder.visn_fc", at="input", mask=region_mask, examples=examples),
    }


def _scores(outputs: Outputs, *, name: str) -> Tensor:
    """The scores of this name; in a tuple (`return_dict=False`) the first entry after the loss."""
    found = field(outputs, name)
    return found if isinstance(found, Tensor) else read_logits(outputs)


def _masked_words(batch: Batch) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ConfigurationError(
            "expected labels of masked words in the batch, to compare them, got none; "
            f"give them, or pass logits=…{more('masked-words')}"
        )
    return labels != -100
