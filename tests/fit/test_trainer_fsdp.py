"""AdversarialTrainer under accelerate's FSDP2: two gloo processes have the gradients of one on all rows.

accelerate turns FSDP on where there are GPUs alone. Here its state is told on the CPU what it would find there; what then
shards, prepares, accumulates, clips, saves and loads is accelerate's and Trainer's own code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fit.test_trainer import (
    METHODS,
    ROWS,
    TEXT,
    WORDS,
    Gradients,
    arguments,
    batches,
    bert,
    model_of,
    questions,
    rows_of,
)
from peft import LoraConfig, get_peft_model
from support.compare import close_gradients
from support.spawn import run
from support.toy import toy_sites
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from advvl import AdversarialTraining, FreeLB, SymmetricKL
from advvl.fit.trainer import AdversarialTrainer

pytestmark = pytest.mark.slow  # several processes

PROCESSES, BATCHES = 2, 8
WRITTEN = AdversarialTraining(TEXT, FreeLB(3), SymmetricKL(2.0))


def steady_bert() -> nn.Module:
    """Without dropout, whose masks differ between processes."""
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def adapted_bert() -> nn.Module:
    lora = get_peft_model(steady_bert(), LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    return lora.double()


TOY: dict[str, Any] = {"model": model_of, "data": batches, "sites": toy_sites()}
BERT: dict[str, Any] = {
    "model": steady_bert,
    "data": questions,
    "sites": WORDS,
    "method": WRITTEN,
    "layer": "BertLayer",
    # Trainer multiplies a loss that takes keywords by the processes, for a division by items that this one ignores
    "args": {"average_tokens_across_devices": False},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {**TOY, "method": method} for name, method in METHODS.items()},
    "accumulated": {**TOY, "method": METHODS["villa"], "args": {"gradient_accumulation_steps": 2}},
    "clipped": {**TOY, "method": METHODS["pgd"], "args": {"max_grad_norm": 0.1}},
    "bert": BERT,
    "checkpointed": {**BERT, "fsdp": {"activation_checkpointing": True}},
    "loaded-by-one": {**BERT, "fsdp": {"cpu_ram_efficient_loading": True}},
    "lora": {**BERT, "model": adapted_bert},
}


class Whole(Gradients):
    """Gradients of sharded parameters, put together."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if isinstance(p.grad, DTensor)}
        self.updates.append({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()})


@contextmanager
def sharding_without_gpus() -> Iterator[None]:
    own: Callable[..., None] = AcceleratorState.__init__

    def told(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = told
    try:
        yield
    finally:
        AcceleratorState.__init__ = own


def trainer_of(folder: Path, case: dict[str, Any], seen: Gradients, **changes: Any) -> AdversarialTrainer:
    return AdversarialTrainer(
        model=case["model"](),
        args=arguments(folder, **{**case.get("args", {}), **changes}),
        train_dataset=rows_of(case["data"](BATCHES)),
        callbacks=[seen],
        method=case["method"],
        sites=case["sites"],
    )


def sharded(folder: Path, case: dict[str, Any], seen: Gradients, **changes: Any) -> AdversarialTrainer:
    layers = {"version": 2, "transformer_layer_cls_to_wrap": [case.get("layer", "Linear")], **case.get("fsdp", {})}
    with sharding_without_gpus():
        return trainer_of(folder, case, seen, ddp_backend="gloo", fsdp=True, fsdp_config=layers, **changes)


def worker(folder: Path) -> None:
    """One of the processes that torchrun starts."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        seen = Whole()
        sharded(folder / name, case, seen).train()
        found[name] = seen.updates
    # torch gathers whole state dicts on a CPU without waiting for them: a file of shards each
    saving = {"save_strategy": "steps", "save_steps": 1}
    seen = Whole()
    kept = {**BERT, "fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}
    sharded(folder / "saved", kept, seen, **saving).train()
    after = Whole()
    sharded(folder / "saved", kept, after, **saving).train(
        resume_from_checkpoint=str(folder / "saved" / "checkpoint-1")
    )
    found["resumed"] = [seen.updates[1:], after.updates]
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The gradients of every update in each case, in both processes."""
    folder = tmp_path_factory.mktemp("sharded")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    (ended,) = run([[*launch, "-m", "fit.test_trainer_fsdp", str(folder)]], limit=300)
    assert ended.code == 0, ended.output
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one_on_all_rows(
    found: list[dict[str, list[dict[str, Tensor]]]], tmp_path: Path, name: str
) -> None:
    seen = Gradients()
    trainer_of(tmp_path, CASES[name], seen, per_device_train_batch_size=ROWS * PROCESSES).train()
    for of_process in found:
        close_gradients(of_process[name], seen.updates)


def test_a_resumed_run_ends_as_one_that_was_never_killed(found: list[dict[str, Any]]) -> None:
    for of_process in found:
        straight, resumed = of_process["resumed"]
        close_gradients(resumed, straight)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that winds up by itself
