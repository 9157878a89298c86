"""Adapters: a model with its sites, its call, and the meaning of its outputs. No model is ever edited."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advvl.adapters.diagnosis import why_silent
from advvl.adapters.injection import Batch, Binding, Holder, InputHook, OutputHook, Placed, Site, TapHook
from advvl.adapters.outputs import Outputs as Outputs
from advvl.adapters.outputs import copied, read_logits, read_loss, run
from advvl.adapters.positions import check_axes
from advvl.checks import check_functions
from advvl.errors import ConfigurationError, ShapeError, SiteError, more
from advvl.perturbers.places import Place
from advvl.runtime.fast_path import has_fast_path, no_fast_path
from advvl.runtime.names import find, unwrapped


class Adapter:
    """A light reference to a model, with its sites; not a Module, and it keeps no parameter of its own.

    Arguments:
        model: the user's model, wrapped or not.
        sites: modality name to site.
        call: `(model, batch) -> outputs`; default: `model(**batch)` for a mapping, else `model(batch)`.
        logits: from the outputs to the tensor that a regulariser compares; default: `.logits` or `["logits"]` of the
            outputs; a tensor itself; the first entry of a tuple, or the second if the first is a loss.
        positions: from the batch to the mask of the logits' rows that count (masked-token positions); None: all.
        loss: `(outputs, batch)` to a scalar or one loss per row `(B,)`; default: the outputs' own: `.loss`, `["loss"]`, or a
            number (a tensor without axes) that a tuple begins with.
        pure: declares that in eval mode every module computes its output from its inputs alone: it draws no random
            numbers, does not change its inputs in place, and is not run by activation checkpointing. The part of the
            model before the first site then runs once per attack, and once for all moves of a step on a model in eval
            mode.

    Raises:
        SiteError: a module that the model does not have (with the nearest names that it has); no sites, or something
            else than sites.
        ConfigurationError: something else than a model.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site | str],
        *,
        call: Callable[[nn.Module, Batch], Outputs] | None = None,
        logits: Callable[[Outputs], Tensor] | None = None,
        positions: Callable[[Batch], Tensor | None] | None = None,
        loss: Callable[[Outputs, Batch], Tensor] | None = None,
        pure: bool = False,
    ) -> None:
        check_model(model)
        check_functions(call=call, logits=logits, positions=positions, loss=loss)
        self.model = model
        self.sites: Mapping[str, Site] = _sites(sites)
        self.call = call or run
        self.logits = logits or read_logits
        self.positions = positions or _all_positions
        self.loss = loss or read_loss
        self.pure = pure
        self.replay_verified = False  # whether replayed randomness has been checked to give the same logits
        self.boxes_verified: set[str] = set()  # modalities whose tensor was found inside its box in training
        self.masks_verified: set[str] = set()  # modalities that were found to matter at real positions
        self._axes_verified: set[tuple[str, int]] = set()  # modalities, by axes, with samples on the first axis
        self.updates_verified = False  # whether parameters were found to wait for the last backward of a step
        self._has_fast_path = has_fast_path(model)
        self._holder = Holder()
        modules = {modality: find(model, site.module) for modality, site in self.sites.items()}
        self._perturbed = tuple(modules.values())
        self._origin: Adapter | None = None
        self._taps: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        handles = self._handles
        self._close = weakref.finalize(self, _remove, handles)
        for modality, site in self.sites.items():
            try:
                handles.append(self._hook(modules[modality], modality, site.at))
            except Exception as error:
                self._close()
                got = f"{site.module!r} ({type(modules[modality]).__name__})"
                raise SiteError(
                    f"expected a module that takes hooks at the site of {modality!r}, got {got}, which does not: {error}; "
                    "name one that does, not a scripted one"
                ) from error

    def __repr__(self) -> str:
        sites = {modality: f"{site.module}:{site.at}" for modality, site in self.sites.items()}
        return f"Adapter({type(unwrapped(self.model)).__name__}, {sites})"

    def _hook(self, module: nn.Module, modality: str, at: str) -> torch.utils.hooks.RemovableHandle:
        if at == "output":
            return module.register_forward_hook(OutputHook(self._holder, modality))
        return module.register_forward_pre_hook(InputHook(self._holder, modality), with_kwargs=True)

    def close(self) -> None:
        """Remove the hooks from the model for good; also done when the adapter is garbage-collected."""
        self._close()

    def through(
        self,
        model: nn.Module,
        *,
        call: Callable[[nn.Module, Batch], Outputs] | None = None,
        logits: Callable[[Outputs], Tensor] | None = None,
        loss: Callable[[Outputs, Batch], Tensor] | None = None,
    ) -> Adapter:
        """Return this adapter with its model run through a later wrapper; both share sites and hooks.

        Closing either of the two closes both.

        Arguments:
            model: the adapted model wrapped by DDP, `torch.compile` or `accelerator.prepare`.
            call, logits, loss: replace the adapter's own.

        Raises:
            SiteError: a model that does not hold the modules whose tensors are perturbed.
        """
        held = set(model.modules())
        if not all(module in held for module in self._perturbed):
            raise SiteError(
                f"expected a wrapper of the adapted {type(unwrapped(self.model)).__name__}, got a "
                f"{type(unwrapped(model)).__name__} that does not hold its sites; adapt that model itself"
            )
        other = copy.copy(self)
        other.model, other._origin = model, self  # the hooks go with the first of them
        other.call, other.logits, other.loss = call or self.call, logits or self.logits, loss or self.loss
        return other

    def forward(self, batch: Batch) -> Outputs:
        """Run the model on a batch, which is left with all its fields."""
        return self.call(self.model, copied(batch))

    @contextmanager
    def bound(self, binding: Binding) -> Iterator[Binding]:
        """Bind the perturbations of one pass, and restore the previous binding at the end.

        Raises:
            ConfigurationError: another thread has bound its own.
        """
        before = self._holder.binding
        if before is not None and before.thread != binding.thread:
            raise ConfigurationError(
                f"expected an adapter in one thread at a time, got one in two; adapt in each thread{more('threads')}"
            )
        self._holder.binding = binding
        try:
            with no_fast_path() if self._has_fast_path else nullcontext():
                yield binding
        finally:
            self._holder.binding = before

    def clean(self) -> AbstractContextManager[Binding]:
        """Bind no perturbation: forwards within are clean, and reading a module works."""
        return self.bound(Binding(self.sites, partial(_given, {})))

    def tap(self, name: str) -> None:
        """Keep the output of a module in every later pass, as `binding.taps[name]`.

        The hook stays for the adapter's life, like those of the sites: tap before any `torch.compile`.

        Raises:
            SiteError: a module that the model does not have.
        """
        if name not in self._taps:
            self._taps.add(name)
            self._handles.append(find(self.model, name).register_forward_hook(TapHook(self._holder, name)))

    @property
    def taps(self) -> Mapping[str, Tensor]:
        """The outputs of the tapped modules that have run in the pass that is bound, by name."""
        return {} if self._holder.binding is None else self._holder.binding.taps

    @contextmanager
    def inject(self, deltas: Mapping[str, Tensor]) -> Iterator[None]:
        """Run one forward under given perturbations: `with target.inject({"image": delta}): model(**batch)`.

        With activation checkpointing the backward belongs in it too. Where `generate` keeps several beams, each row of the
        batch stands there once per beam, so repeat the rows: `delta.repeat_interleave(beams, 0)`.

        Raises:
            SiteError: a modality that the adapter lacks, or a site that did not fire.
            ShapeError: a perturbation of another shape than its site's tensor.
        """
        if not isinstance(deltas, Mapping):
            raise ShapeError(f"expected deltas as a mapping from modality to tensor, got {type(deltas).__name__}")
        self.check_modalities(deltas)
        binding = Binding(self.sites, partial(_given, deltas), modalities=tuple(deltas), required=tuple(deltas))
        with self.bound(binding):
            yield
            binding.end_forward(self.why_silent)

    def why_silent(self, modality: str, batch: Batch = None) -> str:
        """Return why a modality's site did not fire on this batch, if the batch is known; may run the model again."""
        if not self._close.alive:
            return "this adapter was closed and has no hooks; adapt the model again"
        module = dict(zip(self.sites, self._perturbed, strict=True))[modality]

        def again() -> Outputs:
            with self.clean():
                return self.forward(batch)

        return why_silent(self.model, module, batch, None if batch is None else again)

    def check_axes(self, modality: str, x: Tensor) -> None:
        """Raise ShapeError if the tensor at a modality's site has samples on its second axis, as layers of torch may."""
        if (modality, x.ndim) in self._axes_verified:
            return
        module = dict(zip(self.sites, self._perturbed, strict=True))[modality]
        path = next((name for name, other in self.model.named_modules() if other is module), "")
        parts = path.split(".")
        check_axes(modality, x, [self.model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)])
        self._axes_verified.add((modality, x.ndim))

    def check_modalities(self, modalities: Mapping[str, Any] | tuple[str, ...]) -> None:
        """Raise SiteError if one of these modalities has no site here."""
        for modality in modalities:
            if modality not in self.sites:
                raise SiteError(
                    f"expected a modality of {type(self.model).__name__} among {sorted(self.sites)}, got {modality!r}; "
                    "rename it in the perturber, or give the adapter a site for it"
                )


