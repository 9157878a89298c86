"""References: other weights, whose outputs on the clean batch a regulariser compares with."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from advvl.checks import is_number
from advvl.errors import ConfigurationError
from advvl.runtime.names import without_frameworks
from advvl.runtime.states import kept_modes, kept_requires_grad


class Reference(ABC):
    """Other weights that a regulariser compares with; they run on the clean batch and never get gradients."""

    @abstractmethod
    @contextmanager
    def model(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the model to run, which is called like the trained `model`; both are left as they were."""


class Frozen(Reference):
    """Another model that does not change: a frozen copy, or a teacher that takes the same batch.

    Arguments:
        model: the other model; its modes and `requires_grad` stay as they are.

    Raises:
        ConfigurationError: something else than a model.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"expected a model (nn.Module) to hold frozen, got {type(model).__name__}")
        self.frozen = model

    @classmethod
    def copy_of(cls, model: nn.Module) -> Frozen:
        """Copy a model's weights as they are now, in eval mode and without gradients."""
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"expected a model (nn.Module) to copy, got {type(model).__name__}")
        return cls(copy.deepcopy(without_frameworks(model)).eval().requires_grad_(False))

    @contextmanager
    def model(self, model: nn.Module) -> Iterator[nn.Module]:
        del model
        yield self.frozen


class Averaged(Reference):
    """An exponential moving average of a model's weights; call `update(model)` after every optimiser step.

    Arguments:
        model: the model in training; the average starts as a copy of its weights.
        decay: of the average, per update.

    Raises:
        ConfigurationError: something else than a model; a decay out of its range.

    Buffers are averaged too; integer and bool buffers are copied.

    Source: torch.optim.swa_utils.AveragedModel; mean teachers (SMART's Bregman term).
    """

    def __init__(self, model: nn.Module, decay: float = 0.99) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"expected a model (nn.Module) to average, got {type(model).__name__}")
        if not is_number(decay) or not 0 <= decay < 1:
            raise ConfigurationError(f"expected a decay in [0, 1), got {decay!r}")
        self.decay = decay
        average = AveragedModel(without_frameworks(model), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
        average.n_averaged.fill_(1)  # at 0 torch's first update would copy the weights instead
        self.average: AveragedModel = average.eval().requires_grad_(False)

    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's current weights.

        Raises:
            ConfigurationError: a model of other parameters.
        """
        plain = without_frameworks(model)
        if _shapes(plain) != _shapes(self.average.module):  # torch would average those that it can pair
            raise ConfigurationError(
                "expected the model that is averaged, got one of other parameters; make Averaged(model) after get_peft_model"
            )
        self.average.update_parameters(plain)
        for ours, theirs in zip(self.average.module.buffers(), plain.buffers(), strict=True):
            if not (
                ours.is_floating_point() or ours.is_complex()
            ):  # torch rounds an average of counts down, and one of flags up
                ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Return the average for a checkpoint."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`."""
        self.average.load_state_dict(state)

    @contextmanager
    def model(self, model: nn.Module) -> Iterator[nn.Module]:
        del model
        yield self.average.module


class AdapterOff(Reference):
    """The model itself with its PEFT adapter switched off, in eval mode: no second copy of the weights.

    The adapter is one of `get_peft_model`, of transformers' `model.add_adapter` or of PEFT's
    `inject_adapter_in_model`.

    Raises:
        ConfigurationError: a model without an adapter.
    """

    @contextmanager
    def model(self, model: nn.Module) -> Iterator[nn.Module]:
        with kept_modes(model), kept_requires_grad(model), _adapter_off(model):
            model.eval()
            yield model


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    peft: Any = next((part for part in model.modules() if hasattr(part, "disable_adapter")), None)
    if peft is not None:
        with peft.disable_adapter():
            yield
        return
    # layers of an adapter without a PEFT model around them; PEFT's flag on them is called disable_adapters
    layers: list[Any] = [part for part in model.modules() if isinstance(getattr(part, "disable_adapters", None), bool)]
    if not layers:
        raise ConfigurationError(
            f"expected a PEFT model for AdapterOff(), got {type(model).__name__} without an adapter; "
            "use Frozen.copy_of(model)"
        )
    switched = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in switched:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)


def _shapes(model: nn.Module) -> list[Any]:
    return [tensor.shape for tensor in (*model.parameters(), *model.buffers())]
