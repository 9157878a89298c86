"""AdversarialTrainer before TRL's trainers, themselves: the gradients of a plain loop, with and without LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from support.compare import close_gradients
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from advvl import (
    L2,
    PGD,
    AdversarialTraining,
    Ascent,
    EmbeddingPerturber,
    FreeLB,
    Objective,
    SymmetricKL,
    adapt,
    freelb,
)
from advvl.errors import ConfigurationError
from advvl.fit.outputs import clean_without_gradients, kept_outputs
from advvl.fit.trainer import AdversarialTrainer
from advvl.recipes.answers import forcing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*activation_checkpointing.*:FutureWarning"
    ),  # of transformers, by TRL's default
]

WORDS = 40
METHODS = {
    "freelb": AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)), FreeLB(3)),
    "villa": AdversarialTraining(EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)), FreeLB(2), SymmetricKL(2.0)),
}
OF_ANSWERS = AdversarialTraining(  # losses of its own, which read logits
    EmbeddingPerturber(text=Ascent(L2(), step_size=0.3)),
    PGD(2),
    climb=Objective(loss=forcing),
    teach=Objective(loss=lambda outputs, batch: -forcing(outputs, batch)),
)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def _accelerate_as_found() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **size, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def sentences(count: int = 4) -> Dataset:
    """Of different lengths, the first two words of each a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, WORDS, (5 + number,), generator=generator).tolist() for number in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids])


class Adversarial(AdversarialTrainer, SFTTrainer):
    """The class of docs/loops.md; it notes what its steps are given."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), {name: value.clone() for name, value in inputs.items()}]
        return super().training_step(model, inputs, *args, **kwargs)


class Gradients(TrainerCallback):
    """Those of every update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.updates.append(gradients(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer_of(folder: Path, method: AdversarialTraining, *, lora: bool = False, **changes: Any) -> Adversarial:
    options = {name: changes.pop(name) for name in ("sites", "compute_loss_func") if name in changes}
    args = SFTConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "sequential",
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "dataloader_pin_memory": False,
            **changes,
        }
    )
    return Adversarial(
        llama(),
        args,
        train_dataset=sentences(),
        processing_class=tokenizer(),
        peft_config=LORA if lora else None,
        method=method,
        **options,
    )


