"""Injection: sites, and the hooks that add the perturbations of the running pass to their tensors.

Hooks stay as long as the adapter: adding and removing hooks makes `torch.compile` recompile, and a hook added after the
first compiled call never fires. A hook reads the perturbation from the `Binding` of the pass, and adds nothing when
there is none.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from advvl.adapters.diagnosis import why_no_graph
from advvl.checks import is_choice
from advvl.errors import ConfigurationError, SiteError, more
from advvl.perturbers.places import Place

Batch = Any


@dataclass(frozen=True)
class Site:
    """A tensor in a model that can be perturbed.

    Arguments:
        module: dotted name of the module, as `named_modules()` gives it; wrappers' prefixes (`module.`, `_orig_mod.`,
            `base_model.model.`) may be left out.
        at: whether the module's output or its first input is perturbed.
        mask: from the batch to the `(B, T)` mask of real positions, bool or integer: True or 1 is a real position, as
            in transformers' attention_mask; torch's key_padding_mask is the opposite. None: all are real.
        rows: for a packed tensor, whose rows are not samples: from the batch to the sample of each row, `(N,)`, or of
            each position, `(B, T)`, if a row holds several texts. None, or a function that returns None: each row is a
            sample with its own ball. A tensor `(N, D)` with neither mask nor rows is refused unless there are N losses
            or, for a scalar loss, N rows of logits; other packed tensors are not detected.
        firing: the number of the call to perturb, from 0, if the module runs several times in a forward; None: it runs
            once, and running more often is an error.
        examples: if the tensor has several rows per example, each with its own ball (NLVR2's two images, the choices of
            a question): from the batch to the example of each row, `(N,)`. None, or a function that returns None: each
            row is an example.
    """

    module: str
    at: Literal["output", "input"] = "output"
    mask: Callable[[Batch], Tensor] | None = None
    rows: Callable[[Batch], Tensor | None] | None = None
    firing: int | None = None
    examples: Callable[[Batch], Tensor | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, str):
            raise ConfigurationError(
                f"expected the name of a module, as named_modules() gives it, got {type(self.module).__name__}"
            )
        for name, read in (("mask", self.mask), ("rows", self.rows), ("examples", self.examples)):
            if read is not None and not callable(read):
                raise ConfigurationError(
                    f"expected {name} as a function of the batch, or None, got {type(read).__name__}; "
                    f'as in {name}=lambda batch: batch["…"]'
                )
        if not is_choice(self.at, ("output", "input")):
            raise ConfigurationError(f"expected a site at 'output' or 'input', got {self.at!r}")
        if self.firing is not None and (type(self.firing) is not int or self.firing < 0):
            raise ConfigurationError(f"expected a firing of 0 or more, or None, got {self.firing!r}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site of `"encoder.embed"`, `"encoder.embed:output"` or `"encoder.proj:input"`."""
        module, _, at = text.partition(":")
        return cls(module, at or "output")  # type: ignore[arg-type]


class Placed(NamedTuple):
    """A perturbation at its site: its place, and the leaf that receives the gradient."""

    place: Place
    delta: Tensor


Begin = Callable[[str, Tensor], Placed]  # makes the perturbation of a modality at the tensor of its site
Apply = Callable[[str, Place, Tensor, Tensor], Tensor]  # of modality, place, tensor and perturbation; `Perturber.apply`


def added(modality: str, place: Place, x: Tensor, delta: Tensor) -> Tensor:
    """The tensor of a site with the perturbation added in the wider precision of both, and cast once."""
    del modality, place
    return (x + delta).to(x.dtype)


