"""Lightning itself: manual optimisation as docs/loops.md has it, and automatic, both with the gradients of a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from support.compare import close_gradients
from support.toy import ToyModel, toy_batch, toy_sites
from torch import Tensor, nn
from torch.utils.data import DataLoader

from advvl import L2, AdversarialTraining, Ascent, EmbeddingPerturber, FreeAT, FreeLB, SymmetricKL, adapt
from advvl.errors import ConfigurationError
from advvl.fit.lightning import AdversarialModule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.rank_zero.LightningDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*"),
]

BOTH = EmbeddingPerturber(text=Ascent(L2(), step_size=0.3), image=Ascent(L2(), step_size=0.3))
METHODS = {
    "freelb": AdversarialTraining(BOTH, FreeLB(3)),
    "villa": AdversarialTraining(BOTH, FreeLB(2), SymmetricKL(2.0), clean_weight=0.5),
}


class Module(lightning.LightningModule):
    """A toy model; the gradients of every update are kept."""

    def __init__(self, method: AdversarialTraining) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = ToyModel().double()
        self.target, self.method = adapt(self.model, toy_sites()), method
        self.updates: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.updates.append(gradients(self.model))


class Manual(Module):
    def __init__(self, method: AdversarialTraining) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        report = self.method.step(self.target, batch, backward=self.manual_backward)
        optimizer.step()
        self.log("train_loss", report.loss)


class Automatic(AdversarialModule, Module):
    pass


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches(count: int = 4) -> DataLoader[Any]:
    return DataLoader([toy_batch(rows=2, seed=seed) for seed in range(count)], batch_size=None)  # type: ignore[arg-type]


def trained(module: Module, **options: Any) -> Module:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, batches())
    return module


def plain_loop(
    method: AdversarialTraining, *, window: int = 1, clip: Callable[[Any], object] = lambda parameters: None
) -> tuple[list[dict[str, Tensor]], float]:
    """Gradients of every update, and the last objective."""
    module = Module(method)
    optimizer, loss, found = module.configure_optimizers(), 0.0, []
    for number, batch in enumerate(batches(), start=1):
        loss = float(method.step(module.target, batch, backward=lambda total: (total / window).backward()).loss)
        if number % window == 0:
            clip(module.model.parameters())
            found.append(gradients(module.model))
            optimizer.step()
            optimizer.zero_grad()
    return found, loss


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [Manual, Automatic])
def test_gradients_are_those_of_a_plain_loop(kind: type[Module], name: str) -> None:
    module = trained(kind(METHODS[name]))
    expected, loss = plain_loop(METHODS[name])
    close_gradients(module.updates, expected)
    assert float(module.trainer.callback_metrics["train_loss"]) == pytest.approx(loss)


def test_accumulation_and_clipping_are_lightnings() -> None:
    method = METHODS["villa"]
    module = trained(Automatic(method), accumulate_grad_batches=2, gradient_clip_val=0.05)
    expected, _ = plain_loop(method, window=2)
    assert len(expected) == 2
    close_gradients(module.updates[:1], expected[:1])  # clipped after they are seen
    clipped, _ = plain_loop(method, window=2, clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05))
    weights = Module(method).model.state_dict()
    for update in clipped:
        for key, gradient in update.items():
            weights[key] = weights[key] - 0.1 * gradient
    for key, value in module.model.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=1e-9, atol=1e-12)


def test_a_floor_counts_as_for_the_whole_window() -> None:
    """Whose batches are of rows alike in length, so that they make one batch."""
    text = Ascent(L2(), step_size=0.3, floor=0.05)
    method = AdversarialTraining(EmbeddingPerturber(text=text), FreeLB(3))
    module = trained(Automatic(method), accumulate_grad_batches=4)
    whole = {name: torch.cat([batch[name] for batch in batches()]) for name in toy_batch()}
    other = Module(method)
    method.step(other.target, whole)
    close_gradients(module.updates, [gradients(other.model)])


def test_bf16_is_that_of_autocast() -> None:
    method = METHODS["villa"]

    class Single(Automatic):
        def __init__(self) -> None:
            super().__init__(method)
            self.model.float()

    single = [
        copy.copy({k: v.float() if v.is_floating_point() else v for k, v in batch.items()}) for batch in batches()
    ]
    module = Single()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(single, batch_size=None))  # type: ignore[arg-type]
    other = Single()
    with torch.autocast("cpu", torch.bfloat16):
        method.step(other.target, single[0])
    close_gradients(module.updates[:1], [gradients(other.model)])


def test_a_step_in_a_training_step_of_automatic_optimisation_is_refused() -> None:
    """Lightning zeroes its gradients before it would update by them."""

    class Wrong(Module):
        training_step = Manual.training_step

    with pytest.raises(lightning.fabric.utilities.exceptions.MisconfigurationException, match="manual_backward"):
        trained(Wrong(METHODS["freelb"]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": AdversarialTraining(BOTH, FreeAT(2))}, r"one update a step .* got 2 \(FreeAT\)"),
        ({"automatic_optimization": False}, "automatic optimisation .* got manual"),
    ],
    ids=["FreeAT", "manual"],
)
def test_what_automatic_optimisation_cannot_do_is_refused(change: dict[str, Any], said: str) -> None:
    module = Automatic(METHODS["freelb"])
    for name, value in change.items():
        setattr(module, name, value)
    with pytest.raises(ConfigurationError, match=said):
        trained(module)
