"""BertAdam, the optimiser that LXMERT and LXMERT-AdvTrain are trained with, and its schedule.

Adam (Kingma & Ba, ICLR 2015) without bias correction, with weight decay apart from the gradient (Loshchilov & Hutter, ICLR
2019), as in the code of BERT (Devlin et al., NAACL 2019) and of LXMERT (Tan & Bansal, EMNLP 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from advvl.checks import at_least, fraction, fractions, not_negative, positive
from advvl.errors import ConfigurationError


class BertAdam(Optimizer):
    """m ← b₁m + (1−b₁)g, v ← b₂v + (1−b₂)g², p ← p − lr·(m/(√v + eps) + weight_decay·p).

    LXMERT decays every parameter, biases and normalisations too, and clips gradients outside, by
    `torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)`. A parameter without a gradient stays as it is.

    Arguments:
        params: parameters, or groups of them with options of their own.
        lr: before the schedule; see `warmup_linear`.

    Raises:
        ConfigurationError: a number out of its range; at `step`, a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            _check(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Arguments:
            closure: computes the loss again, with its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise ConfigurationError("expected dense gradients for BertAdam, got a sparse one; use sparse=False")
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        (first, second), mean, square = group["betas"], state["mean"], state["square"]
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        move = mean / (square.sqrt() + group["eps"])
        move.add_(parameter, alpha=group["weight_decay"])
        parameter.add_(move, alpha=-group["lr"])


def warmup_linear(update: int, updates: int, warmup: float = 0.1) -> float:
    """Return the factor of the learning rate in the update of that number, from 0, as published: up to 1, then down to 0.

    For `torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: warmup_linear(update, updates))`. Unlike the
    schedule "linear" of `advvl.fit.schedules` it is 0 in the first update, which therefore changes nothing; it reaches
    1 at exactly `warmup·updates` and stays 0 after the last update.

    Arguments:
        updates: of the whole training.
        warmup: the share of them in which it rises.

    Raises:
        ConfigurationError: no updates; a share outside [0, 1).
    """
    given = SimpleNamespace(update=update, updates=updates, warmup=warmup)
    at_least(0, given, "update")
    at_least(1, given, "updates")
    fraction(given, "warmup")
    progress = update / updates
    return progress / warmup if progress < warmup else max((1 - progress) / (1 - warmup), 0.0)


def _check(group: dict[str, Any]) -> None:
    options = SimpleNamespace(**group)
    not_negative(options, "lr", "weight_decay")
    positive(options, "eps")
    fractions(2, options, "betas")
