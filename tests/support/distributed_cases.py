"""Steps that several processes make together, each on its rows, and one process alone, on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import advvl
from advvl import Adapter, AdversarialTraining
from advvl.runtime.processes import global_mean, process_count, process_index, share
from support.compare import close_gradients
from support.spawn import attempt
from support.toy import ToyModel, toy_batch, toy_sites

ROWS = 8  # in all processes together
UNEQUAL = {1: [8], 2: [5, 3], 4: [3, 1, 2, 2]}
SIZES = {"text": 0.3, "image": 0.5}
Wrap = Callable[[nn.Module], nn.Module]
Named = dict[str, Tensor]


def method_of(name: str) -> AdversarialTraining:
    if name == "freelb":
        return advvl.freelb(step_sizes=SIZES)
    if name == "villa":
        return advvl.villa(step_sizes=SIZES, clean_weight=0.5)
    if name == "villa-shared":
        return advvl.villa(step_sizes=SIZES, dropout="shared")
    if name == "villa-in-turn":
        return advvl.villa(step_sizes=SIZES, modalities="in turn")
    if name == "villa-detached":
        parts = advvl.villa(step_sizes=SIZES)
        return AdversarialTraining(parts.perturber, parts.maximizer, advvl.KL(detach_clean=True))
    if name == "pgd":
        ascent = advvl.Ascent(advvl.L2(0.5), step_size=0.2)
        return AdversarialTraining(advvl.EmbeddingPerturber(image=ascent), advvl.PGD(3))
    ascent = advvl.Ascent(advvl.Linf(0.2), step_size=0.2)
    return AdversarialTraining(advvl.EmbeddingPerturber(image=ascent), advvl.FreeAT(2, carry=False))


METHODS = ["freelb", "villa", "villa-shared", "villa-in-turn", "villa-detached", "pgd", "free_at"]


class Again(nn.Module):
    """A linear layer that the backward computes again."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(nn.functional.linear, x, self.weight, self.bias, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointedSites(ToyModel):
    """The sites themselves are computed again in the backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)


def model_of(dtype: torch.dtype = torch.float64, *, checkpointed: bool = False) -> ToyModel:
    torch.manual_seed(0)
    model = ToyModel().to(dtype)
    if checkpointed:  # above the sites
        model.mix = Again(model.mix)  # type: ignore[assignment]
    return model


def part(batch: Mapping[str, Tensor], sizes: list[int] | None = None) -> Named:
    """This process's rows: as many as the others', or `sizes` of each."""
    sizes = sizes or [len(batch["labels"]) // process_count()] * process_count()
    first = sum(sizes[: process_index()])
    return {name: value[first : first + sizes[process_index()]] for name, value in batch.items()}


def updated(name: str, wrap: Wrap, dtype: torch.dtype = torch.float64, **options: Any) -> Named:
    """The parameters after one step of plain SGD, FreeAT's after both of its."""
    target = Adapter(wrap(model_of(dtype)), toy_sites())
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    method_of(name).step(target, part(toy_batch(ROWS, dtype=dtype)), update=update, **options)
    if method_of(name).maximizer.updates == 1:
        update()
    return plain(dict(target.model.named_parameters()))


def scaled(wrap: Wrap) -> Named:
    """Under a loss scale that does not change, as GradScaler has it."""
    target = Adapter(wrap(model_of()), toy_sites())
    method_of("villa").step(target, part(toy_batch(ROWS)), backward=lambda loss: (1024 * loss).backward())
    return {name: gradient / 1024 for name, gradient in gradients(target.model).items()}


def autocast(wrap: Wrap) -> Named:
    target = Adapter(wrap(model_of(torch.float32)), toy_sites())
    with torch.autocast("cpu", torch.bfloat16):
        method_of("villa").step(target, part(toy_batch(ROWS, dtype=torch.float32)))
    return gradients(target.model)


