"""Injection: where a tensor of a model is perturbed, and the hooks that add the perturbation of the pass that runs.

Hooks stay for the adapter's life: those that come and go make `torch.compile` recompile, and one added after the first
compiled call never fires. A hook reads what to add from the `Binding` of the pass, and adds nothing when there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advvl.errors import ConfigurationError, SiteError

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
        rows: for a packed tensor without a batch axis: from the batch to the sample of each row, `(N,)`.
        firing: which call counts, from 0, if the module runs several times in a forward.
    """

    module: str
    at: Literal["output", "input"] = "output"
    mask: Callable[[Batch], Tensor] | None = None
    rows: Callable[[Batch], Tensor] | None = None
    firing: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.module, str):
            raise ConfigurationError(
                f"expected the name of a module, as named_modules() gives it, got {type(self.module).__name__}"
            )
        for name, read in (("mask", self.mask), ("rows", self.rows)):
            if read is not None and not callable(read):
                raise ConfigurationError(
                    f"expected {name} as a function of the batch, or None, got {type(read).__name__}; "
                    f'as in {name}=lambda batch: batch["…"]'
                )
        if self.at not in ("output", "input"):
            raise ConfigurationError(f"expected a site at 'output' or 'input', got {self.at!r}")
        if self.firing < 0:
            raise ConfigurationError(f"expected a firing of 0 or more, got {self.firing!r}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site of `"encoder.embed"`, `"encoder.embed:output"` or `"encoder.proj:input"`."""
        module, _, at = text.partition(":")
        return cls(module, at or "output")  # type: ignore[arg-type]


Maker = Callable[[Tensor], Tensor]


class Binding:
    """What one pass adds at each site; bound until the backward of that pass has ended.

    Activation checkpointing runs a site again in the backward, and must find the same perturbation there. With `apart`
    the batch holds its rows once for each modality, and a modality is perturbed in its own copy alone.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        makers: Mapping[str, Maker],
        *,
        required: tuple[str, ...],
        apart: bool = False,
    ) -> None:
        self._sites, self._makers, self._required = sites, makers, required
        self._order = list(makers) if apart else []
        self._fired = dict.fromkeys(sites, 0)
        self._deltas: dict[str, Tensor] = {}
        self._refusal: str | None = None

    def fire(self, modality: str, x: Tensor) -> Tensor:
        """The site's tensor with the perturbation added in the wider precision of both, and cast once."""
        if self._refusal is not None:
            raise SiteError(self._refusal.format(modality=modality))
        firing = self._fired[modality]
        self._fired[modality] += 1
        if modality not in self._makers or firing != self._sites[modality].firing:
            return x
        if not x.is_floating_point():
            raise SiteError(
                f"expected a floating-point tensor at the site of {modality!r} ({self._sites[modality].module}), got "
                f"{x.dtype}; name the module that embeds it, or perturb its output instead of its input"
            )
        if not self._order:
            return self._added(modality, x)
        if len(x) % len(self._order):
            raise SiteError(
                f"expected {len(self._order)} copies of the batch at the site of {modality!r}, got {len(x)} rows; see that "
                "the adapter's repeat repeats every field that has a row for each example"
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
        """Whether anything has been added yet."""
        return bool(self._deltas)

    def end_forward(self) -> None:
        """Check that every site that should have fired did.

        Raises:
            SiteError: one did not.
        """
        for modality in self._required:
            site, fired = self._sites[modality], self._fired[modality]
            if fired <= site.firing:
                raise SiteError(
                    f"expected the site of {modality!r} ({site.module}) to fire {site.firing + 1} time(s) in a forward, "
                    f"got {fired}; the model went round it (inputs_embeds given, a branch without this modality, or "
                    "compiled and run before it was adapted)"
                )

    def begin_backward(self, *, refusal: str | None = None) -> None:
        """Let the sites fire anew under activation checkpointing, or refuse that with a reason."""
        self._refusal = refusal
        if any(fired > 1 for fired in self._fired.values()):
            self._refusal = refusal or (
                "expected the site of {modality!r} to fire once a forward under activation checkpointing, got several; "
                "which one a recomputation belongs to cannot be told"
            )
        self._fired = dict.fromkeys(self._sites, 0)


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
            return (binding.fire(self.modality, output[0]), *output[1:])
        raise SiteError(
            f"expected a tensor, or a tuple that begins with one, at the site of {self.modality!r}, "
            f"got {type(output).__name__} from {type(module).__name__}"
        )


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
            f"expected a tensor as first input of the site of {self.modality!r}, got none in {type(module).__name__}"
        )
