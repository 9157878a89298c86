"""A wrapper around a model, as DDP, `torch.compile` and PEFT put theirs."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrapper(nn.Module):
    """Keeps the model under the name it is given, or under several, one wrapper in another."""

    def __init__(self, model: nn.Module, *path: str) -> None:
        super().__init__()
        self.name, *rest = path
        setattr(self, self.name, Wrapper(model, *rest) if rest else model)

    def forward(self, **batch: Any) -> Any:
        return getattr(self, self.name)(**batch)
