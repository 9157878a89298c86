"""The part of a model before its first perturbed site: computed once for all passes that change no parameter.

Nothing there depends on a perturbation, and no move changes a parameter, so every pass would compute the same again, if
modules compute their outputs from their inputs alone. That cannot be checked from outside, so an adapter declares it
(`pure`). The first pass records the modules that have finished when the first site fires; later passes reuse their
outputs instead of running them. This pays off for sites in hidden layers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from advvl.adapters.diagnosis import is_compiled
from advvl.adapters.injection import OutputHook


@dataclass(frozen=True, eq=False)
class _Finished:
    """The output of a module before the first site: its leaves, their versions, and its structure."""

    leaves: list[Any]
    versions: list[int]
    structure: TreeSpec

    @classmethod
    def of(cls, output: object) -> _Finished:
        leaves, structure = tree_flatten(output)
        return cls(leaves, _versions(leaves), structure)

    def answer(self) -> Any:
        """A new copy of the output: tensors without their graph, in containers of their own."""
        return tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in self.leaves], self.structure)

    @property
    def untouched(self) -> bool:
        return self.versions == _versions(self.leaves)

    @property
    def plain(self) -> bool:
        """True if it is all tensors and numbers, and has a tensor."""
        known = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in self.leaves)
        return known and any(isinstance(leaf, Tensor) for leaf in self.leaves)


class Prefix:
    """The modules that finish before the first site; for passes on one batch, of a pure model in eval mode.

    Arguments:
        model: the model. Modules in training mode or with hooks always run, except the module of a site at its output,
            which is perturbed afterwards; all of a compiled or scripted model runs too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._looked = any(map(_opaque, model.modules()))
        self._answers: dict[nn.Module, _Finished] = {}

    def reused(self, fired: Callable[[], bool]) -> AbstractContextManager[None]:
        """Wrap a forward: the first is recorded, later ones reuse its outputs.

        Arguments:
            fired: whether a site has been perturbed yet in this forward.
        """
        return self._answering() if self._looked else self._looking(fired)

    @contextmanager
    def _looking(self, fired: Callable[[], bool]) -> Iterator[None]:
        candidates = [module for module in self._model.modules() if _repeatable(module)]
        runs: Counter[nn.Module] = Counter()
        early: dict[nn.Module, _Finished] = {}

        def look(module: nn.Module, args: object, output: object) -> None:
            runs[module] += 1
            if not fired():
                early[module] = _Finished.of(output)

        with ExitStack() as stack:
            for module in candidates:
                stack.callback(module.register_forward_hook(look, prepend=True).remove)  # before it is perturbed
            yield
        self._answers, self._looked = _topmost(runs, early), True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, finished in self._answers.items():
                stack.enter_context(_replaced(module, finished.answer))
            yield


def _topmost(runs: Mapping[nn.Module, int], early: Mapping[nn.Module, _Finished]) -> dict[nn.Module, _Finished]:
    """The modules that ran once and whose output was not changed since; not their submodules."""
    usable = {m: found for m, found in early.items() if runs[m] == 1 and found.untouched and found.plain}
    inner = {part for module in usable for part in module.modules() if part is not module}
    return {module: found for module, found in usable.items() if module not in inner}


def _opaque(module: nn.Module) -> bool:
    """True if hooks do not reach into it, or would have it compiled again."""
    return is_compiled(module) or isinstance(module, torch.jit.ScriptModule)


def _repeatable(module: nn.Module) -> bool:
    hooked = any(part._forward_hooks for part in module.modules() if part is not module)
    own = all(isinstance(hook, OutputHook) for hook in module._forward_hooks.values())
    return own and not hooked and not any(part.training or part._forward_pre_hooks for part in module.modules())


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def _replaced(module: nn.Module, answer: Callable[[], Any]) -> Iterator[None]:
    """Make the module return this output, in this thread."""
    before, original, thread = module.__dict__.get("forward"), module.forward, threading.get_ident()
    module.forward = lambda *args, **kwargs: answer() if threading.get_ident() == thread else original(*args, **kwargs)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
