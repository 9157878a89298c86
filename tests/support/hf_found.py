"""What works of the families of transformers: `PYTHONPATH=tests python -m support.hf_found` rewrites docs/models.md."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    Place,
    SymmetricKL,
)
from advvl.perturbers.base import Memory, Moved
from support.hf_families import FAMILIES, IMAGE, Family, Fields

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@dataclass(frozen=True)
class Seen:
    """A site as an attack saw it: the tensor there, its mask and samples, and the loss's gradient at no perturbation."""

    place: Place
    gradient: Tensor

    @property
    def mask(self) -> Tensor:
        """Of the shape of the tensor."""
        shape, mask = self.place.x.shape, self.place.mask
        mask = torch.ones(shape[:1], dtype=torch.bool) if mask is None else mask
        return mask.view(*mask.shape, *[1] * (len(shape) - mask.ndim)).expand(shape)

    @property
    def rows(self) -> Tensor:
        """The sample of each entry of the first axis."""
        told = (self.place.segments, self.place.examples)
        return next((of for of in told if of is not None), torch.arange(len(self.place.x)))


class Recorder(EmbeddingPerturber):
    """Keeps what it is asked to move, and moves nothing."""

    def __init__(self, target: Adapter) -> None:
        super().__init__(**{name: Ascent(L2(), step_size=0, allow_zero_step=True) for name in target.sites})
        self.seen: dict[str, Seen] = {}

    def move(
        self,
        deltas: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        places: Mapping[str, Place],
        memory: Memory,
    ) -> Moved:
        self.seen |= {name: Seen(places[name], gradient) for name, gradient in gradients.items()}
        return super().move(deltas, gradients, places, memory)


def seen(target: Adapter, batch: Fields) -> dict[str, Seen]:
    """Every site of a model on a batch, in the adapter's order."""
    recorder = Recorder(target)
    Attack(recorder, PGD(1))(target, batch)
    return {modality: recorder.seen[modality] for modality in target.sites}


def said_of_mask(target: Adapter, modality: str, batch: Fields) -> str:
    """Which fields of the batch the mask of a site depends on."""
    mask = target.sites[modality].mask
    if mask is None:
        return "all"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of padding that no mask says
        fields = [name for name in batch if "mask" in name and not torch.equal(mask(batch), mask(batch | {name: None}))]
    every = "input_ids" in batch and modality == "text" and (batch["input_ids"] == IMAGE).any()
    said = [*(f"`{name}`" for name in fields), *(["no image tokens"] if every else [])]
    return ", ".join(said) or "`image_sizes`"


def check_forward(family: Family) -> None:
    """Under no perturbation nothing changes; under one at each site alone the loss does."""
    target, batch = family.adapter(), family.fields()
    with torch.no_grad():
        clean = target.loss(target.forward(batch), batch).double().sum()
        for modality, site in seen(target, batch).items():
            for delta, moves in ((torch.zeros_like(site.gradient), False), (torch.randn_like(site.gradient), True)):
                with target.inject({modality: delta * site.mask}):
                    loss = target.loss(target.forward(batch), batch).double().sum()
                assert ((loss - clean).abs() > 1e-4 * clean.abs()) == moves, (modality, loss, clean)


def check_attack(family: Family) -> None:
    """Every modality alone raises the loss; the model is as before."""
    target, batch = family.adapter(), family.fields()
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    clean = target.loss(target.forward(batch), batch).detach().double().sum()
    for modality in target.sites:
        perturber = EmbeddingPerturber(**{modality: Ascent(L2(0.02), step_size=0.01)})
        result = Attack(perturber, PGD(3))(target, batch)
        with torch.no_grad(), target.inject(result.deltas):
            loss = target.loss(target.forward(batch), batch).double().sum()
        assert loss > clean, (modality, loss, clean)
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items())
    assert all(parameter.grad is None for parameter in target.model.parameters())


def check_train(family: Family) -> None:
    """A step on all sites leaves a gradient in every parameter that a plain backward reaches, and is not that backward."""
    target, batch = family.adapter(), family.fields()
    target.loss(target.forward(batch), batch).mean().backward()
    plain = {name: p.grad for name, p in target.model.named_parameters() if p.grad is not None}
    target.model.zero_grad()
    ascents = dict.fromkeys(target.sites, Ascent(L2(), step_size=0.1))
    regularizer = SymmetricKL(1.0) if family.logits else None
    report = AdversarialTraining(EmbeddingPerturber(**ascents), FreeLB(2), regularizer).step(target, batch)
    assert report.loss.isfinite()
    assert regularizer is None or report.regularization > 0
    found = {name: p.grad for name, p in target.model.named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert any(not torch.allclose(gradient, plain[name]) for name, gradient in found.items())


CHECKS = {"forward": check_forward, "attack": check_attack, "training step": check_train}


@functools.cache
def failure(check: str, index: int) -> Exception | None:
    """What a check of a family raised, if anything."""
    try:
        CHECKS[check](FAMILIES[index])
    except Exception as error:
        return error
    return None


# --- the table ---


def table() -> str:
    """What was found, as a table."""
    columns = ["family", "class", "modality", "site", "shape", "perturbed where", *CHECKS, "notes"]
    lines = [columns, ["---"] * len(columns)]
    for index, family in enumerate(FAMILIES):
        target, batch = family.adapter(), family.fields()
        works = ["✓" if failure(check, index) is None else "✗" for check in CHECKS]
        coupled = [f"rows coupled: {family.coupled}"] if family.coupled else []
        for first, (modality, site) in enumerate(seen(target, batch).items()):
            where, shape = target.sites[modality], tuple(site.place.x.shape)
            packed = ["packed"] if site.place.segments is not None else []
            packed += ["a row for each choice"] if site.place.examples is not None else []
            said = [family.notes.get(modality, ""), family.leaks.get(modality, "")]
            notes = [*filter(None, said), *coupled, *packed]
            name = [family.name, f"`{type(target.model).__name__}`"] if not first else ["", ""]
            lines.append(
                [
                    *name,
                    modality,
                    f"`{where.module}:{where.at}`",
                    str(shape),
                    said_of_mask(target, modality, batch),
                    *works,
                    "; ".join(notes),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(page: str) -> str:
    """The page with this table in the place of its own."""
    before, begin, rest = page.partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    return f"{before}{begin}{table()}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
