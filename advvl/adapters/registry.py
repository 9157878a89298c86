"""The registry of adapters by model class, and `adapt`, which uses it or the sites that it is given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs, check_model
from advvl.adapters.injection import Batch, Site
from advvl.checks import check_functions
from advvl.errors import AdvVLError, SiteError, more
from advvl.runtime.names import unwrapped

_REGISTRY: dict[str, str] = {
    "advvl.models.uniter.model.UniterModel": "advvl.models.uniter.adapter:uniter_adapter",
    "advvl.models.uniter.task.UniterTask": "advvl.models.uniter.adapter:uniter_adapter",
    "advvl.tasks.lxmert.nlvr2.LxmertForNLVR2": "advvl.models.lxmert.adapter:lxmert_adapter",
    "advvl.tasks.lxmert.vqa.LxmertForVQA": "advvl.models.lxmert.adapter:lxmert_adapter",
    "transformers.models.lxmert.modeling_lxmert.LxmertForPreTraining": "advvl.models.lxmert.adapter:lxmert_adapter",
    "transformers.models.lxmert.modeling_lxmert.LxmertForQuestionAnswering": "advvl.models.lxmert.adapter:lxmert_adapter",
    "transformers.models.lxmert.modeling_lxmert.LxmertModel": "advvl.models.lxmert.adapter:lxmert_adapter",
    "advvl.models.huggingface.pixels.PixelInput": "advvl.models.huggingface.pixels:pixel_adapter",
    "transformers.modeling_utils.PreTrainedModel": "advvl.models.huggingface.adapter:huggingface_adapter",
}


def register(class_path: str, factory: str) -> None:
    """Have `adapt` use `factory` ("module:function", from model to `Adapter`) for the class at `class_path`."""
    _REGISTRY[class_path] = factory


def adapt(
    model: nn.Module,
    sites: Mapping[str, Site | str] | None = None,
    *,
    call: Callable[[nn.Module, Batch], Outputs] | None = None,
    logits: Callable[[Outputs], Tensor] | None = None,
    positions: Callable[[Batch], Tensor | None] | None = None,
    loss: Callable[[Outputs, Batch], Tensor] | None = None,
    pure: bool = False,
) -> Adapter:
    """Return the adapter of a model: its registered one, or one with these sites; call it once, before `torch.compile`.

    Arguments:
        model: of a registered class, of transformers, or any other with its sites.
        sites: modality to site, or to the name of a module; they replace the registered ones. The call, the logits
            (with their positions) and the loss of a registered class are kept.
        call, logits, positions, loss, pure: as in `Adapter`; they replace those of a registered adapter.

    Raises:
        SiteError: no sites are given, and none are registered for the model's class; a module that it does not have.
        ConfigurationError: something else than a model.
    """
    check_model(model)
    check_functions(call=call, logits=logits, positions=positions, loss=loss)
    options = {"call": call, "logits": logits, "positions": positions, "loss": loss}
    if sites is None:
        adapter = _registered(model)
    else:
        try:
            known = _registered(model)
        except AdvVLError:  # its own sites are not found: those given may be
            known = None
        if known is not None:
            known.close()
            theirs = set(options) if logits is None else set(options) - {"positions"}  # positions are of known logits
            kept = {name: getattr(known, name) for name in theirs}
            options = kept | {name: option for name, option in options.items() if option is not None}
        return Adapter(model, sites, pure=pure or (known is not None and known.pure), **options)  # type: ignore[arg-type]
    if adapter is not None:
        for name, option in options.items():
            if option is not None:
                setattr(adapter, name, option)
        adapter.pure = adapter.pure or pure
        return adapter
    raise SiteError(
        f"expected a model with a registered adapter, got {type(unwrapped(model)).__name__}; "
        f"pass sites=…, from those of advvl.sites(model){more('no-sites')}"
    )


def _registered(model: nn.Module) -> Adapter | None:
    """The adapter registered for the model's class, if there is one."""
    for cls in type(unwrapped(model)).__mro__:
        factory = _REGISTRY.get(f"{cls.__module__}.{cls.__qualname__}")
        if factory is not None:
            module, _, function = factory.partition(":")
            adapter: Adapter = getattr(importlib.import_module(module), function)(model)
            return adapter
    return None


@contextmanager
def adapted(model: Adapter | nn.Module) -> Iterator[Adapter]:
    """Yield an adapter as it is, or that of a bare model, closed at the end."""
    if isinstance(model, Adapter):
        yield model
        return
    adapter = adapt(model)
    try:
        yield adapter
    finally:
        adapter.close()
