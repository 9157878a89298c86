"""A model's parameters, modes and buffers: checks that it can learn, and contexts that leave it as found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from advvl.errors import ConfigurationError, more


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigurationError unless some parameter requires grad, and all that do are where their `.grad` will be."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        raise ConfigurationError(
            f"expected a model with parameters to train, got {type(model).__name__} with none that requires grad; "
            "unfreeze some, or use Attack"
        )
    if any(parameter.is_meta for parameter in learning):
        name = next(
            name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.is_meta
        )
        raise ConfigurationError(
            f"expected the parameters to train to be in memory, got {name!r} on the meta device; "
            f"keep it there, or freeze it{more('offloaded-weights')}"
        )


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back in training or eval mode as it was, at the end."""
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """Every parameter requires grad at the end, or does not, as before; PEFT has all of an adapter's do so."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def remembered_buffers(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts every buffer back: the same tensor with the same values, even if it was replaced."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    def put_back() -> None:
        for module, name, buffer, value in before:
            # By `data`, which counts as no change: a graph that is alive may have saved a buffer for its backward.
            buffer.data.copy_(value)
            setattr(module, name, buffer)

    return put_back


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back at the end: the same tensor with the same values, even if a forward replaced it."""
    put_back = remembered_buffers(model)
    try:
        yield
    finally:
        put_back()


@contextmanager
def kept_stats(model: nn.Module) -> Iterator[None]:
    """Keep the forwards within out of BatchNorm's running statistics.

    They are put back, not switched off: activation checkpointing, which runs a norm again in the backward, refuses one
    that then computes otherwise.
    """
    with ExitStack() as stack:
        for norm in _norms(model):
            stack.enter_context(kept_buffers(norm))
        yield


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