def joined(part: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of the rows of several, padded to the longest."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    rows = {name: [row for batch in part for row in batch[name]] for name in padding}
    return {
        name: nn.utils.rnn.pad_sequence(rows[name], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def plain_loop(
    method: AdversarialTraining, batches: list[Any], start: dict[str, Tensor], *, lora: bool, window: int
) -> list[dict[str, Tensor]]:
    """The same in a loop of one's own over batches as large as a window."""
    model: LlamaForCausalLM | PeftModel = get_peft_model(llama(), LORA) if lora else llama()
    model.load_state_dict(start)
    target, optimizer = adapt(model.train()), torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for first in range(0, len(batches), window):
        method.step(target, joined(batches[first : first + window]))
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("window", [1, 2], ids=["each", "accumulated"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("method", [*METHODS.values(), OF_ANSWERS], ids=[*METHODS, "losses of its own"])
def test_gradients_are_those_of_a_plain_loop(
    tmp_path: Path, method: AdversarialTraining, lora: bool, window: int
) -> None:
    seen = Gradients()
    trainer = trainer_of(tmp_path, method, lora=lora, gradient_accumulation_steps=window)
    trainer.add_callback(seen)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    expected = plain_loop(method, trainer.seen, start, lora=lora, window=window)
    assert len(expected) == 2 // window
    close_gradients(seen.updates, expected)


def test_the_log_has_what_both_trainers_log(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, METHODS["villa"])
    trainer.train()
    (first, *_) = trainer.state.log_history
    assert first["loss"] == pytest.approx(first["task_loss"] + first["regularization"])
    assert first["regularization"] > 0
    assert first["delta_norm_text"] > 0
    assert 0 < first["entropy"] < torch.tensor(WORDS).log() * 1.001


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_a_second_forward_without_gradients_is_not_the_attacked_one(tmp_path: Path) -> None:
    """With a loss function of the user's, TRL runs the model once more for its metrics."""

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (
            num_items_in_batch
        )

    method = METHODS["freelb"]
    trainer, seen = trainer_of(tmp_path, method, compute_loss_func=summed), Gradients()
    trainer.add_callback(seen)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    close_gradients(seen.updates, plain_loop(method, trainer.seen, start, lora=False, window=1))


# ---- trainers of pairs -------------------------------------------------------------------------------------------------


PAIRS = [
    {"prompt": "w5 w6", "chosen": " w7 w8 w9", "rejected": " w10"},
    {"prompt": "w9", "chosen": " w3", "rejected": " w4 w4"},
]


class AdversarialDPO(AdversarialTrainer, DPOTrainer):
    pass


class AdversarialReward(AdversarialTrainer, RewardTrainer):
    pass


def trained_on_pairs(
    folder: Path, kind: type, config: type, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights before one update, its batch, and its gradients."""
    args = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=1,
        per_device_train_batch_size=2,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )

    class Noting(kind):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen = {name: value.clone() for name, value in inputs.items()}
            return super().training_step(model, inputs, *args, **kwargs)

    words, seen = tokenizer(), Gradients()
    words.backend_tokenizer.pre_tokenizer = Whitespace()
    data = Dataset.from_list(PAIRS)
    trainer = Noting(args=args, train_dataset=data, processing_class=words, callbacks=[seen], **options)
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    (update,) = seen.updates
    return start, trainer.seen, update


@pytest.mark.parametrize("name", METHODS)
def test_a_perturbation_that_vanishes_leaves_what_a_trainer_of_preferences_does(tmp_path: Path, name: str) -> None:
    """TRL's DPOTrainer, whose loss is of pairs, and whose batches have no labels."""
    tiny = EmbeddingPerturber(text=Ascent(L2(), step_size=1e-7))

    def run(kind: type[DPOTrainer], **options: Any) -> dict[str, Tensor]:
        return trained_on_pairs(tmp_path, kind, DPOConfig, model=llama(), ref_model=llama(), **options)[-1]

    found = run(AdversarialDPO, method=replace(METHODS[name], perturber=tiny))
    plain = run(DPOTrainer)
    assert plain["model.embed_tokens.weight"].any()
    for key, gradient in plain.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def freelb_by_hand(model: nn.Module, batch: dict[str, Tensor], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of three passes, each weighing a third, with moves of length 0.3 between them."""
    (words,) = (part for part in model.modules() if isinstance(part, nn.Embedding))
    real = batch["attention_mask"].unsqueeze(-1)
    delta = torch.zeros(*real.shape[:2], words.embedding_dim, dtype=words.weight.dtype)
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        handle = words.register_forward_hook(lambda module, args, output, leaf=leaf: output + leaf * real)
        (loss() / 3).backward()
        handle.remove()
        assert leaf.grad is not None
        delta = leaf.detach() + 0.3 * leaf.grad / leaf.grad.flatten(1).norm(dim=1)[:, None, None]
    return gradients(model)


@pytest.mark.parametrize("kind", ["whole", "new adapter", "adapter trained further"])
def test_preferences_are_trained_under_perturbations_as_by_hand(tmp_path: Path, kind: str) -> None:
    """The reference of DPO, which TRL runs inside its loss, stays clean: another model, no adapter, or a copy of it."""

    def tuned() -> nn.Module:
        return get_peft_model(llama().double(), LORA)

    theirs: dict[str, dict[str, Any]] = {
        "whole": {"model": llama().double(), "ref_model": llama().double()},
        "new adapter": {"model": llama().double(), "peft_config": LORA},
        "adapter trained further": {"model": tuned()},
    }
    options = {**theirs[kind], "method": METHODS["freelb"]}
    start, batch, found = trained_on_pairs(tmp_path, AdversarialDPO, DPOConfig, **options)

    def answers(model: nn.Module) -> Tensor:
        """The log-probability of each row's answer."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        of_words = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (of_words * batch["completion_mask"][:, 1:]).sum(1)

    model: Any = llama().double() if kind == "whole" else tuned()
    model.load_state_dict({key: value for key, value in start.items() if ".ref." not in key})
    with torch.no_grad(), model.disable_adapter() if kind == "new adapter" else nullcontext():
        before = answers(model)

    def loss() -> Tensor:
        chosen, rejected = (answers(model) - before).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    close_gradients(found, freelb_by_hand(model, batch, loss), torch.float32)  # TRL's precision of log-probabilities


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_rewards_are_trained_under_perturbations_as_by_hand(tmp_path: Path, kind: str) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=WORDS, **size, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1)

    def make() -> nn.Module:
        torch.manual_seed(2)
        return LlamaForSequenceClassification(config).double()

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    tuned = {"peft_config": adapter} if kind == "lora" else {}
    options = {"model": make(), "method": METHODS["freelb"], **tuned}
    start, batch, found = trained_on_pairs(tmp_path, AdversarialReward, RewardConfig, **options)
    model: Any = get_peft_model(make(), adapter) if tuned else make()
    model.load_state_dict(start)

    def loss() -> Tensor:
        fields = {name: batch[name] for name in ("input_ids", "attention_mask")}
        chosen, rejected = model(**fields).logits.squeeze(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    close_gradients(found, freelb_by_hand(model, batch, loss))


def test_a_fused_head_gives_the_same_fields_beside_whole_logits() -> None:
    model = llama().double()
    plain = llama().double()
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    ids = torch.randint(3, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        labels[1, 1:] = plain(ids).logits[1, :-1].argmax(-1)  # some that it gets right
    fused = model(input_ids=ids, labels=labels, fused_lm_head=True)
    with kept_outputs(model, logits=True) as kept:
        whole = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert kept == [whole]
    assert torch.equal(whole.logits, plain(ids).logits)
    assert torch.equal(whole.label_mask, fused.label_mask)
    for field in fields:
        torch.testing.assert_close(
            whole[field] if field in whole else getattr(whole, field), fused[field], check_dtype=False
        )
    assert whole.is_top1.sum() == 6
    whole.log_probs.sum().backward()
    assert model.lm_head.weight.grad is not None
    with kept_outputs(model, logits=False) as kept:
        assert not hasattr(model(input_ids=ids, labels=labels, fused_lm_head=True), "logits")


def test_forwards_without_gradients_are_neither_kept_nor_perturbed() -> None:
    """Whichever comes first; unless the pass itself has no gradients."""
    model, batch = llama(), {"input_ids": torch.tensor([[1, 5, 6]])}
    target, delta = adapt(model), torch.ones(1, 3, 16)
    with torch.no_grad():
        plain = model(**batch).logits
    with (
        target.inject({"text": delta}),
        clean_without_gradients(model, target.clean),
        kept_outputs(model, logits=False) as kept,
    ):
        with torch.no_grad():
            before = model(**batch).logits
        moved = model(**batch).logits
        with torch.no_grad():
            after = model(**batch).logits
    assert torch.equal(before, plain)
    assert torch.equal(after, plain)
    assert not torch.allclose(moved, plain)
    assert [outputs.logits is moved for outputs in kept] == [True]
    with (
        torch.no_grad(),
        target.inject({"text": delta}),
        clean_without_gradients(model, target.clean),
        kept_outputs(model, logits=False) as kept,
    ):
        assert torch.equal(model(**batch).logits, moved)
    assert len(kept) == 1


def test_a_forward_that_fails_leaves_no_hook_and_no_clean_pass_behind() -> None:
    model = llama()
    target, delta = adapt(model), torch.ones(1, 3, 16)
    batch = {"input_ids": torch.tensor([[1, 5, 6]])}
    with torch.no_grad(), target.inject({"text": delta}):
        moved = model(**batch).logits
    with target.inject({"text": delta}):
        with clean_without_gradients(model, target.clean), torch.no_grad(), pytest.raises(IndexError):
            model(input_ids=torch.tensor([[WORDS]]))
        assert torch.equal(model(**batch).logits, moved)


def test_anything_but_a_method_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="expected method as an AdversarialTraining"):
        Adversarial(llama(), method=freelb)  # type: ignore[arg-type]
