"""The part of a model that runs before its first perturbed site: computed once for all passes of an attack.

Nothing there depends on a perturbation, and an attack changes no parameter, so in eval mode every pass would compute the
same again. The modules that have finished when the first site fires are noted in the first pass; later ones get their
outputs back instead of running them. Where this pays is a site in a hidden layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only


@dataclass
class _Finished:
    """A module that ran before the first site, with what it gave."""

    module: nn.Module
    output: Any
    versions: list[int]


class Prefix:
    """What finishes before the first site; for passes on one batch, of a model in eval mode whose parameters stay.

    Arguments:
        model: the model. What is in training mode is always run, and so is all of a model that is compiled or scripted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._finished: list[_Finished] | None = [] if any(map(_opaque, model.modules())) else None

    @contextmanager
    def reused(self, fired: Callable[[], bool]) -> Iterator[None]:
        """Around a forward: the first is looked at, later ones are given the outputs that it found.

        Arguments:
            fired: whether a site has been perturbed yet in this forward.
        """
        with ExitStack() as stack:
            if self._finished is None:
                runs: Counter[nn.Module] = Counter()
                early: dict[nn.Module, _Finished] = {}

                def look(module: nn.Module, args: object, output: object) -> None:
                    runs[module] += 1
                    if not fired():
                        early[module] = _Finished(module, output, _versions(output))

                for module in self._model.modules():
                    stack.callback(module.register_forward_hook(look).remove)
                yield
                self._finished = _topmost(runs, early)
                return
            for one in self._finished:
                stack.enter_context(_answering(one.module, one.output))
            yield


def _topmost(runs: Mapping[nn.Module, int], early: Mapping[nn.Module, _Finished]) -> list[_Finished]:
    """Those that ran once and would give the same again, their outputs not changed in place since; not what they hold."""
    usable = {
        module: _Finished(module, tree_map_only(Tensor, torch.detach, one.output), one.versions)
        for module, one in early.items()
        if runs[module] == 1 and one.versions == _versions(one.output) and _repeatable(module, one.output)
    }
    inner = {part for module in usable for part in module.modules() if part is not module}
    return [one for module, one in usable.items() if module not in inner]


def _opaque(module: nn.Module) -> bool:
    """Whether hooks do not reach into it, or would have it compiled again."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _repeatable(module: nn.Module, output: object) -> bool:
    plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_flatten(output)[0])
    return plain and not any(part.training for part in module.modules())


def _versions(output: Any) -> list[int]:
    return [leaf._version for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Have the module give this output; its hooks run as ever."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
