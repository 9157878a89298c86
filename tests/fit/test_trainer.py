"""AdversarialTrainer: the gradients of a plain loop under everything that Trainer does around them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.compare import close_gradients
from support.counting import HostReads
from support.spawn import environment
from support.toy import ToyModel, toy_batch, toy_sites
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import advvl
from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Frozen,
    Site,
    SymmetricKL,
    Uniform,
    adapt,
    ops,
)
from advvl.errors import CheckpointError, ConfigurationError, NonFiniteError, SiteError
from advvl.fit.trainer import AdversarialTrainer
from advvl.recipes import circuit_breakers

pytestmark = pytest.mark.slow

ROWS = 2
ASCENT = Ascent(L2(), step_size=0.3)
BOTH = EmbeddingPerturber(text=ASCENT, image=ASCENT)
TEXT = EmbeddingPerturber(text=ASCENT)
METHODS = {
    "freelb": AdversarialTraining(BOTH, FreeLB(3)),
    "villa": AdversarialTraining(BOTH, FreeLB(2, modalities="in turn"), SymmetricKL(2.0), clean_weight=0.5),
    "shared": AdversarialTraining(BOTH, FreeLB(2), SymmetricKL(2.0), dropout="shared"),
    "pgd": AdversarialTraining(BOTH, PGD(2)),
}
WORDS = {"text": Site("bert.embeddings.word_embeddings", mask=lambda batch: batch["attention_mask"])}


@pytest.fixture(autouse=True)
def _accelerate_as_found() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is that of a whole process


class Mean(ToyModel):
    """The toy as Trainer wants a model: one loss for all rows."""

    def forward(self, **fields: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(**fields)
        return outputs | {"loss": outputs["loss"].mean()}


class Toy(Mean):
    def forward(self, ids, regions, mask, region_mask, labels):  # type: ignore[no-untyped-def]
        return super().forward(ids=ids, regions=regions, mask=mask, region_mask=region_mask, labels=labels)


def model_of(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    return Toy(dropout=dropout).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    return [toy_batch(rows=ROWS, seed=seed, dtype=dtype) for seed in range(count)]


def rows_of(fields: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in batch.items()} for batch in fields for i in range(len(batch["labels"]))]


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return kind(**values | changes)


class Gradients(TrainerCallback):
    """Those of every update; each begins at a known random state."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(100 + state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.updates.append(gradients(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(
    folder: Path, model: nn.Module, data: Any, *, trainer: Any = AdversarialTrainer, options: Any = None, **changes: Any
) -> list[dict[str, Tensor]]:
    """The gradients of every update."""
    seen = Gradients()
    options = {"sites": toy_sites(), **(options or {})}
    args = arguments(folder, **changes)
    trainer(model=model, args=args, train_dataset=data, callbacks=[seen], **options).train()
    return seen.updates


def plain_loop(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    method: AdversarialTraining,
    *,
    window: int = 1,
    sites: Any = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The same in a loop of one's own."""
    target = adapt(model.train(), toy_sites() if isinstance(model, ToyModel) else sites)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for update, first in enumerate(range(0, len(data), window)):
        torch.manual_seed(100 + update)
        part = data[first : first + window]
        count = len(part)
        for batch in part:
            method.step(target, batch, backward=lambda total, n=count: (total / n).backward(), **options)
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("window", [1, 3], ids=["each", "accumulated"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_a_plain_loop(tmp_path: Path, name: str, dropout: float, window: int) -> None:
    data = batches(5)  # in windows of three the last is not complete
    expected = plain_loop(model_of(dropout), data, METHODS[name], window=window)
    found = trained(
        tmp_path,
        model_of(dropout),
        rows_of(data),
        options={"method": METHODS[name]},
        gradient_accumulation_steps=window,
    )
    close_gradients(found, expected)


def test_a_data_set_without_a_length_is_one_too(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            yield from rows_of(batches(4))

    method = METHODS["villa"]
    found = trained(tmp_path, model_of(), Stream(), options={"method": method}, max_steps=4)
    close_gradients(found, plain_loop(model_of(), batches(4), method))


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=8, **size)).double()


def sentences() -> list[dict[str, Tensor]]:
    """Three batches with ever fewer words that count."""
    ids = torch.randint(20, (3, ROWS, 6), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": words, "labels": words.where(torch.arange(6) < 6 - 2 * i, -100)} for i, words in enumerate(ids)
    ]


def joined(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in data]) for name in data[0]}


