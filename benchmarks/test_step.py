"""One VILLA update on a UNITER: ours, the published loop, and the passes that neither can do without.

Beside time: floating-point operations, and the most memory that tensors hold at one time, as a number of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import torch
from measures import Extent, LiveBytes, device_of, extent_of, flops, peak_bytes
from races import Entry, Pace, Race, recorded
from support.published import villa as published_villa
from torch import Tensor

import advvl
from advvl import adapt
from advvl.models.uniter.model import UniterConfig, gather_index
from advvl.tasks.uniter.vqa import UniterForVQA

pytestmark = pytest.mark.benchmark(timer=recorded)

STEPS, WORDS, REGIONS, STEP_SIZE = 3, 20, 36, 1e-3
COUNTED_ROWS = 1  # of the batch that operations are counted on; they grow with the rows
CLOSE = 1e-3  # ours and the published loop, fp32, no dropout: relative difference of the whole gradient
TOY, LARGE = "toy", "large, 24 layers"  # for `make gpu-check` alone

Mode = Literal["text", "both", "in turn"]
CONFIGS: dict[str, Callable[[], UniterConfig]] = {
    TOY: lambda: UniterConfig.tiny(num_hidden_layers=1, max_position_embeddings=WORDS),
    "tiny": lambda: UniterConfig.tiny(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000
    ),
    "base, 6 layers": lambda: UniterConfig.base(num_hidden_layers=6),
    "base, 12 layers": lambda: UniterConfig.base(),
    LARGE: lambda: UniterConfig.large(),
}
ANSWERS = {TOY: 10, "tiny": 100, "base, 6 layers": 3129, "base, 12 layers": 3129, LARGE: 3129}
SIZES = [size for size in CONFIGS if size not in (TOY, LARGE)]


@dataclass(frozen=True)
class Case:
    """One update: of which model, with which modalities perturbed, in which precision (bfloat16 by autocast)."""

    size: str
    mode: Mode
    dtype: torch.dtype = torch.float32
    rows: int = 8

    def __str__(self) -> str:
        return f"{self.size}, {self.mode}, {str(self.dtype).removeprefix('torch.')}, {self.rows} rows"

    @property
    def turns(self) -> list[tuple[str, ...]]:
        """Which modalities the passes of one step perturb."""
        return {"text": [("text",)], "both": [("text", "image")], "in turn": [("text",), ("image",)]}[self.mode]

    @property
    def step_sizes(self) -> dict[str, float]:
        return {modality: STEP_SIZE for turn in self.turns for modality in turn}


def cases(device: torch.device, extent: Extent) -> list[Case]:
    modes: tuple[Mode, ...] = ("text", "both", "in turn")
    if extent == "smoke":
        return [Case("tiny", mode, rows=2) for mode in modes]
    if device.type == "cuda":
        dtypes = (torch.float32, torch.bfloat16)
        return [Case(size, mode, dtype, 32) for size in SIZES for mode in modes for dtype in dtypes]
    if extent == "full":
        large = [Case("tiny", mode, rows=32) for mode in modes]
        return [*(Case(size, mode) for size in SIZES for mode in modes), *large]
    tiny = [Case("tiny", mode) for mode in modes]
    return [*tiny, Case("base, 6 layers", "text", rows=4)]


class Bench:
    """A model, a batch, and the lanes that leave its parameters' gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        config = CONFIGS[case.size]()
        self.model = UniterForVQA(config, num_answers=ANSWERS[case.size]).to(device).train()
        self.target = adapt(self.model)
        self.inputs = self.batch(case.rows)
        self.few = self.batch(COUNTED_ROWS)
        self.expected: Tensor | None = None
        with self.precision():
            self.bare(self.inputs, count=1)  # every gradient is there from now on
            self.one_graph = self._graph_bytes()
            self.one_pass = peak_bytes(lambda: self._loss(self.inputs).backward(retain_graph=True), device)
        self.facts = {
            "shape": f"{case.rows} rows, {WORDS} words, {REGIONS} regions, width {config.hidden_size}, "
            f"{config.num_hidden_layers} layers, K={STEPS}",
            "rows": case.rows,
            "dtype": str(case.dtype).removeprefix("torch."),
            "size": case.size,
            "mode": case.mode,
        }

    def batch(self, rows: int) -> dict[str, Tensor]:
        config = self.model.config
        words, regions = torch.full((rows,), WORDS), torch.full((rows,), REGIONS)
        fields = {
            "input_ids": torch.randint(1, config.vocab_size, (rows, WORDS)),
            "img_feat": torch.randn(rows, REGIONS, config.img_dim),
            "img_pos_feat": torch.rand(rows, REGIONS, 7),
            "attn_masks": torch.ones(rows, WORDS + REGIONS, dtype=torch.long),
            "gather_index": gather_index(words, regions, WORDS),
            "targets": torch.rand(rows, ANSWERS[self.case.size]),
        }
        return {name: value.to(self.device) for name, value in fields.items()}

    def precision(self) -> AbstractContextManager[object]:
        if self.case.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.case.dtype)

    def zeros(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, config = len(inputs["input_ids"]), self.model.config
        shapes = {"text": (rows, WORDS, config.hidden_size), "image": (rows, REGIONS, config.img_dim)}
        return {modality: torch.zeros(shapes[modality], device=self.device) for modality in self.case.step_sizes}

    def villa(self, inputs: dict[str, Tensor], *, dropout: Any) -> None:
        method = advvl.villa(
            step_sizes=self.case.step_sizes, steps=STEPS, modalities=self._order, dropout=dropout, kl_weight=1.5
        )
        method.step(self.target, inputs)

    def freelb(self, inputs: dict[str, Tensor]) -> None:
        advvl.freelb(step_sizes=self.case.step_sizes, steps=STEPS, modalities=self._order).step(self.target, inputs)

    def published(self, inputs: dict[str, Tensor], *, attention: Literal["sdpa", "eager"] = "sdpa") -> None:
        with attending(self.model, attention):
            published_villa(
                self.target,
                inputs,
                self.zeros(inputs),
                step_sizes=self.case.step_sizes,
                steps=STEPS,
                alter=self.case.mode == "in turn",
            )

    def bare(self, inputs: dict[str, Tensor], *, count: int) -> None:
        """Forward and backward passes of the model and nothing else."""
        for _ in range(count):
            self._loss(inputs).backward()

    def unavoidable(self, inputs: dict[str, Tensor], *, shared: bool) -> None:
        """The passes of an exact VILLA update, in their order, with the gradients that they have to give.

        The clean graph waits for the end. With shared masks it also gives the first step's perturbation gradients, by a
        backward towards them alone; the last step's are not needed.
        """
        turns, zeros = self.case.turns, self.zeros(inputs)
        leaves = {modality: zero.requires_grad_() for modality, zero in zeros.items()}
        with self.target.inject(leaves) if shared else nullcontext():
            clean = self._loss(inputs)
        if shared:
            torch.autograd.grad(clean, list(leaves.values()), retain_graph=True)
        for step in range(1 if shared else 0, STEPS):
            for turn in turns:
                wanted = {m: leaves[m].detach().requires_grad_(step < STEPS - 1) for m in turn}
                with self.target.inject(wanted):
                    loss = self._loss(inputs)
                loss.backward()
                del loss
        clean.backward()

    def entry(self, work: Callable[[dict[str, Tensor]], None], role: Any, *, exact: bool = False) -> Entry:
        """A lane that does `work`; `exact`: one that must give the published loop's gradient."""
        call = self.update(work)
        if self.case.size == "tiny" and self.case.dtype == torch.float32:
            self.model.eval()  # no dropout: the lanes can be compared
            call()
            self._check(exact)
            self.model.train()
        return Entry(call, self._check, role, self.facts | self._counts(work))

    def update(self, work: Callable[[dict[str, Tensor]], None]) -> Callable[[], None]:
        """`work` on the batch in the case's precision, from no gradients on."""

        def call() -> None:
            self.model.zero_grad()
            with self.precision():
                work(self.inputs)

        return call

    @property
    def _order(self) -> Any:
        return "in turn" if self.case.mode == "in turn" else "together"

    def _loss(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.target.loss(self.target.forward(inputs), inputs).mean()

    def _check(self, exact: bool = False) -> None:
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
        if exact:
            if self.expected is None:
                self.expected = gradient
            assert (gradient - self.expected).norm() <= CLOSE * self.expected.norm()

    def _counts(self, work: Callable[[dict[str, Tensor]], None]) -> dict[str, Any]:
        """Memory, and operations under eager attention, which torch's registry counts."""
        with self.precision():
            peak = peak_bytes(lambda: work(self.inputs), self.device)
            with attending(self.model, "eager"):
                counted = flops(lambda: work(self.few)) * self.case.rows // COUNTED_ROWS
        return {"flops": counted, "peak_bytes": peak, "graphs": 1 + (peak - self.one_pass) / self.one_graph}

    def _graph_bytes(self) -> int:
        """What the graph of one pass keeps."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            loss = self._loss(self.inputs)
            kept = torch.cuda.memory_allocated(self.device) - before
        else:
            with LiveBytes() as live:
                loss = self._loss(self.inputs)
                kept = live.now
        del loss
        return kept


LANES: dict[str, Callable[[Bench], Entry]] = {
    "published loop": lambda bench: bench.entry(bench.published, "peer", exact=True),
    "ours, fresh masks": lambda bench: bench.entry(partial(bench.villa, dropout="fresh"), "ours", exact=True),
    "ours, shared masks": lambda bench: bench.entry(partial(bench.villa, dropout="shared"), "ours", exact=True),
    "unavoidable, fresh masks": lambda bench: bench.entry(partial(bench.unavoidable, shared=False), "limit"),
    "unavoidable, shared masks": lambda bench: bench.entry(partial(bench.unavoidable, shared=True), "limit"),
    "FreeLB, ours": lambda bench: bench.entry(bench.freelb, "ours"),
    "bare passes": lambda bench: bench.entry(partial(bench.bare, count=STEPS * len(bench.case.turns)), "limit"),
}


# On a CPU torch's fused attention falls back to the plain one where there is dropout, so that both come to the same.
GPU_LANES: dict[str, Callable[[Bench], Entry]] = {
    "published loop, eager attention": lambda bench: bench.entry(
        partial(bench.published, attention="eager"), "peer", exact=True
    )
}


def lanes(device: torch.device) -> dict[str, Callable[[Bench], Entry]]:
    return LANES | GPU_LANES if device.type == "cuda" else LANES


@contextmanager
def attending(model: UniterForVQA, attention: str) -> Iterator[None]:
    """Attention by this implementation of transformers' for a while."""
    config = model.config
    before, config._attn_implementation = config._attn_implementation, attention
    try:
        yield
    finally:
        config._attn_implementation = before


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device, extent = device_of(metafunc.config), extent_of(metafunc.config)
    pairs = [(case, name) for case in cases(device, extent) for name in lanes(device)]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def test_update(race: Race, device: torch.device, case: Case, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(case, device)
        return {lane: partial(make, bench) for lane, make in lanes(device).items()}

    race("step", str(case), name, build, Pace(budget=10.0, least=3, most=20))
