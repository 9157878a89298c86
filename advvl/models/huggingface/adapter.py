"""Where a model of transformers is perturbed, found by `get_input_embeddings()` of the model and of its parts.

"text" is the output of the word embedding; in an encoder-decoder, the encoder's. "image" is the output of the module
that embeds the patches, as they enter the vision encoder. "image_tokens" is the output of the projector, which goes to
the language model. `known` has the facts that these accessors do not give.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextModel, PreTrainedModel

from advvl.adapters.base import Adapter
from advvl.adapters.candidates import outermost
from advvl.adapters.injection import Batch, Site
from advvl.adapters.outputs import Outputs, field, read_logits, run
from advvl.errors import ConfigurationError, DataError, SiteError, more
from advvl.models.huggingface import fields
from advvl.models.huggingface.known import known, lengthened
from advvl.models.huggingface.packing import UnmaskedPadding, samples, separates_by_position


def huggingface_adapter(model: nn.Module) -> Adapter:
    """The adapter of a `PreTrainedModel`, wrapped or not; its modalities are among "text", "image" and "image_tokens".

    Raises:
        SiteError: neither words nor patches are found, or several vision towers, or words that cannot be perturbed.
    """
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    if known(inner).for_each_image:
        raise SiteError(
            f"expected a model that runs its parts once, got {type(inner).__name__}, which runs them for each image; "
            f"give sites with firing{more('several-firings')}"
        )
    names = {part: name for name, part in inner.named_modules()}
    text, (tower, image) = _text(inner), _image(inner, names)
    tokens, by_position = fields.placeholders(inner.config), separates_by_position(inner)
    sites: dict[str, Site] = {}
    if text is not None:
        sites["text"] = replace(
            _words(inner, names[text], text, tokens), rows=partial(samples, by_position=by_position)
        )
    if tower is not None and image is not None:
        sites["image"] = image
        if text is not None and tokens:
            of_patches, of_tokens = _rows(inner, tokens, by_position=by_position)
            sites["image"] = replace(image, rows=of_patches)
            if (projector := _projector(inner, tower, text)) is not None:
                sites["image_tokens"] = Site(names[projector], mask=_token_mask(inner), rows=of_tokens)
    if not sites:
        raise SiteError(
            f"expected a model that says where it embeds words or images, got {type(inner).__name__}; "
            f"pass sites=…, from those of advvl.sites(model){more('no-sites')}"
        )
    own = known(inner)
    if own.firing is not None:
        sites = {name: replace(site, firing=own.firing) for name, site in sites.items()}
    if type(inner).__name__.endswith("ForMultipleChoice"):
        sites = {name: replace(site, examples=fields.choices) for name, site in sites.items()}
    logits = partial(_no_logits, are=own.no_logits) if own.no_logits else _logits
    if not own.no_logits and _gives_spans(inner):
        logits = _spans
    return Adapter(model, sites, call=_call, logits=logits, positions=fields.positions(inner, prompt=_prompt(model)))


def _prompt(model: nn.Module) -> int:
    """The number of prompts that PEFT puts before the words, and that predictions come at."""
    configs = (getattr(part, "active_peft_config", None) for part in model.modules())
    config: Any = next((found for found in configs if getattr(found, "is_prompt_learning", False)), None)
    return 0 if config is None or config.peft_type == "PREFIX_TUNING" else config.num_virtual_tokens


def _words(model: PreTrainedModel, name: str, text: nn.Module, tokens: frozenset[int]) -> Site:
    """The site of the words, with their mask."""
    mask: Callable[..., Tensor] = partial(fields.text_mask, void=tokens)
    firing = None
    for part in _parts(model):
        if text in part.modules():
            own = known(part)
            mask = partial(own.words, void=tokens) if own.words else mask
            mask = lengthened(mask, part, own.lengthened) if own.lengthened else mask
            firing = firing if own.firing is None else own.firing
            pad = None if own.words else _padding(part)  # models that read padding take no mask
            if pad is not None and "attention_mask" in inspect.signature(model.forward).parameters:
                mask = UnmaskedPadding(mask, pad)
    return Site(name, mask=mask, firing=firing)


def _padding(part: PreTrainedModel) -> int | None:
    """The token of padding, unless it ends texts too."""
    config = part.config.get_text_config()
    pad, end = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos"))
    return pad if isinstance(pad, int) and pad not in (end if isinstance(end, list) else [end]) else None


def _text(model: PreTrainedModel) -> nn.Module | None:
    """The word embedding: the model's own, or that of the first of its parts that has one.

    Raises:
        SiteError: words that cannot be perturbed.
    """
    for part in _parts(model):
        if refused := known(part).refused:
            raise SiteError(
                f"expected words as (B, T, D) at the site of 'text', got {type(model).__name__}, which {refused}; "
                "take another model, or embed its words outside"
            )
    outer = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    found = ((part, _embedding(part)) for part in _parts(outer))
    return next((words for part, words in found if words is not None and _of_words(part, words)), None)


def _of_words(part: PreTrainedModel, embedding: nn.Module) -> bool:
    """True of a table of vectors, of any class, and of a wrapper around one, as in PEFT."""
    words = getattr(part.config.get_text_config(), "vocab_size", None)
    tables = [p for p in embedding.parameters() if p.ndim == 2 and len(p) == words]
    inside = list(embedding.modules())
    projects = any(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in inside)  # patches
    return bool(tables) or (not projects and any(isinstance(module, nn.Embedding) for module in inside))


def _image(model: PreTrainedModel, names: Mapping[nn.Module, str]) -> tuple[PreTrainedModel, Site] | tuple[None, None]:
    """The part that sees images, and where it is perturbed."""
    found: dict[str, tuple[PreTrainedModel, Site]] = {}
    for part in _parts(model):
        own, prefix = known(part), f"{names[part]}." if names[part] else ""
        patches = _embedding(part)
        if own.image:
            name, module = prefix + own.image, part.get_submodule(own.image)
            found[name] = part, Site(name, own.at, mask=partial(own.mask, module) if own.mask else None)
        elif patches is not None and not _of_words(part, patches) and "image" in _modalities(part):
            name = prefix + outermost(part, names[patches].removeprefix(prefix))
            site = Site(name, mask=_patch_mask(model, part))
            found[name] = part, site  # the innermost part of several that are perturbed in one place
    if len(found) > 1:
        raise SiteError(
            f"expected one vision tower in {type(model).__name__}, got {len(found)}, embedded at "
            f"{', '.join(found)}; say which, as in adapt(model, sites={{'image': '{next(iter(found))}'}})"
        )
    return next(iter(found.values())) if found else (None, None)


def _patch_mask(model: PreTrainedModel, tower: PreTrainedModel) -> Callable[[Batch], Tensor] | None:
    """The mask of real patches, if a model takes one and its vision tower uses it."""
    taken, heeded = (inspect.signature(part.forward).parameters for part in (model, tower))
    if "flattened_patches" in taken:
        return partial(fields.flat_patch_mask, given="input_ids" not in taken)
    name = next((name for name in ("pixel_attention_mask", "pixel_mask") if name in taken), None)
    if name is None or not {"patch_attention_mask", "pixel_attention_mask", "attention_mask"} & set(heeded):
        return None
    vision: Any = getattr(tower.config, "vision_config", tower.config)
    return partial(fields.image_mask, name=name, patch=vision.patch_size)


Rows = Callable[[Batch], Tensor]


def _rows(model: PreTrainedModel, tokens: frozenset[int], *, by_position: bool) -> tuple[Rows, Rows]:
    """The sample of each row of the embedded patches and of the projected tokens: packed ones, or images, or tiles."""
    taken = inspect.signature(model.forward).parameters
    if "image_grid_thw" not in taken:
        tiled = next((part for part in _parts(model) if isinstance(part, LlavaNextModel)), None)
        filled = fields.filled_image_rows if "pixel_attention_mask" in taken else fields.image_rows
        read = filled if tiled is None else partial(fields.tile_rows, tiled)
        of_images = partial(read, tokens=tokens, by_position=by_position)
        return of_images, of_images
    merged = model.config.vision_config.spatial_merge_size**2  # patches a token
    of_tokens = partial(fields.packed_rows, tokens=tokens, by_position=by_position)
    return partial(of_tokens, each=merged), of_tokens


def _token_mask(model: PreTrainedModel) -> Callable[[Batch], Tensor] | None:
    tiled = next((part for part in _parts(model) if isinstance(part, LlavaNextModel)), None)
    return None if tiled is None else partial(fields.tile_mask, tiled)


def _projector(model: PreTrainedModel, tower: PreTrainedModel, text: nn.Module) -> nn.Module | None:
    """The module between the vision tower and the language model: next to both in their parent, or inside the tower."""
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


def _parts(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _embedding(part: PreTrainedModel) -> nn.Module | None:
    try:
        found: object = part.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # the class says that it has none
        return None
    return found if isinstance(found, nn.Module) else None  # Perceiver gives a parameter


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


# names of logits other than `logits`; the first that exists counts
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


def _gives_spans(model: PreTrainedModel) -> bool:
    """True of a model whose answer is a span of its words: it takes where that starts and ends."""
    return "start_positions" in inspect.signature(model.forward).parameters


def _spans(outputs: Outputs) -> Tensor:
    """Start and end as two rows `(B, 2, T)`, also of a tuple (`return_dict=False`), which has both after the loss."""
    if isinstance(outputs, tuple | list):
        scores = [found for found in outputs if isinstance(found, Tensor) and found.ndim == 2][:2]
        if len(scores) == 2 and scores[0].shape == scores[1].shape:
            return torch.stack(scores, 1)
    return _logits(outputs)


def _no_logits(outputs: Outputs, *, are: str) -> Tensor:
    raise ConfigurationError(
        f"expected outputs with logits to compare, got {type(outputs).__name__}, whose logits are {are}; "
        "pass logits=…, from the outputs to scores"
    )