@pytest.mark.parametrize("regularizer", [None, SymmetricKL(2.0)], ids=["task", "penalty"])
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_a_window_is_the_batch_of_all_its_rows(tmp_path: Path, floor: float, regularizer: SymmetricKL | None) -> None:
    """Means are over the window's tokens, of which its batches have ever fewer, and a floor counts as for the whole."""
    perturber = EmbeddingPerturber(text=Ascent(L2(), step_size=0.3, floor=floor))
    method = AdversarialTraining(perturber, FreeLB(2), regularizer)
    data, options = sentences(), {"method": method}
    expected = plain_loop(language_model(), [joined(data)], method, sites=None)
    found = trained(
        tmp_path, language_model(), rows_of(data), options=options | {"sites": None}, gradient_accumulation_steps=3
    )
    close_gradients(found, expected, torch.float32)  # transformers takes the loss in that


def test_half_precision_is_that_of_autocast(tmp_path: Path) -> None:
    data, method = batches(2, torch.float32), METHODS["villa"]

    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**batch)
        return {name: value.float() for name, value in outputs.items()}

    model = model_of(dtype=torch.float32)
    target = adapt(model, toy_sites(), call=call)
    method.step(target, data[0])
    found = trained(
        tmp_path, model_of(dtype=torch.float32), rows_of(data), options={"method": method}, bf16=True, max_steps=1
    )
    close_gradients(found, [gradients(model)], torch.float32)
    full = plain_loop(model_of(dtype=torch.float32), data[:1], method)
    with pytest.raises(AssertionError):
        close_gradients(found, full, torch.float32)


def test_a_loss_scaler_changes_no_update(tmp_path: Path) -> None:
    """As fp16 has on a GPU; accelerate gives none on a CPU, so it is put there."""
    data = rows_of(batches(4, torch.float32))
    method = AdversarialTraining(BOTH, FreeLB(3), SymmetricKL(2.0), nonfinite="keep")

    def run(scale: float | None) -> tuple[list[dict[str, Tensor]], nn.Module]:
        model, seen = model_of(dtype=torch.float32), Gradients()
        args = arguments(tmp_path, gradient_accumulation_steps=2)
        trainer = AdversarialTrainer(
            model=model, args=args, train_dataset=data, callbacks=[seen], method=method, sites=toy_sites()
        )
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        return seen.updates, model

    (plain, expected), (scaled, found) = run(None), run(1024.0)
    for ours, theirs in zip(scaled, plain, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], 1024 * value, rtol=1e-5, atol=1e-3)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def bert(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **size, **changes)
    return BertForSequenceClassification(config).double()


def questions(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 20, (ROWS, 6), generator=generator),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
            "labels": torch.randint(3, (ROWS,), generator=generator),
        }
        for _ in range(count)
    ]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    method = AdversarialTraining(TEXT, FreeLB(3), SymmetricKL(2.0))
    options = {"method": method, "sites": WORDS}
    expected = plain_loop(bert(), questions(2), method, sites=WORDS)
    model = bert()
    found = trained(tmp_path, model, rows_of(questions(2)), options=options, activation_checkpointing=True)
    assert model.is_activation_checkpointing
    close_gradients(found, expected)


def test_label_smoothing_counts(tmp_path: Path) -> None:
    method = AdversarialTraining(TEXT, FreeLB(3), SymmetricKL(2.0))

    def smoothed(outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.3)

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    expected = plain_loop(bert(**still), questions(2), method, sites=WORDS, loss=smoothed)
    options = {"method": method, "sites": WORDS}
    found = trained(tmp_path, bert(**still), rows_of(questions(2)), options=options, label_smoothing_factor=0.3)
    close_gradients(found, expected, torch.float32)  # Trainer sums in that


