"""Diagnosis: why a site did not fire, or why the loss does not depend on the perturbation there.

Nothing here runs before something has failed. If model and batch alone do not show the cause, one more forward is run,
in which modules and operations are recorded; a compiled model runs uncompiled for this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from advvl.errors import more
from advvl.runtime.processes import in_process_group
from advvl.runtime.randomness import preserved
from advvl.runtime.states import kept_buffers, renormalised

Again = Callable[[], object]

_ADAPT_FIRST = "adapt it before its first call, or call torch.compiler.reset() afterwards"

NON_REENTRANT = f"checkpoint with use_reentrant=False{more('reentrant-checkpointing')}"


def why_no_graph() -> str:
    """Return what keeps the code that is running now from recording a graph."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__:
            return f"activation checkpointing with use_reentrant=True runs it; {NON_REENTRANT}"
    mode = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
    return f"it runs under {mode}; take that off the forward from this site on{more('no-graph')}"


def is_reentrant(objective: Tensor) -> bool:
    """True if the graph of an objective goes through activation checkpointing with `use_reentrant=True`."""
    waiting, seen = [objective.grad_fn], set[object]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            if isinstance(node, CheckpointFunction._backward_cls):
                return True
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def why_second_backward(error: RuntimeError, model: nn.Module, batch: Any) -> str | None:
    """Return why a backward through a step's several graphs failed, where it is known, else None.

    Arguments:
        error: what torch raised.
        model, batch: what ran.
    """
    text = str(error)
    if "modified by an inplace operation" in text and (found := renormalised(model)):
        return (
            f"expected no embedding with a max_norm, which writes to its weight, got {_name(model, found[0])}; "
            "renormalise after updates"
        )
    if "backward through the graph a second time" in text:
        given = {str(name): x for name, x in batch.items()} if isinstance(batch, Mapping) else {"batch": batch}
        held = [name for name, value in given.items() for x in tree_leaves(value) if _has_graph(x)]
        if held:
            return (
                f"expected a batch without graphs in a step of several backwards, got one behind {_some(held)}; "
                "detach it, or compute it in the model"
            )
    return None


def _has_graph(x: object) -> bool:
    return isinstance(x, Tensor) and x.grad_fn is not None


def why_silent(model: nn.Module, module: nn.Module, batch: Any = None, again: Again | None = None) -> str:
    """Return why a module that holds a site was not called in a forward.

    Arguments:
        model, module: the model, and the module in it that holds the site.
        batch: the batch of the forward; None: not known.
        again: runs the model on it once more; None: that is not possible.
    """
    return _silence(model, module, batch, again) + more("silent-site")


def _silence(model: nn.Module, module: nn.Module, batch: Any, again: Again | None) -> str:
    if all(module is not other for other in model.modules()):
        kind = type(module).__name__
        return f"the model no longer holds the {kind} that was adapted; adapt it again, after what replaced that"
    name, path = _name(model, module), _path(model, module)
    parts = {f"{path}.{part}" if path else part: inner for part, inner in module.named_children()}
    if type(module).forward is nn.Module.forward:
        return f"{name} has no forward of its own, and only what it holds is called; name one of {_some(parts)}"
    seen = None if again is None else _watched(model, again, _Recorder(model, module=module))
    compiled = any(map(is_compiled, model.modules()))
    if compiled and seen is not None and module in seen.called:
        return f"the model was compiled and run before it was adapted; {_ADAPT_FIRST}"
    fields = list(batch) if isinstance(batch, Mapping) else []
    given = [field for field in fields if str(field).endswith("inputs_embeds") and batch[field] is not None]
    if given:
        return f"the batch gives {_some(given)}, so the model embeds nothing; give ids, or perturb what takes these"
    if seen is None:
        return f"{name} was not called" + (f"; if the model had run compiled, {_ADAPT_FIRST}" if compiled else "")
    if module in seen.called:
        return f"{name} is not called in every forward; on the same batch it was called when the model ran again"
    called = [part for part, inner in parts.items() if inner in seen.called]
    if called:
        return f"{name} was not called, only what it holds; name one of {_some(called)}"
    if seen.borrowed:
        return f"{name} was not called, but its parameters were used by {seen.borrowed[0]}; have the model call it"
    outer = [around for around in seen.called if any(inner is module for inner in around.modules())]
    caller = f"{_name(model, outer[-1])} ran without it" if outer else "nothing around it was either"
    holds = f"; the batch holds {_some(fields)}" if fields else ""
    return f"{name} was not called: {caller}{holds}; give the batch what leads there, or perturb another module"


def why_independent(model: nn.Module, leaf: Tensor, again: Again) -> str:
    """Return why the loss does not depend on the perturbation of a site.

    Arguments:
        model: the whole model.
        leaf: a perturbation that requires grad.
        again: runs the model once more under the perturbation, and computes the loss.
    """
    return _independence(model, leaf, again) + more("independent-loss")


