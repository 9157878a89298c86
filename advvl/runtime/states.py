"""A model's parameters, modes and buffers: checks that it can learn, and contexts that leave it as found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from advvl.errors import ConfigurationError, more


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigurationError unless some parameters require grad, and all of them are in memory, as `.grad` will be."""
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
def only_user(model: nn.Module, *, shares: bool) -> Iterator[None]:
    """Refuse a model that another thread trains or attacks at the same time, unless neither changes it.

    Arguments:
        shares: the code inside this context neither switches modes nor leaves gradients.

    Raises:
        ConfigurationError: another thread uses the model.
    """
    thread = threading.get_ident()
    with _LOCK:
        users = _USERS.setdefault(model, {})
        others = [user for other, user in users.items() if other != thread]
        if any(not (shares and other.shares) for other in others):
            raise ConfigurationError(
                f"expected one thread on a {type(model).__name__}, got two; put it in eval mode to attack it from several, "
                f"or copy it{more('threads')}"
            )
        before = users.get(thread)
        users[thread] = _User(shares and (before is None or before.shares), accompanied=bool(others))
        for other in others:
            other.accompanied = True
    try:
        yield
    finally:
        with _LOCK:
            if before is None:
                del users[thread]
            else:
                before.accompanied |= users[thread].accompanied
                users[thread] = before


@dataclass
class _User:
    """A thread that uses a model: whether it shares it, and whether another thread ever used it too."""

    shares: bool
    accompanied: bool


_USERS: WeakKeyDictionary[nn.Module, dict[int, _User]] = WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def shared_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer at the end as the first of several threads found it; inside `only_user`.

    Raises:
        ConfigurationError: a forward wrote to a buffer while another thread used the model and saw that.
    """
    with _LOCK:
        kept = _KEPT.get(model) or _Kept(remembered_buffers(model))
        kept.threads += 1
        _KEPT[model] = kept
    before = _versions(model)
    try:
        yield
        if _USERS[model][threading.get_ident()].accompanied and _versions(model) != before:
            raise ConfigurationError(
                f"expected a {type(model).__name__} whose forward writes no buffer to attack it from two threads, got one "
                f"that does; copy it{more('threads')}"
            )
    finally:
        with _LOCK:
            kept.put_back()
            kept.threads -= 1
            if not kept.threads:
                del _KEPT[model]


@dataclass
class _Kept:
    """The buffers that the first thread found, and the number of threads that rely on it."""

    put_back: Callable[[], None]
    threads: int = 0


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """The buffers and the number of writes that each has seen; those made in inference mode do not count them."""
    return [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in model.buffers()]


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or eval mode of every module at the end.

    If the class of a module does more in `train` than set the flag, such as merging weights, that happens again.
    """
    before = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            if module.training != training and type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in before.items():
            module.training = training


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Restore at the end the weights that a forward itself writes to: those of embeddings with a `max_norm`."""
    before = [(module.weight, module.weight.detach().clone()) for module in renormalised(model)]
    try:
        yield
    finally:
        for weight, value in before:
            weight.data.copy_(value)


def renormalised(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """The embeddings whose own forward rescales weights to their `max_norm`."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
    return [module for module in embeddings if module.max_norm is not None]


@contextmanager
def kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every parameter at the end; PEFT sets it for all parameters of an adapter."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require grad or hold a gradient; at the end each has its flag and its own gradient back."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    with kept_requires_grad(model):
        try:
            for parameter, _ in before:
                parameter.requires_grad_(False).grad = None
            yield
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient


def remembered_buffers(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores every buffer: the same tensor with the same values, even if it was replaced.

    It also restores the plain numbers beside them, such as the length that rotary frequencies were computed for.
    """
    before = [
        (
            module,
            dict(module._buffers),
            set(module._non_persistent_buffers_set),
            {name: _owned(buffer).clone() for name, buffer in module._buffers.items() if buffer is not None},
            _plain(module) if module._buffers else {},
        )
        for module in model.modules()
    ]

    def put_back() -> None:
        for module, buffers, not_saved, values, plain in before:
            for name, value in values.items():
                # By `data`, which does not count as a change: a live graph may have saved a buffer for its backward.
                _owned(buffers[name].data).copy_(value)  # type: ignore[union-attr]
            if _differ(dict(module._buffers), buffers):  # one was replaced, filled or registered
                module._buffers.clear()
                module._buffers.update(buffers)
                module._non_persistent_buffers_set = not_saved
            for name, number in plain.items():
                setattr(module, name, number)

    return put_back


def _differ(found: Mapping[str, Tensor | None], before: Mapping[str, Tensor | None]) -> bool:
    return found.keys() != before.keys() or any(found[name] is not buffer for name, buffer in before.items())


def _plain(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and flags that a module holds, but not its mode."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and (value is None or isinstance(value, bool | int | float | str))
    }


def _owned(values: Tensor) -> Tensor:
    """The entries of a tensor with separate places in memory; for an expanded axis only the first."""
    for axis, (stride, size) in enumerate(zip(values.stride(), values.shape, strict=True)):
        if stride == 0 and size > 1:
            values = values.narrow(axis, 0, 1)
    return values


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer at the end: the same tensor with the same values, even if a forward replaced it."""
    put_back = remembered_buffers(model)
    try:
        yield
    finally:
        put_back()


@contextmanager
def kept_stats(model: nn.Module) -> Iterator[None]:
    """Keep the forwards inside this context out of the running statistics of normalisation layers.

    The statistics are restored, not switched off: activation checkpointing runs the layer again in the backward, and
    refuses one that then computes something else.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module._buffers.get("running_mean"), Tensor):
                stack.enter_context(kept_buffers(module))
        yield