@pytest.mark.parametrize("told", [False, None])
def test_a_mean_that_trainer_takes_for_a_part_is_corrected_by_the_flag(tmp_path: Path, told: bool | None) -> None:
    """The loss of a model that takes any keywords, and leaves the number of items alone."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    method, data = AdversarialTraining(TEXT, FreeLB(3)), questions(2)

    class Told(AdversarialTrainer):
        loss_is_scaled_for_ga = told

    options = {"method": method, "sites": WORDS}
    said = "loss_is_scaled_for_ga = False"
    with pytest.warns(UserWarning, match=said) if told is None else nullcontext():
        found = trained(
            tmp_path, bert(**still), rows_of(data), trainer=Told, options=options, gradient_accumulation_steps=2
        )
    (expected,) = plain_loop(bert(**still), data, method, window=2, sites=WORDS)
    times = 1 if told is False else 2
    close_gradients(found, [{name: times * value for name, value in expected.items()}])

    class Plain(Trainer):
        loss_is_scaled_for_ga = told

    seen, model = Gradients(), bert(**still)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    Plain(model=model, args=args, train_dataset=rows_of(data), callbacks=[seen]).train()
    model.load_state_dict(bert(**still).state_dict())
    model.zero_grad()
    for batch in data:
        (model(**batch).loss / 2).backward()
    close_gradients(seen.updates, [{name: times * value for name, value in gradients(model).items()}])


@pytest.mark.parametrize("averaged", [True, False])
def test_a_loss_that_trainer_multiplies_by_the_processes_is_warned_of(tmp_path: Path, averaged: bool) -> None:
    """One process that is counted as two: Trainer multiplies the loss, which ignores the number of items."""
    options = {"method": AdversarialTraining(TEXT, FreeLB(2)), "sites": WORDS}
    said = "average_tokens_across_devices=False"
    with (
        patch.object(Accelerator, "num_processes", property(lambda _: 2)),
        pytest.warns(UserWarning, match=said) if averaged else nullcontext(),
    ):
        trained(tmp_path, bert(), rows_of(questions(1)), options=options, average_tokens_across_devices=averaged)


class Squared(Trainer):
    """A loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss.square(), outputs) if return_outputs else loss.square()


class Before(AdversarialTrainer, Squared):
    """Put before a trainer that has one."""


class After(Squared, AdversarialTrainer):
    """And after."""


@pytest.mark.parametrize("kind", [Before, After])
def test_a_loss_of_a_subclass_counts(tmp_path: Path, kind: type[AdversarialTrainer]) -> None:
    method = METHODS["villa"]
    expected = plain_loop(model_of(), batches(2), method, loss=lambda outputs, _: outputs["loss"].square())
    found = trained(tmp_path, model_of(), rows_of(batches(2)), trainer=kind, options={"method": method})
    close_gradients(found, expected)


def test_a_loss_function_of_the_users_counts(tmp_path: Path) -> None:
    """Which divides by the items of the window, as Trainer expects of it."""
    method, data = METHODS["villa"], batches(4)

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    class WithoutLabels(Toy):
        def forward(self, ids, regions, mask, region_mask, labels=None):  # type: ignore[no-untyped-def]
            absent = torch.zeros(len(ids), dtype=torch.long) if labels is None else labels
            return {"logits": super().forward(ids, regions, mask, region_mask, absent)["logits"]}

    torch.manual_seed(0)
    model = WithoutLabels().double()
    options = {"method": method, "compute_loss_func": summed}
    found = trained(tmp_path, model, rows_of(data), options=options, gradient_accumulation_steps=2)
    close_gradients(found, plain_loop(model_of(), data, method, window=2))


