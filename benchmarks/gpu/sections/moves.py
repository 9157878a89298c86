"""What several sections do with one update of a perturbation: its tensors, its ways, and its check."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support.published import moved
from torch import Tensor

from advvl.errors import ConfigurationError
from advvl.ops import step_and_project
from benchmarks.gpu.setting import Setting, Skipped
from benchmarks.gpu.timing import Pace, repeated

STEP_SIZE, RADIUS = 0.3, 1.0  # from a row on the ball along a random gradient: every step ends outside it
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # of the row's length
CHECKED = 2  # rows at either end that are held to the reference


@dataclass(frozen=True)
class Tensors:
    """A perturbation of length RADIUS in every row, its gradient, and what to do with them."""

    delta: Tensor
    grad: Tensor
    options: dict[str, Any]

    @classmethod
    def of(
        cls, setting: Setting, rows: int, size: int, dtype: torch.dtype = torch.float32, *, ball: bool = True
    ) -> Tensors:
        """Drawn on the device, since there may be many."""
        delta, grad = (torch.randn(rows, size, device=setting.device, dtype=dtype) for _ in range(2))
        delta /= math.sqrt(size) / RADIUS  # a row's length is that of as many standard normal numbers
        return cls(delta, grad, {"step_size": STEP_SIZE, "radius": RADIUS if ball else math.inf})

    @property
    def nbytes(self) -> int:
        """What an update has to move: the perturbation and its gradient are read, the perturbation is written."""
        return 3 * self.delta.numel() * self.delta.element_size()

    def ours(self, **options: Any) -> Callable[[], object]:
        """Our update in place; it is called once, and held to the reference at both ends."""
        delta = self.delta.clone()

        def call() -> None:
            step_and_project(delta, self.grad, **self.options | options, inplace=True)

        ends = [slice(0, CHECKED), slice(len(delta) - CHECKED, len(delta))]
        expected = [
            step_and_project(delta[end].clone(), self.grad[end], **self.options, backend="reference").delta
            for end in ends
        ]
        try:
            call()
        except ConfigurationError as refusal:
            raise Skipped(str(refusal)) from refusal
        for end, rows in zip(ends, expected, strict=True):
            error = (delta[end].double() - rows.double()).norm(dim=1)
            assert (error <= CLOSE[delta.dtype] * rows.double().norm(dim=1)).all(), "expected the reference's update"
            if math.isfinite(self.options["radius"]):
                assert (delta[end].double().norm(dim=1) <= self.options["radius"]).all(), "expected a row in its ball"
        return call

    def published(self) -> Callable[[], object]:
        kept = [self.delta]

        def call() -> None:
            kept[0] = moved(kept[0], self.grad, self.options["step_size"], "l2", self.options["radius"])

        call()
        return call

    def copy(self) -> Callable[[], object]:
        """As many bytes as `nbytes`: a copy reads and writes, so one and a half of the tensor."""
        source, target = self.delta.flatten(), torch.empty_like(self.delta).flatten()
        half = source.numel() // 2

        def call() -> None:
            target.copy_(source)
            target[:half].copy_(source[:half])

        call()
        return call


def device_times(setting: Setting, calls: dict[str, Callable[[], object]], pace: Pace) -> dict[str, list[float]]:
    """Rounds of one call of each way, without the host's share."""
    graphs = {name: repeated(call, setting.device) for name, call in calls.items()}
    times = setting.times({name: replay for name, (replay, _) in graphs.items()}, pace)
    return {name: [seconds / graphs[name][1] for seconds in rounds] for name, rounds in times.items()}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
