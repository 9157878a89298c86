"""Injection: where a tensor of a model is perturbed, and the hooks that add the perturbation of the pass that runs.

Hooks stay for the adapter's life: those that come and go make `torch.compile` recompile, and one added after the first
compiled call never fires. A hook reads what to add from the `Binding` of the pass, and adds nothing when there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advvl.adapters.diagnosis import why_no_graph
from advvl.errors import ConfigurationError, SiteError, more

Batch = Any


@dataclass(frozen=True)
class Site:
    """A tensor in a model that can be perturbed.

    Arguments:
        module: dotted name of the module, as `named_modules()` gives it; wrappers' prefixes (`module.`, `_orig_mod.`,
            `base_model.model.`) may be left out.
        at: whether the module's output or its first input is perturbed.
        mask: from the batch to the `(B, T)` mask of real positions, of bool or whole numbers: True or 1 is a real
            position, as in transformers' attention_mask; torch's key_padding_mask is the opposite. None: all are real.
        rows: for a packed tensor without a batch axis: from the batch to the sample of each row, `(N,)`. None: a row is
            a sample, and has a ball of its own. A tensor `(N, D)` with neither mask nor rows is refused where there are
            not N losses or, of a loss that is a scalar, N rows of logits; other packed tensors are not noticed.
        firing: which call is perturbed, from 0, if the module runs several times in a forward; None: it runs once, and
            a module that runs more often is an error.
        examples: where the tensor has several rows of an example, each in a ball of its own (NLVR2's two images, the choices
            of a question): from the batch to the example of each row, `(N,)`. None: a row is an example.
    """

    module: str
    at: Literal["output", "input"] = "output"
    mask: Callable[[Batch], Tensor] | None = None
    rows: Callable[[Batch], Tensor] | None = None
    firing: int | None = None
    examples: Callable[[Batch], Tensor] | None = None

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
        if self.at not in ("output", "input"):
            raise ConfigurationError(f"expected a site at 'output' or 'input', got {self.at!r}")
        if self.firing is not None and (type(self.firing) is not int or self.firing < 0):
            raise ConfigurationError(f"expected a firing of 0 or more, or None, got {self.firing!r}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site of `"encoder.embed"`, `"encoder.embed:output"` or `"encoder.proj:input"`."""
        module, _, at = text.partition(":")
        return cls(module, at or "output")  # type: ignore[arg-type]


Maker = Callable[[Tensor], Tensor]


class Binding:
    """The perturbations that one pass adds at its sites; bound until the backward of that pass has ended.

    Activation checkpointing runs a site again in the backward, and must find the same perturbation there. With `apart`
    the batch holds its rows once for each modality, and a modality is perturbed in its own copy alone. `wants` says that
    gradients of the perturbations will be asked for.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        makers: Mapping[str, Maker],
        *,
        required: tuple[str, ...],
        apart: bool = False,
        wants: bool = False,
    ) -> None:
        self._sites, self._makers, self._required, self._wants = sites, makers, required, wants
        self._order = list(makers) if apart else []
        self._fired = dict.fromkeys(sites, 0)  # in the forward
        self._deltas: dict[str, Tensor] = {}
        self._in_backward = False
        self._refusal: str | None = None

    def fire(self, modality: str, x: Tensor) -> Tensor:
        """The site's tensor with the perturbation added in the wider precision of both, and cast once."""
        if self._refusal is not None:
            raise SiteError(self._refusal.format(modality=modality))
        again = self._in_backward or (self._fired[modality] > 0 and _backward_runs())
        self._fired[modality] += not again
        if modality not in self._makers:
            return x
        site, fired = self._sites[modality], self._fired[modality]
        if again and fired > 1:
            raise SiteError(
                f"expected the site of {modality!r} to fire once a forward under activation checkpointing, got several; "
                "name a site that runs once"
            )
        if not again and fired != _nth(site):
            return x
        if not x.is_floating_point():
            raise SiteError(
                f"expected a floating-point tensor at the site of {modality!r} ({site.module}), got "
                f"{x.dtype}; name the module that embeds it, or perturb its output"
            )
        if self._wants and not torch.is_grad_enabled():
            raise SiteError(
                f"expected a graph to be recorded at the site of {modality!r} ({site.module}), whose gradient is asked "
                f"for, but {why_no_graph()}"
            )
        if not self._order:
            return self._added(modality, x)
        if len(x) % len(self._order):
            raise SiteError(
                f"expected {len(self._order)} copies of the batch at the site of {modality!r}, got {len(x)} rows; "
                "have the adapter's repeat copy every field that has rows"
            )
        copies = list(x.tensor_split(len(self._order)))
        own = self._order.index(modality)
        copies[own] = self._added(modality, copies[own])
        return torch.cat(copies)

    def _added(self, modality: str, x: Tensor) -> Tensor:
        if modality not in self._deltas:
            self._deltas[modality] = self._makers[modality](x)
        return (x + self._deltas[modality]).to(x.dtype)

    @property
    def perturbed(self) -> bool:
        """True once anything has been added."""
        return bool(self._deltas)

    def end_forward(self, why_silent: Callable[[str], str]) -> None:
        """Check that every site that should have fired did, as often as it should.

        Arguments:
            why_silent: the reason why a modality's site did not fire at all; asked for where one did not.

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

    def begin_backward(self, *, refusal: str | None = None) -> None:
        """From here on a site fires only where activation checkpointing runs it again; or refuse that with a reason."""
        self._in_backward, self._refusal = True, refusal


def _nth(site: Site) -> int:
    return 1 if site.firing is None else site.firing + 1


def _backward_runs() -> bool:
    """True if autograd is at work, as it is where activation checkpointing runs a module again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Holder:
    """Where the hooks find the binding of the pass that runs."""

    binding: Binding | None = None


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
