"""Candidates: the tensors of a model that could be perturbed, found by looking at its modules, or by running it once.

The purpose of a module is guessed from its kind and place. Consecutive layers of one class are hidden layers. A table
of vectors outside them embeds words, unless its name says positions or types. A convolution of few channels outside
them embeds an image. A linear map before them projects features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advvl.adapters.injection import Batch, Site
from advvl.adapters.outputs import Outputs, run
from advvl.checks import check_functions
from advvl.errors import ConfigurationError
from advvl.runtime.fast_path import has_fast_path, no_fast_path
from advvl.runtime.randomness import preserved
from advvl.runtime.states import kept_buffers, kept_modes, kept_weights


@dataclass(frozen=True)
class Candidate:
    """A tensor that could be a site.

    Arguments:
        module, at: as `Site` takes them.
        what: its apparent kind, such as "word embedding" or "hidden layer 2 of 12".
        shape: of the tensor in the forward that was run; otherwise as far as the weights determine it, as `(…, 768)`.
        token_norm, row_norm: the mean L2 norms of its positions (the last axis) and of its rows (all but the first
            axis) in that forward, to choose a radius and a step size by; None without a forward.
    """

    module: str
    at: Literal["output", "input"]
    what: str
    shape: str
    token_norm: float | None = None
    row_norm: float | None = None

    @property
    def site(self) -> Site:
        """The site, without a mask."""
        return Site(self.module, self.at)

    def __str__(self) -> str:
        return "  ".join(cell for cell in self._cells if cell)

    @property
    def _cells(self) -> tuple[str, ...]:
        norms = ("" if norm is None else f"{norm:.3g}" for norm in (self.token_norm, self.row_norm))
        return f"{self.module}:{self.at}", self.shape, *norms, self.what


class Candidates(tuple[Candidate, ...]):
    """Candidates, shown as a table; the first column is what `adapt(model, sites={"text": …})` takes."""

    __slots__ = ()

    def __repr__(self) -> str:
        cells = [("site", "shape", "norm per token", "norm per row", "what"), *(c._cells for c in self)]
        if not any(c.row_norm is not None for c in self):
            cells = [(site, shape, what) for site, shape, _, _, what in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)

    __str__ = __repr__


def sites(
    model: nn.Module, batch: Batch = None, *, call: Callable[[nn.Module, Batch], Outputs] | None = None
) -> Candidates:
    """List the tensors of a model that could be perturbed, in the order of its modules.

    Arguments:
        model: any model; a compiled one only without a batch.
        batch: run the model on it once, in eval mode and without gradients. This gives exact shapes and norms, finds
            the modules that take a field of the batch directly, and leaves out those that do not run; the model is left
            as found. None: no run.
        call: `(model, batch) -> outputs`; default: `model(**batch)` for a mapping, else `model(batch)`.

    Raises:
        ConfigurationError: something else than a model; a batch that does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"expected a model (nn.Module), got {type(model).__name__}; of an adapter pass its .model"
        )
    check_functions(call=call)
    found = Candidates(_looked(model))
    return found if batch is None else Candidates(_seen(model, found, batch, call or run))


def outermost(model: nn.Module, name: str) -> str:
    """The largest module around `name`, short of the whole model, without hidden layers and without a word embedding."""
    modules = dict(model.named_modules(remove_duplicate=False))
    barred = set(_stacks(modules)) | {other for other, module in modules.items() if _embeds_words(other, module)}
    while parent := name.rpartition(".")[0]:
        if any(f"{other}.".startswith(f"{parent}.") for other in barred if other != name):
            break
        name = parent
    return name


def _looked(model: nn.Module) -> list[Candidate]:
    modules = dict(model.named_modules())
    stacks = _stacks(modules)
    names = list(modules)
    last = max((names.index(stack) for stack in stacks), default=len(names))
    found: dict[Candidate, None] = {}
    for index, (name, module) in enumerate(modules.items()):
        if name in stacks:
            count = len(stacks[name])
            for k, layer in enumerate(stacks[name].children()):
                width = next((len(p) for p in reversed(list(layer.parameters())) if p.ndim == 1), None)
                shape = "(…)" if width is None else f"(…, {width})"
                found[Candidate(f"{name}.{k}".lstrip("."), "output", f"hidden layer {k} of {count}", shape)] = None
        elif any(name.startswith(f"{stack}." if stack else "") for stack in stacks):
            continue
        elif _embeds_words(name, module):
            found[Candidate(name, "output", "word embedding", f"(…, {_width(module)})")] = None
        elif _takes_images(module):
            found[Candidate(name, "output", "image convolution", f"(…, {_width(module)}, …)")] = None
            around = outermost(model, name)
            if stacks and around != name:
                found[Candidate(around, "output", "patch embedding", "(…)")] = None
        elif isinstance(module, nn.Linear) and index < last:
            around = _projector(modules, name)
            if around == name:
                found[Candidate(name, "input", "input of a projection", f"(…, {module.in_features})")] = None
            width = [m.out_features for m in modules[around].modules() if isinstance(m, nn.Linear)][-1]
            found[Candidate(around, "output", "projection", f"(…, {width})")] = None
            embeds = outermost(model, name)
            if stacks and around == name != embeds:  # beside positions, as SigLIP 2 embeds patches
                found[Candidate(embeds, "output", "patch embedding", "(…)")] = None
    return sorted(found, key=lambda candidate: names.index(candidate.module))