def test_a_subclass_for_sequences_trains(tmp_path: Path) -> None:
    class SequenceTrainer(AdversarialTrainer, Seq2SeqTrainer):
        pass

    def t5() -> T5ForConditionalGeneration:
        torch.manual_seed(0)
        size = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=20, **size, dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False)
        return T5ForConditionalGeneration(config).double()

    ids = torch.randint(1, 20, (2, ROWS, 5), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": words, "labels": words.flip(1)} for words in ids]
    sites, method = {"text": "encoder.embed_tokens"}, AdversarialTraining(TEXT, FreeLB(3), SymmetricKL(2.0))
    expected = plain_loop(t5(), data, method, sites=sites)
    found = trained(
        tmp_path,
        t5(),
        rows_of(data),
        trainer=SequenceTrainer,
        options={"method": method, "sites": sites},
        kind=Seq2SeqTrainingArguments,
    )
    close_gradients(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by dynamo itself
def test_a_compiled_model_is_perturbed(tmp_path: Path) -> None:
    method = METHODS["villa"]
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    found = trained(tmp_path, model_of(), rows_of(batches(2)), options={"method": method}, **changes)
    close_gradients(found, plain_loop(model_of(), batches(2), method))


def test_a_callback_moves_the_schedule_of_a_method(tmp_path: Path) -> None:
    """It replaces `trainer.method` between steps, here by circuit breakers of the share of training that is done."""
    data, frozen = batches(3), Frozen.copy_of(model_of())

    def breakers(progress: float) -> AdversarialTraining:
        return circuit_breakers(
            ["mix"],
            harmful=lambda batch: torch.cat([batch["mask"], ~batch["region_mask"]], 1),
            retained=lambda batch: torch.cat([~batch["mask"], batch["region_mask"]], 1),
            progress=progress,
            reference=frozen,
        )

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.method = breakers(state.global_step / state.max_steps)

    seen = Gradients()
    trainer = AdversarialTrainer(
        model_of(),
        arguments(tmp_path),
        train_dataset=rows_of(data),
        method=breakers(0.0),
        sites=toy_sites(),
        callbacks=[seen, Progress()],
    )
    trainer.train()
    model, expected = model_of().train(), []
    target, optimizer = adapt(model, toy_sites()), torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(data):
        breakers(step / 3).step(target, batch)
        expected.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    close_gradients(seen.updates, expected)


def test_every_new_model_is_adapted(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(model_of())
        return made[-1]

    seen, method = Gradients(), METHODS["villa"]
    options = {"method": method, "sites": toy_sites(), "callbacks": [seen]}
    args = arguments(tmp_path)
    trainer = AdversarialTrainer(model_init=make, args=args, train_dataset=rows_of(batches(2)), **options)
    trainer.train()
    trainer.train()
    assert len(made) == 3
    expected = plain_loop(model_of(), batches(2), method)
    close_gradients(seen.updates, [*expected, *expected])


def test_an_adapter_of_the_users_is_taken(tmp_path: Path) -> None:
    model, method = model_of(), METHODS["villa"]
    target = adapt(model, {**toy_sites(), "unused": "mix"}, logits=lambda outputs: 2 * outputs["logits"])
    found = trained(tmp_path, model, rows_of(batches(2)), options={"method": method, "target": target, "sites": None})
    other = model_of()
    doubled = adapt(other, toy_sites(), logits=lambda outputs: 2 * outputs["logits"])
    method.step(doubled, batches(1)[0])
    close_gradients(found[:1], [gradients(other)])


START = Ascent(L2(radius=0.5), step_size=0.3, start=Uniform(0.4))
RANDOM = AdversarialTraining(EmbeddingPerturber(text=START, image=START), FreeLB(2), SymmetricKL(2.0))


def started(folder: Path, model: nn.Module, method: AdversarialTraining = RANDOM, **changes: Any) -> AdversarialTrainer:
    """Two epochs of three updates, shuffled, with dropout and random starts."""
    values = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "train_sampling_strategy": "random"}
    values |= {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", **changes}
    args = arguments(folder, **values)
    return AdversarialTrainer(
        model=model, args=args, train_dataset=rows_of(batches(5)), method=method, sites=toy_sites()
    )


@pytest.mark.parametrize("stopped_at", [2, 3], ids=["within an epoch", "between epochs"])
def test_resumed_it_ends_at_the_same_bits(tmp_path: Path, stopped_at: int) -> None:
    whole = model_of(0.5)
    started(tmp_path / "whole", whole).train()
    started(tmp_path / "part", model_of(0.5), max_steps=6).train()
    resumed = model_of(0.5)
    started(tmp_path / "part", resumed).train(resume_from_checkpoint=str(tmp_path / f"part/checkpoint-{stopped_at}"))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(resumed.head.weight, model_of().head.weight)


class Noted(advvl.Start):
    """Notes the seeds of the generators that it is given."""

    random = True

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def make(self, ball: Any, place: Any, generator: Any) -> Tensor:
        self.seeds.append(generator.initial_seed())
        return torch.zeros_like(place.x)


def test_every_batch_has_starts_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(**changes: Any) -> list[int]:
        start = Noted()
        method = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3, start=start)), FreeLB(1))
        started(tmp_path, model_of(), method, save_strategy="no", **changes).train()
        return start.seeds

    first = seeds()
    assert len(set(first)) == 10
    assert seeds() == first
    assert not set(seeds(seed=7)) & set(first)
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert not set(seeds()) & set(first)


def test_the_same_trainer_resumes_like_another(tmp_path: Path) -> None:
    start = Noted()
    method = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3, start=start)), FreeLB(1))
    trainer = started(tmp_path, model_of(), method)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(start.seeds) == 11
    assert start.seeds[-1] == start.seeds[-2]


