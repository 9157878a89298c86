"""The symmetric divergence of two tensors of logits and its gradient to both.

Ours against the published loop's expression, against the same in log space (which ours is where logits are few), and
against a bare copy of both tensors of logits, which reads them and writes as much as the gradients are: that is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from measures import device_of, peak_bytes
from races import Entry, Pace, Race, recorded
from support.published import symmetric_kl
from torch import Tensor

from advvl import SymmetricKL

pytestmark = pytest.mark.benchmark(timer=recorded)

SHAPES = [(512, 28996), (64, 3129)]  # masked words over a vocabulary; questions over VQA's answers
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the gradient's length


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {str(self.dtype).removeprefix('torch.')}"


def cases(device: torch.device) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return [Case(shape, dtype) for shape in SHAPES for dtype in dtypes]


def in_log_space(clean: Tensor, perturbed: Tensor) -> Tensor:
    p, q = clean.float().log_softmax(-1), perturbed.float().log_softmax(-1)
    return ((q.exp() - p.exp()) * (q - p)).sum(-1).mean()


class Bench:
    """The logits of a case and the lanes that compare them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        clean = torch.randn(case.shape, device=device)
        perturbed = clean + 0.3 * torch.randn(case.shape, device=device)
        self.sides = [x.to(case.dtype).requires_grad_() for x in (clean, perturbed)]
        self.logits_bytes = self.sides[0].nbytes
        exact = [x.detach().double().requires_grad_() for x in self.sides]
        self.expected = [x.float() for x in torch.autograd.grad(SymmetricKL()(*exact), exact)]
        self.facts = {
            "shape": list(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "bytes": 4 * self.logits_bytes,
        }

    def divergence(self, value: Callable[[Tensor, Tensor], Tensor], role: Any) -> Entry:
        gradients: list[Tensor] = []

        def call() -> None:
            gradients[:] = torch.autograd.grad(value(*self.sides), self.sides)

        def check() -> None:
            for found, expected in zip(gradients, self.expected, strict=True):
                assert (found - expected).norm() <= CLOSE[self.case.dtype] * expected.norm()

        call()
        check()
        gradients.clear()
        return self._entry(call, check, role)

    def copy(self) -> Entry:
        targets = [torch.empty_like(x) for x in self.sides]

        def call() -> None:
            for target, x in zip(targets, self.sides, strict=True):
                target.copy_(x.detach())

        def check() -> None:
            for target, x in zip(targets, self.sides, strict=True):
                torch.testing.assert_close(target, x.detach(), rtol=0, atol=0)

        call()
        return self._entry(call, check, "limit")

    def _entry(self, call: Callable[[], None], check: Callable[[], None], role: Any) -> Entry:
        peak = peak_bytes(call, self.device)
        return Entry(call, check, role, self.facts | {"peak_bytes": peak, "peak_logits": peak / self.logits_bytes})


LANES: dict[str, Callable[[Bench], Entry]] = {
    "ours": lambda bench: bench.divergence(SymmetricKL(), "ours"),
    "published expression": lambda bench: bench.divergence(symmetric_kl, "peer"),
    "in log space": lambda bench: bench.divergence(in_log_space, "peer"),
    "copy of both": lambda bench: bench.copy(),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(case, name) for case in cases(device_of(metafunc.config)) for name in LANES]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def test_divergence(race: Race, device: torch.device, case: Case, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(case, device)
        return {lane: partial(make, bench) for lane, make in LANES.items()}

    race("regularizer", str(case), name, build, Pace(budget=5.0, least=5, most=60))
