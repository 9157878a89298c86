"""Readouts: the tensors that regularisers compare, from a pass and from the references, which run once per round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.injection import Batch, first_tensor
from advvl.errors import ConfigurationError, SiteError
from advvl.passes.forward import Pass, Passes
from advvl.regularizers.base import Readout, Regularizer
from advvl.regularizers.references import Frozen, Reference
from advvl.runtime.names import find, unwrapped
from advvl.runtime.states import kept_buffers


def tap(passes: Passes, regularizers: Sequence[Regularizer]) -> None:
    """Make the modules that regularisers read keep their outputs in later passes."""
    for regularizer in regularizers:
        if isinstance(regularizer.reads, str):
            passes.adapter.tap(regularizer.reads)


def read(regularizer: Regularizer, run: Pass, passes: Passes) -> Tensor:
    """The tensor of a pass that a regulariser compares."""
    return read_from(regularizer.reads, run.outputs, run.binding.taps, passes.adapter)


def rows_of(regularizer: Regularizer, adapter: Adapter, batch: Batch) -> Tensor | None:
    """The mask of the rows of a batch that a regulariser compares; None: all."""
    if regularizer.rows is not None:
        return regularizer.rows(batch)
    return adapter.positions(batch) if regularizer.reads is None else None


def of_references(regularizers: Sequence[Regularizer], passes: Passes) -> list[Tensor | None]:
    """The tensor of each regulariser's reference, run on the clean batch without a graph; None for the clean pass.

    A reference shared by several regularisers runs once.
    """
    found: dict[int, tuple[Outputs, Mapping[str, Tensor]]] = {}
    for regularizer in regularizers:
        reference = regularizer.reference
        if reference is not None and id(reference) not in found:
            names = {
                other.reads for other in regularizers if other.reference is reference and isinstance(other.reads, str)
            }
            found[id(reference)] = _run(reference, names, passes)
    return [
        None if one.reference is None else read_from(one.reads, *found[id(one.reference)], passes.adapter).detach()
        for one in regularizers
    ]


def _run(reference: Reference, names: set[str], passes: Passes) -> tuple[Outputs, Mapping[str, Tensor]]:
    adapter = passes.adapter
    if isinstance(reference, Frozen) and unwrapped(reference.frozen) is unwrapped(adapter.model):
        raise ConfigurationError(
            "expected another model to hold frozen, got the one that is trained; use Frozen.copy_of(model)"
        )
    with (
        torch.no_grad(),
        adapter.clean(),
        reference.model(adapter.model) as model,
        kept_buffers(model),
        _outputs_of(model, names) as taps,
    ):
        return adapter.call(model, passes.batch), taps


@contextmanager
def _outputs_of(model: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules in a forward inside this context; for a model whose hooks need not stay."""
    taps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: taps.__setitem__(name, first_tensor(output))

    with ExitStack() as stack:
        for name in names:
            stack.callback(find(model, name).register_forward_hook(keep(name)).remove)
        yield taps


def read_from(reads: Readout | None, outputs: Outputs, taps: Mapping[str, Tensor], adapter: Adapter) -> Tensor:
    """Return the tensor that is read from a pass: the logits, the output of a module, or that of a function.

    Raises:
        SiteError: a module that did not run in the pass.
        ConfigurationError: a function that gives no tensor.
    """
    if reads is None:
        return adapter.logits(outputs)
    if isinstance(reads, str):
        if reads not in taps:
            raise SiteError(
                f"expected the module {reads!r} to run in every pass, but it did not; adapt before torch.compile, or read "
                "another module"
            )
        return taps[reads]
    found: object = reads(outputs)
    if not isinstance(found, Tensor):
        raise ConfigurationError(f"expected reads to give a tensor from the outputs, got {type(found).__name__}")
    return found