def test_a_checkpoint_of_another_method_is_not_resumed(tmp_path: Path) -> None:
    plain = AdversarialTraining(TEXT, FreeLB(2))
    started(tmp_path, model_of(), plain).train()
    other = started(tmp_path, model_of(), AdversarialTraining(TEXT, FreeLB(3)))
    for resume in (True, str(tmp_path / "checkpoint-5")):
        with pytest.raises(
            CheckpointError, match=r"this method .*, got another in maximizer\.steps \(2 there, 3 here\); "
        ):
            other.train(resume_from_checkpoint=resume)
    same = AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)), FreeLB(2))
    started(tmp_path, model_of(), same).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_its_method_is_resumed_with_a_warning(tmp_path: Path) -> None:
    method = AdversarialTraining(TEXT, FreeLB(2))
    started(tmp_path, model_of(), method).train()
    (tmp_path / "checkpoint-5" / "advvl_method.json").unlink()
    with pytest.warns(UserWarning, match="does not say which method its run had"):
        started(tmp_path, model_of(), method).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_evaluation_is_not_perturbed(tmp_path: Path) -> None:
    model, data = model_of(0.5), rows_of(batches(3))
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = AdversarialTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, method=METHODS["villa"], sites=toy_sites()
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        clean = [model(**batch) for batch in batches(3)]
    mean = torch.stack([outputs["loss"] for outputs in clean]).mean().item()
    in_training = next(logs["eval_loss"] for logs in reversed(trainer.state.log_history) if "eval_loss" in logs)
    assert in_training == pytest.approx(mean, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-6)
    logits = torch.cat([outputs["logits"] for outputs in clean])
    torch.testing.assert_close(torch.from_numpy(trainer.predict(data).predictions), logits)


def test_the_log_has_the_objective_and_its_parts(tmp_path: Path) -> None:
    """Means over the updates since it last spoke, of windows (0 1) (2 3) (4) (0 1) (2 3); it does not come to the last."""
    data = batches(5)
    method = AdversarialTraining(TEXT, FreeLB(3), SymmetricKL(2.0), nonfinite="keep")
    args = arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=5, learning_rate=0.0)
    trainer = AdversarialTrainer(
        model=model_of(), args=args, train_dataset=rows_of(data), method=method, sites=toy_sites()
    )
    trainer.train()
    first, second, *others = trainer.state.log_history
    target = adapt(model_of(), toy_sites())
    reports = [method.step(target, batch) for batch in data]
    norms = [report.delta_norms["text"].mean() for report in reports]
    for logs, weights in ((first, [0.25, 0.25, 0.25, 0.25, 0]), (second, [0.25, 0.25, 0, 0, 0.5])):
        for name in ("loss", "task_loss", "regularization"):
            mean = sum(weight * getattr(report, name).item() for weight, report in zip(weights, reports, strict=True))
            assert logs[name] == pytest.approx(mean, rel=1e-6), name
        mean = sum(weight * norm.item() for weight, norm in zip(weights, norms, strict=True))
        assert logs["delta_norm_text"] == pytest.approx(mean, rel=1e-6)
        assert logs["nonfinite_text"] == 0
    assert others
    assert not any("task_loss" in other for other in others)


def test_the_log_of_a_loss_that_is_a_mean_over_the_window(tmp_path: Path) -> None:
    method, data = AdversarialTraining(TEXT, FreeLB(2), SymmetricKL(20.0)), sentences()
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer = AdversarialTrainer(model=language_model(), args=args, train_dataset=rows_of(data), method=method)
    trainer.train()
    report = method.step(adapt(language_model().train()), joined(data))
    for name in ("loss", "task_loss", "regularization"):
        mean = float(getattr(report, name))
        assert trainer.state.log_history[0][name] == pytest.approx(mean, rel=1e-5), name


def test_rows_that_were_kept_back_are_counted(tmp_path: Path) -> None:
    data = batches(2)
    data[0]["regions"][1] = torch.inf  # of the first update's two batches; its other row is finite
    method = AdversarialTraining(TEXT, FreeLB(2), nonfinite="keep")
    args = arguments(tmp_path, gradient_accumulation_steps=2, logging_nan_inf_filter=False)
    trainer = AdversarialTrainer(
        model=model_of(), args=args, train_dataset=rows_of(data), method=method, sites=toy_sites()
    )
    trainer.train()
    assert trainer.state.log_history[0]["nonfinite_text"] >= 1