def _independence(model: nn.Module, leaf: Tensor, again: Again) -> str:
    with torch.enable_grad():
        seen = _watched(model, again, _Recorder(model, leaf=leaf))
    steps = [] if seen is None else [step for step in seen.steps if step.given]
    if not steps:
        return "it is lost between the site and the loss, by detach, no_grad or an operation without a gradient"
    last = steps[-1]
    if last.gave:
        return f"{last} is the last to depend on it, and what that gave is not used for the loss"
    if last.leaves_graph:
        return f"{last} takes it out of the graph; compute the loss without that"
    if not last.recorded:
        return f"{last} runs under torch.no_grad(); compute the loss without that"
    return f"{last} has no gradient; use floating-point weights, or perturb behind it"


def is_compiled(module: nn.Module) -> bool:
    """True if `torch.compile` or `Module.compile` has made it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


@dataclass(frozen=True)
class _Step:
    """One operation of torch in a watched forward."""

    name: str
    where: str
    recorded: bool  # whether grad mode was on
    given: bool  # whether anything that it took depends on the perturbation
    gave: bool  # whether the graph of anything that it gave leads there

    @property
    def leaves_graph(self) -> bool:
        return any(part in _OUT for part in self.name.split("."))

    def __str__(self) -> str:
        return f"{self.name} in {self.where}"


_OUT = ("detach", "detach_", "data", "item", "tolist")


class _Recorder(TorchFunctionMode):
    """Records the modules of a model that are called, outer ones first, and the inputs and outputs of each operation.

    Arguments:
        module: a module whose parameters are tracked.
        leaf: a perturbation that is tracked.
    """

    def __init__(self, model: nn.Module, *, module: nn.Module | None = None, leaf: Tensor | None = None) -> None:
        super().__init__()
        self.called: dict[nn.Module, None] = {}
        self.steps: list[_Step] = []
        self.borrowed: list[_Step] = []  # those that take a parameter of `module`
        self._model, self._own = model, [] if module is None else list(module.parameters())
        self._running: list[nn.Module] = []
        self._names = {inner: _label(name, inner) for name, inner in model.named_modules()}
        self._leaf, self._known = leaf, dict[Any, bool]()  # node of a graph to whether it leads to the leaf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = tree_leaves((args, kwargs))
        given, recorded = any(map(self._depends, taken)), torch.is_grad_enabled()
        result = func(*args, **(kwargs or {}))
        results = tree_leaves(result)
        name = resolve_name(func) or str(func)
        where = self._names[self._running[-1]] if self._running else "the loss or the adapter's call"
        step = _Step(name, where, recorded, given, any(map(self._depends, results)))
        if any(isinstance(leaf, Tensor) for leaf in results) or step.leaves_graph:
            self.steps.append(step)
            if any(leaf is own for own in self._own for leaf in taken):
                self.borrowed.append(step)
        return result

    def _depends(self, tensor: object) -> bool:
        if not isinstance(tensor, Tensor) or self._leaf is None:
            return False
        if tensor is self._leaf or tensor.grad_fn is None:
            return tensor is self._leaf
        waiting: list[Any] = [tensor.grad_fn]
        while waiting:  # what a node leads to is settled before the node is
            node = waiting[-1]
            following = [other for other, _ in node.next_functions if other is not None]
            unknown = [other for other in following if other not in self._known]
            if node in self._known or not unknown:
                leads = getattr(node, "variable", None) is self._leaf or any(self._known[other] for other in following)
                # the node of an operation without a backward, which warns and gives no gradient
                self._known.setdefault(waiting.pop(), leads and not node.name().endswith("WarnNotImplemented"))
            waiting += unknown
        return self._known[tensor.grad_fn]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        def enter(module: nn.Module, args: object) -> None:
            self.called[module] = None
            self._running.append(module)

        def leave(module: nn.Module, args: object, output: object) -> None:
            self._running.pop()

        with ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield


def _watched(model: nn.Module, again: Again, recorder: _Recorder) -> _Recorder | None:
    """Record one more forward, which leaves buffers and random state as found; None if it cannot run.

    It does not run in a process group: a forward may wait for the other processes, which may not have failed.
    """
    if in_process_group():
        return None
    try:
        with ExitStack() as stack:
            if any(map(is_compiled, model.modules())):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for kept in (preserved(model), kept_buffers(model), recorder.hooked(), recorder):
                stack.enter_context(kept)
            again()
    except Exception:  # the error to explain has already been raised, and matters more
        return None
    return recorder


def _path(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")


def _name(model: nn.Module, module: nn.Module) -> str:
    return _label(_path(model, module), module)


def _label(name: str, module: nn.Module) -> str:
    """The name of a module as messages have it, with its class."""
    return f"{name!r} ({type(module).__name__})" if name else type(module).__name__


def _some(names: Iterable[object]) -> str:
    found = sorted(map(repr, names))
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
