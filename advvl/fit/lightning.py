"""Adversarial training under Lightning's automatic optimisation; it imports no Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advvl.adapters.base import Adapter
from advvl.adapters.injection import Batch
from advvl.errors import ConfigurationError
from advvl.fit.shares import of_part
from advvl.training import AdversarialTraining


class AdversarialModule:
    """Mixin that trains a `LightningModule` by a method: `class Mine(AdversarialModule, LightningModule)`.

    Lightning zeroes the gradients between `training_step` and the backward, so the passes of a step run in the backward.
    Accumulation, clipping, precision and the loss scale are Lightning's own. The objective is logged as `train_loss`.

    Arguments (attributes that the subclass sets):
        target: the adapter of the model inside.
        method: the adversarial method of a step.

    Raises:
        ConfigurationError: in the first step, several processes, manual optimisation, or several updates a step; for these
            run the step yourself, see `docs/loops.md`.
    """

    target: Adapter
    method: AdversarialTraining

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Keep the batch for the backward; return 1, which Lightning divides and scales like a loss."""
        del batch_idx
        self._check()
        self._batch = batch
        return torch.ones((), device=self._lightning.device, requires_grad=True)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the step, with gradients multiplied by the factor that Lightning made of the 1."""
        del args, kwargs
        factor = loss.detach()
        with self._lightning.trainer.precision_plugin.forward_context():
            report = of_part(self.method, 1 / self._lightning.trainer.accumulate_grad_batches).step(
                self.target, self._batch, backward=lambda total: torch.autograd.backward(total * factor)
            )
        self._lightning.log("train_loss", report.loss)

    @property
    def _lightning(self) -> Any:
        """This module as the LightningModule that it also is."""
        return self

    def _check(self) -> None:
        module, updates = self._lightning, self.method.maximizer.updates
        refused = {
            "one process": (module.trainer.world_size > 1, f"{module.trainer.world_size}"),
            "automatic optimisation": (not module.automatic_optimization, "manual"),
            "one update a step": (updates > 1, f"{updates} ({type(self.method.maximizer).__name__})"),
        }
        for expected, (wrong, got) in refused.items():
            if wrong:
                raise ConfigurationError(
                    f"expected {expected} with AdversarialModule, got {got}; run the step yourself: docs/loops.md#lightning"
                )
