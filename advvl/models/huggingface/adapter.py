"""Where a model of transformers is perturbed, found by `get_input_embeddings()` of the model and of its parts.

"text" is the output of the word embedding, that of the encoder where there are two. "image" is the output of the module
that embeds the patches, as they go into the vision encoder. "image_tokens" is what a projector gives to the language model.
What these accessors do not say is in `_OWN`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlavaNextModel, PreTrainedModel

from advvl.adapters.base import Adapter
from advvl.adapters.candidates import outermost
from advvl.adapters.injection import Batch, Site
from advvl.adapters.outputs import Outputs, field, read_logits, run
from advvl.errors import ConfigurationError, DataError, SiteError, more
from advvl.models.huggingface import fields


@dataclass(frozen=True)
class _Own:
    """Facts about a class that its accessors do not say.

    Arguments:
        image: the module, below the model of this class, where an image is perturbed, and whether at its output or input.
        mask: from that module and the batch to its mask of real positions.
        words: from the batch, and tokens whose embedding is replaced, to the mask of real words.
        firing: the forward of its parts that counts, where there are several.
        no_logits: what it calls its logits instead.
        refused: why its words cannot be perturbed.
    """

    image: str = ""
    at: Literal["output", "input"] = "output"
    mask: Callable[[nn.Module, Batch], Tensor] | None = None
    words: Callable[..., Tensor] | None = None
    firing: int | None = None
    no_logits: str = ""
    refused: str = ""


_OWN = {
    "BridgeTowerVisionModel": _Own("visual.embeddings"),
    # its patches are drawn, in random order, after they are embedded: only before that is a position always the same patch
    "ViltModel": _Own("embeddings.patch_embeddings", mask=fields.patch_mask),
    "XLNetModel": _Own(refused="embeds words as (T, B, D), whose rows are no samples"),
    "VisualBertModel": _Own("embeddings.visual_projection", at="input", mask=fields.region_mask),
    "SiglipTextModel": _Own(words=fields.text_mask_to_the_end),
    "Siglip2TextModel": _Own(words=fields.text_mask_to_the_end),
    "BridgeTowerForContrastiveLearning": _Own(no_logits="embeddings of text, image and both"),
    # the second forward, on masked inputs, is the one that all losses but the contrastive one are of
    "FlavaForPreTraining": _Own(firing=1),
}


def huggingface_adapter(model: nn.Module) -> Adapter:
    """The adapter of a `PreTrainedModel`, wrapped or not; modalities "text", "image", "image_tokens", as far as it has them.


    Raises:
        SiteError: neither words nor patches are found, or several vision towers, or words that cannot be perturbed.
    """
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    names = {part: name for name, part in inner.named_modules()}
    text, (tower, image) = _text(inner), _image(inner, names)
    tokens = fields.placeholders(inner.config)
    sites: dict[str, Site] = {}
    if text is not None:
        words = (_own(part).words for part in _parts(inner) if text in part.modules())
        mask = next(filter(None, words), fields.text_mask)
        sites["text"] = Site(names[text], mask=partial(mask, void=tokens))
    if tower is not None and image is not None:
        sites["image"] = image
        if text is not None and tokens:
            of_patches, of_tokens = _rows(inner, tokens)
            sites["image"] = replace(image, rows=of_patches)
            if (projector := _projector(inner, tower, text)) is not None:
                sites["image_tokens"] = Site(names[projector], rows=of_tokens)
    own = _own(inner)
    examples = fields.choices if type(inner).__name__.endswith("ForMultipleChoice") else None
    sites = {name: replace(site, firing=own.firing, examples=examples) for name, site in sites.items()}
    if not sites:
        raise SiteError(
            f"expected a model that says where it embeds words or images, got {type(inner).__name__}; "
            f"pass sites=…, from those of advvl.sites(model){more('no-sites')}"
        )
    logits = partial(_no_logits, are=own.no_logits) if own.no_logits else _logits
    return Adapter(model, sites, call=_call, logits=logits, positions=fields.positions(inner))


def _text(model: PreTrainedModel) -> nn.Embedding | None:
    """The word embedding: the model's own, or that of the first of its parts that has one.

    Raises:
        SiteError: words that cannot be perturbed.
    """
    for part in _parts(model):
        if refused := _own(part).refused:
            raise SiteError(
                f"expected words as (B, T, D) at the site of 'text', got {type(model).__name__}, which {refused}; "
                "take another model, or embed its words outside"
            )
    outer = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return next((found for part in _parts(outer) if isinstance(found := _embedding(part), nn.Embedding)), None)


def _image(model: PreTrainedModel, names: Mapping[nn.Module, str]) -> tuple[PreTrainedModel, Site] | tuple[None, None]:
    """The part that sees images, and where it is perturbed."""
    found: dict[str, tuple[PreTrainedModel, Site]] = {}
    for part in _parts(model):
        own, prefix = _own(part), f"{names[part]}." if names[part] else ""
        patches = _embedding(part)
        if own.image:
            name, module = prefix + own.image, part.get_submodule(own.image)
            found[name] = part, Site(name, own.at, mask=partial(own.mask, module) if own.mask else None)
        elif patches is not None and not isinstance(patches, nn.Embedding) and "image" in _modalities(part):
            name = prefix + outermost(part, names[patches].removeprefix(prefix))
            found[name] = part, Site(name)  # the innermost part of several that are perturbed in one place
    if len(found) > 1:
        raise SiteError(
            f"expected one vision tower in {type(model).__name__}, got {len(found)}, embedded at "
            f"{', '.join(found)}; say which, as in adapt(model, sites={{'image': '{next(iter(found))}'}})"
        )
    return next(iter(found.values())) if found else (None, None)


Rows = Callable[[Batch], Tensor]


def _rows(model: PreTrainedModel, tokens: frozenset[int]) -> tuple[Rows, Rows]:
    """The sample of each row of the embedded patches and of the projected tokens: packed ones, or images, or tiles."""
    taken = inspect.signature(model.forward).parameters
    if "image_grid_thw" not in taken:
        tiled = next((part for part in _parts(model) if isinstance(part, LlavaNextModel)), None)
        filled = fields.filled_image_rows if "pixel_attention_mask" in taken else fields.image_rows
        of_images = partial(filled if tiled is None else partial(fields.tile_rows, tiled), tokens=tokens)
        return of_images, of_images
    merged = model.config.vision_config.spatial_merge_size**2  # patches a token
    return partial(fields.packed_rows, tokens=tokens, each=merged), partial(fields.packed_rows, tokens=tokens)


def _projector(model: PreTrainedModel, tower: PreTrainedModel, text: nn.Module) -> nn.Module | None:
    """The module between the vision tower and the language model: beside both in what holds them, or in the tower."""
    owner = [part for part in _parts(model) if tower in set(part.modules()) and text in set(part.modules())][-1]
    between = [
        child
        for child in owner.children()
        if not isinstance(child, PreTrainedModel)
        and any(True for _ in child.parameters())
        and text not in child.modules()
    ]
    if len(between) == 1:
        return between[0]
    merger = getattr(tower, "merger", None)  # Qwen-VL's
    return merger if isinstance(merger, nn.Module) else None


def _own(part: PreTrainedModel) -> _Own:
    return next((_OWN[cls.__name__] for cls in type(part).__mro__ if cls.__name__ in _OWN), _Own())


def _parts(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _embedding(part: PreTrainedModel) -> nn.Module | None:
    try:
        found: nn.Module | None = part.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # it says that it has none of its own
        return None
    return found


def _modalities(part: PreTrainedModel) -> tuple[str, ...]:
    """The modalities that a part takes, as it names them."""
    said: Any = getattr(part, "input_modalities", ())
    return (said,) if isinstance(said, str) else tuple(said)


def _call(model: nn.Module, batch: Batch) -> Outputs:
    if not isinstance(batch, Mapping):
        raise DataError(
            f"expected a batch as a mapping of the model's fields, got {type(batch).__name__}; "
            "give one, or pass call=…, from (model, batch) to outputs"
        )
    if batch.get("inputs_embeds") is not None:
        raise SiteError(
            "expected input_ids, which the site of 'text' embeds, got inputs_embeds, which go round it; "
            "give input_ids, or sites=…"
        )
    return run(model, batch)


# what models call their logits, beside `logits`; the first that is there counts
_LOGITS = ("prediction_logits", "logits_per_image", "itm_score", "itm_logits", "contrastive_logits_per_image")


def _logits(outputs: Outputs) -> Tensor:
    """The head's logits; images against texts for contrastive models; start and end as two rows `(B, 2, T)`."""
    if field(outputs, "logits") is None:
        for name in _LOGITS:
            if isinstance(found := field(outputs, name), Tensor):
                return found
        start, end = field(outputs, "start_logits"), field(outputs, "end_logits")
        if isinstance(start, Tensor) and isinstance(end, Tensor):
            return torch.stack([start, end], 1)
    return read_logits(outputs)


def _no_logits(outputs: Outputs, *, are: str) -> Tensor:
    raise ConfigurationError(
        f"expected outputs with logits to compare, got {type(outputs).__name__}, whose logits are {are}; "
        "pass logits=…, from the outputs to scores"
    )