def checkpointed(wrap: Wrap) -> Named:
    target = Adapter(wrap(model_of(checkpointed=True)), toy_sites())
    method_of("villa").step(target, part(toy_batch(ROWS)))
    return gradients(target.model)


def unequal(wrap: Wrap) -> Named:
    """Different numbers of rows, of which loss and regulariser are means."""
    target, batch = Adapter(wrap(model_of()), toy_sites()), part(toy_batch(ROWS), UNEQUAL[process_count()])
    weight = share(torch.tensor(len(batch["labels"])))
    method_of("villa").step(target, batch, backward=lambda loss: (weight * loss).backward())
    return gradients(target.model)


def masked(wrap: Wrap) -> Named:
    """Entries that count, of which the last process has none, as with masked tokens."""
    batch = part(toy_batch(ROWS) | {"counts": torch.arange(ROWS) < 3})
    counts = batch["counts"].double()
    target = Adapter(
        wrap(model_of()),
        toy_sites(),
        call=lambda model, batch: model(**{name: value for name, value in batch.items() if name != "counts"}),
        positions=lambda batch: batch["counts"],
        loss=lambda outputs, batch: (outputs["loss"] * counts).sum() / counts.sum().clamp(min=1),
    )
    weight = share(counts.sum())
    method_of("villa").step(target, batch, backward=lambda loss: (weight * loss).backward())
    return gradients(target.model)


def mean_over_all(wrap: Wrap) -> Named:
    """A loss that is itself the mean over the rows of all processes."""
    target, batch = Adapter(wrap(model_of()), toy_sites()), part(toy_batch(ROWS), UNEQUAL[process_count()])
    method_of("freelb").step(target, batch, loss=lambda outputs, _: global_mean(outputs["loss"]))
    return gradients(target.model)


def accumulated(wrap: Wrap) -> Named:
    """Two batches, the first within the user's own accumulation."""
    target = Adapter(wrap(model_of()), toy_sites())
    with accumulation(target.model):
        method_of("villa").step(target, part(toy_batch(ROWS)))
    method_of("villa").step(target, part(toy_batch(ROWS, seed=1)))
    return gradients(target.model)


def accumulation(model: nn.Module) -> AbstractContextManager[None]:
    """What a user enters to accumulate: DDP's, FSDP2's, or nothing."""
    if hasattr(model, "set_requires_gradient_sync"):
        return _unreduced(model)
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()  # type: ignore[no-any-return, operator]


@contextmanager
def _unreduced(model: Any) -> Any:
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


CASES: dict[str, Callable[[Wrap], Named]] = {
    **{name: lambda wrap, name=name: updated(name, wrap) for name in METHODS},  # type: ignore[misc]
    **{f"{name}, float32": lambda wrap, name=name: updated(name, wrap, torch.float32) for name in METHODS},  # type: ignore[misc]
    "a reduction a pass": lambda wrap: updated("villa", wrap, sync=nullcontext),
    "scaled": scaled,
    "autocast": autocast,
    "checkpointed": checkpointed,
    "unequal rows": unequal,
    "masked entries": masked,
    "mean over all": mean_over_all,
    "accumulated": accumulated,
}


def gradients(model: nn.Module) -> Named:
    return plain({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def plain(named: Mapping[str, Tensor]) -> Named:
    """Without what wrappers put before names, and whole where they are sharded."""
    wrappers = ("module", "_orig_mod", "backbone")
    short = {".".join(part for part in name.split(".") if part not in wrappers): value for name, value in named.items()}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in short.items()
    }


def found_in_cases(wrap: Wrap) -> dict[str, Any]:
    """What a process finds in every case with its model in a wrapper."""
    return {case: attempt(partial(run, wrap)) for case, run in CASES.items()}


def check(case: str, found: Mapping[str, Tensor]) -> None:
    """Hold what processes found in a case to what one finds alone, by the precision of its model."""
    expected = CASES[case](lambda model: model)
    close_gradients(found, expected, torch.bfloat16 if case == "autocast" else None)
