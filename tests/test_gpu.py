"""On a GPU: the same numbers as on the CPU, the same bits twice, and mixed precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.toy import ToyModel, gradients, toy_batch, toy_sites
from torch import Tensor, nn
from torch.nn import functional as F

import advvl
from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    Site,
    SymmetricKL,
    Uniform,
)
from advvl.regularizers import divergences
from advvl.regularizers.divergences import Head, Kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, which this machine has not"),
]

SIZES = {"text": 0.3, "image": 0.5}


def on(device: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Adapter:
    torch.manual_seed(0)
    return Adapter(ToyModel(dropout=dropout).to(device, dtype), toy_sites())


def batch(device: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in toy_batch(dtype=dtype).items()}


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if before is None:
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]


@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize("masks", ["fresh", "shared"])
def test_a_step_is_that_of_the_cpu(order: str, masks: str) -> None:
    method = advvl.villa(step_sizes=SIZES, radius=0.4, modalities=order, dropout=masks, clean_weight=0.5)  # type: ignore[arg-type]
    cpu, gpu = on("cpu"), on("cuda")
    method.step(cpu, batch("cpu"))
    method.step(gpu, batch("cuda"))
    for name, gradient in gradients(cpu).items():
        torch.testing.assert_close(gradients(gpu)[name].cpu(), gradient, rtol=1e-9, atol=1e-12)


def test_replayed_dropout_is_the_same_on_the_device() -> None:
    passes = list[advvl.PassTrace]()
    still = EmbeddingPerturber(image=Ascent(L2(), step_size=1e-9, start=Uniform(1e-9)))
    method = AdversarialTraining(still, FreeLB(2), SymmetricKL(), dropout="shared")
    method.step(on("cuda", dropout=0.4), batch("cuda"), trace=passes.append)
    for seen in passes[1:]:
        torch.testing.assert_close(seen.logits, passes[0].logits, rtol=0, atol=1e-7)


@pytest.mark.usefixtures("deterministic")
def test_the_same_seed_gives_the_same_bits() -> None:
    def run() -> dict[str, Tensor]:
        target = on("cuda", dropout=0.2)
        torch.manual_seed(3)
        advvl.villa(step_sizes=SIZES).step(target, batch("cuda"))
        return gradients(target)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_attack_leaves_the_devices_random_state_alone() -> None:
    before = torch.cuda.get_rng_state()
    attack = Attack(EmbeddingPerturber(image=Ascent(L2(0.5), step_size=0.2, start=Uniform(0.5))), PGD(3))
    attack(on("cuda", dropout=0.5), batch("cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_mixed_precision_keeps_deltas_in_fp32_and_their_gradients_unscaled(dtype: torch.dtype) -> None:
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    plain, scaled = list[advvl.PassTrace](), list[advvl.PassTrace]()
    method = AdversarialTraining(
        EmbeddingPerturber(**{m: Ascent(L2(0.5), step_size=s) for m, s in SIZES.items()}),
        FreeLB(3),
        SymmetricKL(),
        nonfinite="keep",
    )
    inputs = batch("cuda", torch.float32)
    for backward, passes in ((None, plain), (lambda total: scaler.scale(total).backward(), scaled)):
        with torch.autocast("cuda", dtype):
            method.step(on("cuda", dtype=torch.float32), inputs, backward=backward, trace=passes.append)
    for one, two in zip(plain, scaled, strict=True):
        for modality, gradient in one.gradients.items():
            assert two.deltas[modality].dtype == torch.float32
            torch.testing.assert_close(two.gradients[modality], gradient, rtol=5e-2, atol=1e-4)


class Packed(nn.Module):
    """Rows of several samples one behind another, as an image's tokens in Qwen-VL."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, packed: Tensor, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.project(packed))
        logits = self.head(hidden.new_zeros(len(labels), 8).index_add(0, rows, hidden))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_packed_rows_move_under_deterministic_algorithms_to_the_same_bits(norm: advvl.ops.Norm) -> None:
    batch = {
        "packed": torch.randn(40, 5),
        "rows": torch.arange(3).repeat_interleave(torch.tensor([7, 12, 21])),
        "labels": torch.tensor([0, 3, 1]),
    }

    def run(device: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        target = Adapter(Packed().to(device), {"image": Site("project", rows=lambda batch: batch["rows"])})
        method = advvl.villa(step_sizes={"image": 0.3}, radius=0.5, norm=norm)
        method.step(target, {name: value.to(device) for name, value in batch.items()})
        return gradients(target)

    first, second, expected = run("cuda"), run("cuda"), run("cpu")
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [2, 100])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", ["clean||perturbed", "perturbed||clean", "symmetric"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_divergence_is_that_of_the_cpu_without_waiting_also_inside_a_cuda_graph(
    kind: Kind, head: Head, masked: bool, at_once: int
) -> None:
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    sides, cotangent = [3 * torch.randn(5, 40, dtype=torch.float64) for _ in range(2)], torch.randn(5).double()
    if mask is not None:
        for x in sides:
            x[~mask] = torch.nan

    def of(clean: Tensor, perturbed: Tensor, mask: Tensor | None, cotangent: Tensor) -> list[Tensor]:
        value: Any = divergences.divergences(clean, perturbed, mask, kind=kind, head=head)
        return [value.detach(), *torch.autograd.grad(value, (clean, perturbed), cotangent)]

    with patch.object(divergences, "SMALL", -1):  # in blocks of rows, however few there are
        expected = of(*(x.requires_grad_() for x in sides), mask, cotangent)
        there = [x.detach().cuda().requires_grad_() for x in sides]
        rest = None if mask is None else mask.cuda(), cotangent.cuda()
        with patch.object(divergences, "_rows_at_once", lambda *_: at_once):
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = of(*there, *rest)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                of(*there, *rest)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = of(*there, *rest)
            graph.replay()
    for values in (found, captured):
        for mine, theirs in zip(values, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-10, atol=1e-12)