@pytest.mark.parametrize("masks", ["fresh", "shared"])
@pytest.mark.parametrize(("nonfinite", "expected"), [("keep", 0), ("raise", 1)])
def test_a_step_reads_nothing_from_the_device_but_whether_all_is_finite(
    tmp_path: Path, nonfinite: Any, expected: int, masks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ops._BACKENDS, "cpu", ops._BACKENDS["reference"])  # on a CPU nothing waits, and it may read
    counts: list[int] = []

    class Counting(AdversarialTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with HostReads() as reads:
                loss = super().training_step(*args, **kwargs)
            counts.append(reads.count)
            return loss

    method = AdversarialTraining(BOTH, FreeLB(3), SymmetricKL(2.0), dropout=masks, nonfinite=nonfinite)
    trained(tmp_path, model_of(), rows_of(batches(4)), trainer=Counting, options={"method": method})
    assert counts[1:] == [expected] * 3  # with shared masks the first step sees whether replay works


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name != "on_log":
            object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


def test_callbacks_are_called_as_by_trainer(tmp_path: Path) -> None:
    def events(kind: Any, **options: Any) -> list[str]:
        seen = Events()
        args = arguments(tmp_path, gradient_accumulation_steps=2)
        data = rows_of(batches(5))
        kind(model=model_of(), args=args, train_dataset=data, callbacks=[seen], **options).train()
        return seen.seen

    ours = events(AdversarialTrainer, method=METHODS["villa"], sites=toy_sites())
    assert ours == events(Trainer)
    assert ours.count("on_substep_end") == 2


def test_a_loss_of_the_instance_stays(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = AdversarialTrainer(
        model=model_of(), args=args, train_dataset=rows_of(batches(1)), method=METHODS["freelb"], sites=toy_sites()
    )
    plain, calls = trainer.compute_loss, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    trainer.compute_loss = counted  # type: ignore[method-assign]
    trainer.train()
    assert len(calls) == 3
    assert trainer.compute_loss is counted


FEW: dict[str, Callable[[], Any]] = {
    "several updates": lambda: AdversarialTraining(BOTH, FreeAT(2)),
    "a carried perturbation": lambda: AdversarialTraining(BOTH, FreeAT(1)),
    "the best of each row": lambda: AdversarialTraining(BOTH, PGD(2, keep="best")),
    "rows that stop": lambda: AdversarialTraining(BOTH, PGD(2, early_stop=True)),
    "no method": lambda: FreeLB(2),
}


@pytest.mark.parametrize("name", FEW)
def test_a_method_that_trainer_cannot_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected .* got .*; "):
        AdversarialTrainer(model=model_of(), args=arguments(tmp_path), method=FEW[name](), sites=toy_sites())


def test_a_modality_that_the_model_lacks_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="expected a modality of Toy among \\['text'\\], got 'image'"):
        AdversarialTrainer(model=model_of(), args=arguments(tmp_path), method=METHODS["villa"], sites={"text": "words"})


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"args": arguments(tmp_path), "method": METHODS["villa"]}
    with pytest.raises(SiteError, match="does not hold its sites"):
        AdversarialTrainer(model=model_of(), target=adapt(model_of(), toy_sites()), **options)
    model = model_of()
    for beside in ({"model": model, "sites": toy_sites()}, {"model_init": model_of}):
        with pytest.raises(ConfigurationError, match="expected a target alone"):
            AdversarialTrainer(target=adapt(model, toy_sites()), **beside, **options)


