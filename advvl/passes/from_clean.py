"""Losses that compare every pass with the clean one: KL from the clean answer, a distance of features, a chosen answer.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advvl.adapters.base import Adapter, Outputs
from advvl.adapters.injection import Batch
from advvl.checks import check_functions
from advvl.errors import ConfigurationError
from advvl.passes.objective import Loss
from advvl.passes.readouts import read_from


@dataclass(frozen=True)
class FromClean:
    """A loss of a perturbed and of the clean pass; the clean one runs once for each batch attacked, without a graph.

        Attack(perturber, PGD(20), loss=FromClean(kl_from_clean))

    Where it is a distance, its gradient is zero at the clean point: start at random.

    Arguments:
        compare: from a tensor of the perturbed pass and the same one of the clean pass to one number per row `(B,)`.
        reads: the tensor: a module's name for its output, or a function of the model's outputs; None: the logits.

    Raises:
        ConfigurationError: parts that are none.
    """

    compare: Callable[[Tensor, Tensor], Tensor]
    reads: str | Callable[[Outputs], Tensor] | None = None

    def __post_init__(self) -> None:
        check_functions(reads=None if isinstance(self.reads, str) else self.reads)
        compare: object = self.compare
        if not callable(compare):
            got = type(compare).__name__
            raise ConfigurationError(f"expected compare as a function of two tensors, perturbed and clean, got {got}")

    def on(self, adapter: Adapter, batch: Batch) -> Loss:
        """Run the clean pass of a batch, and return the loss of the outputs of its other passes.

        Raises:
            SiteError: `reads` names a module that the model lacks or does not run.
            ConfigurationError: `reads` gives no tensor.
        """
        if isinstance(self.reads, str):
            adapter.tap(self.reads)
        with torch.no_grad(), adapter.clean():
            outputs = adapter.forward(batch)
            clean = (
                read_from(self.reads, outputs, adapter.taps, adapter).detach().clone()
            )  # a later pass may write to it

        def loss(outputs: Outputs, batch: Batch) -> Tensor:
            del batch
            return self.compare(read_from(self.reads, outputs, adapter.taps, adapter), clean)

        return loss