def check_model(model: object) -> None:
    """Raise ConfigurationError unless the value is a model that can be adapted."""
    if isinstance(model, Adapter):
        raise ConfigurationError(
            f"expected a model, got an adapter of {type(model.model).__name__}; use it as it is, or adapt its .model"
        )
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"expected a model (nn.Module) or its adapter, got {type(model).__name__}; the model comes before the batch"
        )


def _sites(sites: object) -> dict[str, Site]:
    if not isinstance(sites, Mapping) or not sites:
        raise SiteError(
            f"expected sites as a mapping from modality to Site, got {sites!r}; "
            'as in {"text": Site("…embeddings.word_embeddings")}'
        )
    found = {}
    for modality, site in sites.items():
        if not isinstance(site, Site | str):
            raise SiteError(
                f"expected a Site, or the name of a module, for {modality!r}, got {type(site).__name__}; "
                "give the name that named_modules() gives it"
            )
        found[modality] = Site.parse(site) if isinstance(site, str) else site
    return found


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _given(deltas: Mapping[str, Tensor], modality: str, x: Tensor) -> Placed:
    """A given perturbation, of the shape of its site's tensor."""
    delta = deltas[modality]
    if not isinstance(delta, Tensor):
        raise ShapeError(f"expected a perturbation of {modality!r} as a tensor, got {type(delta).__name__}")
    if delta.shape != x.shape:
        way_out = "make it of the shape of the tensor at the site, on this batch"
        if delta.ndim and len(delta) and delta.shape[1:] == x.shape[1:] and len(x) % len(delta) == 0:
            way_out = f"for beams, repeat its rows: delta.repeat_interleave({len(x) // len(delta)}, 0)"
            if len(delta) == 1:  # such as a universal one
                way_out = f"for all rows, repeat it by delta.repeat_interleave({len(x)}, 0), and zero it at padding"
        raise ShapeError(
            f"expected a perturbation of {modality!r} of shape {tuple(x.shape)}, got {tuple(delta.shape)}; {way_out}"
        )
    return Placed(Place(x.detach()), delta)


def _all_positions(batch: Batch) -> None:
    del batch
