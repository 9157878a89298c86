"""Reductions: the modules that average gradients over processes, and how to postpone that.

DDP decides in a forward what the next backward reduces, so whole passes run under no_sync, and everything that one
reduction has to cover goes through one backward. FSDP2 decides at the end of a backward, and reduces once in each graph
that it finds there. So one reduction covers the last graph only: if the model is sharded as a whole, that reduces all
of it. Parts that are sharded separately are reduced only as far as that graph reaches, so their graphs share one
backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

from advvl.errors import ConfigurationError, more
from advvl.runtime.processes import in_process_group

Sync = Callable[[], AbstractContextManager[object]]

_REDUCES = "require_backward_grad_sync"  # of DDP: False inside its no_sync


def no_sync(model: nn.Module) -> Sync:
    """Return a context that postpones the reductions of every wrapper in a model, DDP or FSDP2; or does nothing.

    Inside the user's own accumulation it changes nothing.
    """
    found = _wrappers(model)
    return (lambda: _held_back(found)) if found else nullcontext


def one_backward(model: nn.Module, sync: Sync | None) -> bool:
    """True if everything that one reduction has to cover must go through one backward.

    This is so under DDP, and with several FSDP2 modules, since the last graph may not reach them all. It is assumed
    where nothing is known: with a `sync` of the user's own, or a wrapper that is not visible.
    """
    found = _wrappers(model)
    return len(found) > 1 or not _sharded(found[0]) if found else sync is not None or in_process_group()


def accumulating(model: nn.Module) -> bool:
    """True if the next backward's gradients are not reduced, because the user accumulates them."""
    found = [model, *_wrappers(model)]
    held_back = any(getattr(module, _REDUCES, True) is False for module in found)
    return held_back or any(not group.reduce_grads for module in found if _sharded(module) for group in _groups(module))


def check_wrappers(model: nn.Module) -> None:
    """Raise ConfigurationError if a wrapper in a model cannot run several passes before one reduction."""
    for wrapper in _wrappers(model):
        if not _sharded(wrapper) and not hasattr(wrapper, _REDUCES):
            raise ConfigurationError(
                f"expected DDP or FSDP2 around a model, got {type(wrapper).__name__}, whose no_sync is not known; "
                f"wrap the model by one of those{more('unknown-wrapper')}"
            )
    for module in [model, *_wrappers(model)]:
        if getattr(module, "static_graph", False) is True:
            raise ConfigurationError(
                "expected a DDP model without static_graph, got static_graph=True; "
                f"wrap the model with static_graph=False{more('static-graph')}"
            )


def check_alone(model: nn.Module) -> None:
    """Raise ConfigurationError unless a process can run a model on its own, any number of times."""
    for module in _wrappers(model):
        raise ConfigurationError(
            f"expected a model that a process can run alone, got one wrapped by {type(module).__name__}; "
            f"evaluate target.through(model.module){more('wrapped-model')}"
        )


def _wrappers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules in a model that reduce gradients."""
    if _sharded(model) or hasattr(type(model), "no_sync"):
        return [model]
    return [wrapper for child in model.children() for wrapper in _wrappers(child)]


def _sharded(module: nn.Module) -> bool:
    """True if a module is an FSDP2 module; its class is not imported, which would take as long as importing torch."""
    return hasattr(type(module), "set_requires_gradient_sync")


@contextmanager
def _held_back(wrappers: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for wrapper in wrappers:
            stack.enter_context(_shards_held_back(wrapper) if _sharded(wrapper) else wrapper.no_sync())  # type: ignore[operator]
        yield


@contextmanager
def _shards_held_back(module: Any) -> Iterator[None]:
    before = [(group, group.reduce_grads, group.all_reduce_grads) for group in _groups(module)]
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for group, reduce, all_reduce in before:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _groups(module: nn.Module) -> list[Any]:
    """FSDP2's groups of parameters in a module, which know whether they are reduced; torch has no public way to ask."""
    found: list[Any] = []
    for part in module.modules():
        if _sharded(part):
            state: Any = part._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None)
            found += [state._fsdp_param_group] if groups is None else groups  # one, in earlier releases
    found = [group for group in found if group is not None]
    if not all(hasattr(group, "reduce_grads") and hasattr(group, "all_reduce_grads") for group in found):
        raise ConfigurationError(
            "expected FSDP2's parameter groups to say whether they are reduced, got a torch whose groups do not; pass sync=…"
        )
    return found