def _stacks(modules: Mapping[str, nn.Module]) -> dict[str, nn.ModuleList | nn.Sequential]:
    """Lists of hidden layers: all of one class, each of several modules; not those inside another one's layers."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential) and not any(
            name.startswith(f"{outer}." if outer else "") for outer in found
        ):
            layers = list(module.children())
            alike = len({type(layer) for layer in layers}) == 1 and any(layers[0].children())
            if alike and (isinstance(module, nn.ModuleList) or len(layers) > 1):
                found[name] = module
    return found


_NOT_WORDS = re.compile(r"pos(ition|_emb)|wpe|token_type|segment|rel(ative|_)")


def _embeds_words(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and not _NOT_WORDS.search(name.rpartition(".")[2])


def _takes_images(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels in (1, 3, 4)


def _width(module: nn.Module) -> int:
    return module.embedding_dim if isinstance(module, nn.Embedding) else int(getattr(module, "out_channels", 0))


def _projector(modules: Mapping[str, nn.Module], name: str) -> str:
    """The largest module around a linear one that consists of linear modules only."""
    while parent := name.rpartition(".")[0]:
        if any(isinstance(part, nn.Embedding | nn.Conv2d | nn.Conv3d) for part in modules[parent].modules()):
            break
        if any(f"{other}.".startswith(f"{parent}.") for other in _stacks(modules)):
            break
        name = parent
    return name


def _seen(
    model: nn.Module, candidates: Candidates, batch: Batch, call: Callable[[nn.Module, Batch], Outputs]
) -> list[Candidate]:
    """The candidates that ran, with their shapes, and the modules that took a field of the batch."""
    modules = dict(model.named_modules())
    fields = {
        _identity(value): str(name)
        for name, value in (batch.items() if isinstance(batch, Mapping) else {})
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    shapes: dict[tuple[str, str], str] = {}
    norms: dict[tuple[str, str], tuple[float | None, float]] = {}
    wanted = {(candidate.module, candidate.at) for candidate in candidates}
    runs: Counter[tuple[str, str]] = Counter()
    taken: dict[str, Candidate] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        given = output[0] if isinstance(output, tuple) and output else output
        for at, x in (("input", first), ("output", given)):
            if isinstance(x, Tensor) and x.is_floating_point():
                if (name, at) in wanted and (name, at) not in norms:
                    norms[name, at] = _norms(x, batch)
                shapes.setdefault((name, at), _shape(x))
                runs[name, at] += 1
        if first is not None and _identity(first) in fields and not any(module.children()):
            what = f"takes the batch's {fields[_identity(first)]!r}"
            taken.setdefault(name, Candidate(name, "input", what, _shape(first), *_norms(first, batch)))

    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(kept_modes(model))
        stack.enter_context(kept_buffers(model))
        stack.enter_context(kept_weights(model))
        if has_fast_path(model):
            stack.enter_context(no_fast_path())
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(look, name), with_kwargs=True)
            stack.callback(handle.remove)
        model.eval()
        with torch.no_grad():
            call(model, batch)
    found = dict.fromkeys(taken.values())
    for candidate in candidates:
        key = candidate.module, candidate.at
        if key in shapes and not (candidate.at == "input" and candidate.module in taken):
            times = "" if runs[key] == 1 else f"; runs {runs[key]} times"
            token, row = norms[key]
            seen = replace(candidate, shape=shapes[key], token_norm=token, row_norm=row, what=candidate.what + times)
            found[seen] = None
    names = list(modules)
    return sorted(found, key=lambda candidate: names.index(candidate.module))


def _norms(x: Tensor, batch: Batch) -> tuple[float | None, float]:
    """The mean L2 norms of the positions, None of images, and of the rows of a tensor `(B, …)`, without padded words."""
    x = x.detach().reshape(1, -1) if x.ndim < 2 else x.detach()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    tokens = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == tokens.shape else torch.ones_like(tokens).bool()
    if not real.any():
        return 0.0, 0.0
    rows = torch.linalg.vector_norm((tokens * real).flatten(1) if tokens.ndim > 1 else tokens.unsqueeze(1), dim=1)
    return float(tokens[real].mean()) if x.ndim < 4 else None, float(rows.mean())


def _identity(x: Tensor) -> tuple[int, torch.Size]:
    return x.data_ptr(), x.shape


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))}{',' if x.ndim == 1 else ''})"