class Binding:
    """The perturbations of one pass, bound until its backward has ended, with a record of those placed.

    Activation checkpointing runs a site again in the backward, and must find the same perturbation there.

    Arguments:
        sites: of the adapter.
        begin, apply: make a perturbation at its site, and put it on the site's tensor.
        modalities: those perturbed in this pass.
        required: those whose sites must fire in its forward.
        wants: gradients of the perturbations will be needed.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        begin: Begin,
        apply: Apply = added,
        *,
        modalities: tuple[str, ...] = (),
        required: tuple[str, ...] = (),
        wants: bool = False,
    ) -> None:
        self._sites, self._begin, self._apply = sites, begin, apply
        self._required, self._wants = required, wants
        self._modalities = frozenset(modalities)
        self._fired = dict.fromkeys(sites, 0)  # in the forward
        self._in_backward = False
        self._refusal: str | None = None
        self.thread = threading.get_ident()
        self.placed: dict[str, Placed] = {}
        self.taps: dict[str, Tensor] = {}

    def fire(self, modality: str, x: Tensor) -> Tensor:
        """Return the tensor of a site, perturbed if this call of its module is the one to perturb."""
        if self._is_elsewhere() or not self._is_perturbed(modality):
            return x
        if modality not in self.placed:
            self._check(modality, x)
            self.placed[modality] = self._begin(modality, x)
        place, delta = self.placed[modality]
        return self._apply(modality, place, x, delta)

    def _is_elsewhere(self) -> bool:
        """True in a forward of another thread, which is not part of this pass; autograd's threads run its backward."""
        if torch.compiler.is_compiling() or threading.get_ident() == self.thread:
            return False
        return not (self._in_backward or _backward_runs())

    def _is_perturbed(self, modality: str) -> bool:
        """Count this call, and decide whether it is perturbed."""
        if self._refusal is not None:
            raise SiteError(self._refusal.format(modality=modality))
        again = self._runs_again(self._fired[modality])
        self._fired[modality] += not again
        if modality not in self._modalities:
            return False
        fired = self._fired[modality]
        if again and fired > 1:
            raise SiteError(
                f"expected the site of {modality!r} to fire once a forward under activation checkpointing, got several; "
                "name a site that runs once"
            )
        return again or fired == _nth(self._sites[modality])

    def _runs_again(self, fired: int) -> bool:
        return self._in_backward or (fired > 0 and _backward_runs())

    def _check(self, modality: str, x: Tensor) -> None:
        module = self._sites[modality].module
        if not x.is_floating_point():
            raise SiteError(
                f"expected a floating-point tensor at the site of {modality!r} ({module}), got "
                f"{x.dtype}; name the module that embeds it, or perturb its output"
            )
        if self._wants and not torch.is_grad_enabled():
            raise SiteError(
                f"expected a graph to be recorded at the site of {modality!r} ({module}), whose gradient is asked "
                f"for, but {why_no_graph()}"
            )

    def tap(self, name: str, output: Tensor) -> None:
        """Keep the output of a module that a regulariser reads, but not that of a recomputation."""
        if self._is_elsewhere() or self._runs_again(name in self.taps):
            return
        if self._wants and self._modalities and not torch.is_grad_enabled():
            raise SiteError(
                f"expected a graph to be recorded in the module {name!r}, which is read, but {why_no_graph()}"
            )
        self.taps[name] = output

    @property
    def perturbed(self) -> bool:
        """True once anything has been placed."""
        return bool(self.placed)

    def end_forward(self, why_silent: Callable[[str], str]) -> None:
        """Check that every required site fired, as often as it should.

        Arguments:
            why_silent: gives the reason why a modality's site did not fire; called only if one did not.

        Raises:
            SiteError: one did not.
        """
        for modality in self._required:
            site, fired = self._sites[modality], self._fired[modality]
            where = f"expected the site of {modality!r} ({site.module}) to fire"
            if fired == 0:
                raise SiteError(f"{where} in a forward, but it did not: {why_silent(modality)}")
            if fired < _nth(site):
                raise SiteError(
                    f"{where} {_nth(site)} times in a forward, got {fired}; firing counts from 0: choose one below {fired}"
                )
            if fired > 1 and site.firing is None:
                raise SiteError(
                    f"{where} once in a forward, got {fired} times; say which time counts, "
                    f"from Site(…, firing=0) to firing={fired - 1}{more('several-firings')}"
                )

    def again(self) -> Binding:
        """A binding for another forward under the same perturbations that this one placed."""
        placed = dict(self.placed)
        return Binding(self._sites, lambda modality, x: placed[modality], self._apply, modalities=tuple(placed))

    def begin_backward(self, *, refusal: str | None = None) -> None:
        """From now on, let sites fire only when activation checkpointing runs them again; or refuse that with a reason."""
        self._in_backward, self._refusal = True, refusal


def _nth(site: Site) -> int:
    return 1 if site.firing is None else site.firing + 1


def _backward_runs() -> bool:
    """True if autograd is at work, as it is where activation checkpointing runs a module again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Holder:
    """The holder in which the hooks find the binding of the running pass."""

    binding: Binding | None = None

    def __deepcopy__(self, memo: object) -> Holder:
        """A copied model takes no part in the running pass."""
        del memo
        return Holder()


class OutputHook:
    def __init__(self, holder: Holder, modality: str) -> None:
        self.holder, self.modality = holder, modality

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        binding = self.holder.binding
        if binding is None:
            return None
        if isinstance(output, Tensor):
            return binding.fire(self.modality, output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            changed = (binding.fire(self.modality, output[0]), *output[1:])
            return type(output)._make(changed) if hasattr(output, "_make") else changed
        if isinstance(output, dict) and len(fields := _floating(output)) == 1:
            record = copy.copy(output)  # the model may keep its own
            record[fields[0]] = binding.fire(self.modality, output[fields[0]])
            return record
        inside = [name for name, _ in module.named_children()]
        raise SiteError(
            f"expected a tensor or one in a tuple or dict at the site of {self.modality!r}, got {_described(output)} "
            f"from {type(module).__name__}; name the module that gives it{f', of {inside}' if inside else ''}"
            f"{more('no-tensor')}"
        )


def _floating(output: dict[Any, Any]) -> list[Any]:
    return [name for name, x in output.items() if isinstance(x, Tensor) and x.is_floating_point()]


def _described(output: object) -> str:
    kind = type(output).__name__
    return f"{kind} with {', '.join(map(str, _floating(output))) or 'none'}" if isinstance(output, dict) else kind


class TapHook:
    """Keeps the first tensor of a module's output, for regularisers that read that module."""

    def __init__(self, holder: Holder, name: str) -> None:
        self.holder, self.name = holder, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.holder.binding is not None:
            self.holder.binding.tap(self.name, first_tensor(output))


def first_tensor(output: object) -> Tensor:
    """The tensor that a module gives: itself, the first of a tuple, or the first entry of a record.

    Raises:
        SiteError: there is none.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    found = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(found, Tensor):
        raise SiteError(
            f"expected a module that gives a tensor to read, got {type(found).__name__}; read one inside it"
        )
    return found


class InputHook:
    def __init__(self, holder: Holder, modality: str) -> None:
        self.holder, self.modality = holder, modality

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        binding = self.holder.binding
        if binding is None:
            return None
        if args and isinstance(args[0], Tensor):
            return (binding.fire(self.modality, args[0]), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, kwargs | {name: binding.fire(self.modality, value)}
        raise SiteError(
            f"expected a tensor as first input of the site of {self.modality!r}, got none in {type(module).__name__}; "
            "name the module that takes it, or perturb an output"
        )
