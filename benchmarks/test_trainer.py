"""AdversarialTrainer at FreeLB(K) against Trainer at as many passes of the model: K batches of the same size an update.

Both run whole trainings, with one optimiser and no log, so that all is timed that a loop does beside its passes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from measures import Extent, device_of, extent_of
from races import Entry, Pace, Race, recorded
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments

import advvl
from advvl.fit.trainer import AdversarialTrainer

pytestmark = pytest.mark.benchmark(timer=recorded)

STEPS, UPDATES, STEP_SIZE = 3, 6, 1e-3
SIZES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "medium": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048},
    "base": {},
}


@dataclass(frozen=True)
class Case:
    """Trainings of which BERT, on batches of how many rows of how many words."""

    size: str
    rows: int
    words: int

    def __str__(self) -> str:
        return f"BERT {self.size}, {self.rows} rows, {self.words} words"


def cases(device: torch.device, extent: Extent) -> list[Case]:
    if extent == "smoke":
        return [Case("small", 2, 16)]
    if device.type == "cuda":
        return [Case("medium", 32, 128), Case("base", 32, 128)]
    small = [Case("small", 16, 64)]
    return [*small, Case("medium", 8, 64), Case("base", 8, 64)] if extent == "full" else small


class Bench:
    """One model and its data, trained in either way."""

    def __init__(self, case: Case, device: torch.device, folder: str) -> None:
        self.case, self.device, self.folder = case, device, folder
        config = BertConfig(num_labels=3, **SIZES[case.size])
        self.model = BertForSequenceClassification(config)
        self.rows = [self._row() for _ in range(case.rows * STEPS * UPDATES)]
        self.facts = {
            "shape": f"{case}, width {config.hidden_size}, {config.num_hidden_layers} layers, K={STEPS}",
            "rows": case.rows,
            "updates": UPDATES,
        }

    def entry(self, kind: Callable[..., Trainer], role: Any, *, window: int, **options: Any) -> Entry:
        args = TrainingArguments(
            self.folder,
            use_cpu=self.device.type == "cpu",
            per_device_train_batch_size=self.case.rows,
            gradient_accumulation_steps=window,
            max_steps=UPDATES,
            learning_rate=1e-5,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=self.device.type == "cuda",
        )
        trainer = kind(self.model, args, train_dataset=self.rows, **options)
        trainer.remove_callback(PrinterCallback)
        passes: list[int] = []
        handle = self.model.register_forward_hook(lambda *_: passes.append(1))
        trainer.train()  # warms up, and shows that both run the model as often
        handle.remove()
        assert len(passes) == STEPS * UPDATES

        def check() -> None:
            assert trainer.state.global_step == UPDATES
            assert all(parameter.isfinite().all() for parameter in self.model.parameters())

        return Entry(trainer.train, check, role, self.facts, repeats=UPDATES)

    def _row(self) -> dict[str, Tensor]:
        words = torch.randint(1, self.model.config.vocab_size, (self.case.words,))
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words[0] % 3}


LANES: dict[str, Callable[[Bench], Entry]] = {
    "Trainer, K batches": lambda bench: bench.entry(Trainer, "limit", window=STEPS),
    "AdversarialTrainer, FreeLB": lambda bench: bench.entry(
        AdversarialTrainer, "ours", window=1, method=advvl.freelb(step_sizes={"text": STEP_SIZE}, steps=STEPS)
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = cases(device_of(metafunc.config), extent_of(metafunc.config))
    pairs = [(case, name) for case in found for name in LANES]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


def test_training(race: Race, device: torch.device, case: Case, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def build() -> dict[str, Callable[[], Entry]]:
            bench = Bench(case, device, folder)
            return {lane: partial(make, bench) for lane, make in LANES.items()}

        least = 20 if case.size == "small" else 5  # the interval of the small one has to tell 1.03 from 1.05
        race("trainer", str(case), name, build, Pace(budget=30.0, least=least, most=60))