def test_training_arguments_that_go_wrong_with_several_passes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, ParallelismConfig

    def refusal(args: TrainingArguments, kind: type[AdversarialTrainer] = AdversarialTrainer) -> str:
        with pytest.raises(ConfigurationError) as caught:
            kind(model=model_of(), args=args, method=METHODS["villa"], sites=toy_sites())
        return str(caught.value)

    reentrant = arguments(
        tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}
    )
    assert "expected activation checkpointing without reentry" in refusal(reentrant)
    assert "LOMO" in refusal(arguments(tmp_path, optim="lomo"))
    scaled = arguments(tmp_path)
    scaled.fp16 = True
    assert "expected nonfinite='keep' with fp16" in refusal(scaled)
    several = arguments(tmp_path)
    several._n_gpu = 2
    assert "expected one process per device, got 2 devices" in refusal(several)
    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "distributed_type", kind)
            assert f"expected one device, DDP or FSDP2, got {kind}" in refusal(arguments(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
        patch.setattr(Accelerator, "is_fsdp2", False)
        assert "expected one device, DDP or FSDP2, got FSDP1; start" in refusal(arguments(tmp_path))

    class Parallel(AdversarialTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(tp_size=2))

    assert "expected data parallelism alone" in refusal(arguments(tmp_path), Parallel)


def test_a_model_that_gives_no_loss_is_refused(tmp_path: Path) -> None:
    class Mute(Toy):
        def forward(self, ids, regions, mask, region_mask, labels):  # type: ignore[no-untyped-def]
            return super().forward(ids, regions, mask, region_mask, labels)["logits"]

    with pytest.raises(ConfigurationError, match=r"expected compute_loss to give .* got a loss of shape \(4,\)"):
        trained(tmp_path, Mute().double(), rows_of(batches(1)), options={"method": METHODS["freelb"]})
    unlabelled = [{k: v for k, v in row.items() if k != "labels"} for row in rows_of(questions(1))]
    options = {"method": AdversarialTraining(TEXT, FreeLB(2)), "sites": WORDS}
    with pytest.raises(ValueError, match="did not return a loss"):
        trained(tmp_path, bert(), unlabelled, options=options)


def test_a_batch_with_nan_is_an_error(tmp_path: Path) -> None:
    data = batches(1)
    data[0]["regions"][1] = torch.nan
    with pytest.raises(NonFiniteError):
        trained(tmp_path, model_of(), rows_of(data), options={"method": METHODS["villa"]})


PROCESSES = 2


def worker(folder: str) -> None:
    """One of the processes that torchrun starts."""
    reduced: list[int] = []

    def reduce(state, bucket):  # type: ignore[no-untyped-def]
        reduced.append(bucket.index())
        return allreduce_hook(state, bucket)

    class Counted(AdversarialTrainer):
        def _prepare_for_training(self, *args: Any) -> Any:
            model, loader = super()._prepare_for_training(*args)
            model.register_comm_hook(None, reduce)
            return model, loader

    changes = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    options = {"method": METHODS["villa"]}
    found = trained(Path(folder), model_of(), rows_of(batches(8)), trainer=Counted, options=options, **changes)
    assert reduced == [0] * len(found)  # one bucket, once an update
    torch.save(found, f"{folder}/{os.environ['RANK']}.pt")
    different = METHODS[("villa", "freelb")[int(os.environ["RANK"])]]
    with pytest.raises(ConfigurationError, match="the method to be the same in all"):
        trained(Path(folder), model_of(), rows_of(batches(8)), options={"method": different}, ddp_backend="gloo")


def test_two_processes_have_the_gradients_of_one_on_all_rows(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*launch, "-m", "fit.test_trainer", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": ROWS * PROCESSES}
    expected = trained(tmp_path, model_of(), rows_of(batches(8)), options={"method": METHODS["villa"]}, **changes)
    for rank in range(PROCESSES):
        close_gradients(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


if __name__ == "__main__":
    worker(sys.argv[1])
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that winds up by itself


def test_what_is_not_a_method_a_model_or_the_first_base_is_refused_with_the_way_out(tmp_path: Path) -> None:
    given: dict[str, Any] = {"args": arguments(tmp_path), "train_dataset": rows_of(batches(1))}
    with pytest.raises(ConfigurationError, match=r"got the function freelb; call it: freelb\(…\)"):
        AdversarialTrainer(Mean(), method=advvl.freelb, **given)  # type: ignore[arg-type]
    for args, kwargs in (((adapt(Mean(), toy_sites()),), {}), ((), {"model": adapt(Mean(), toy_sites())})):
        with pytest.raises(ConfigurationError, match=r"got its adapter; pass model=adapter\.model, target=adapter"):
            AdversarialTrainer(*args, method=METHODS["pgd"], **given, **kwargs)
    with pytest.raises(ConfigurationError, match=r"write class Mine\(AdversarialTrainer, Seq2SeqTrainer\)"):
        type("Mine", (Seq2SeqTrainer, AdversarialTrainer), {})
    inner = type("Inner", (AdversarialTrainer, Seq2SeqTrainer), {})
    assert issubclass(type("Outer", (inner,), {}), Seq2SeqTrainer)
