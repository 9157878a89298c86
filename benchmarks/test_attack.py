"""Attacks of ten steps: ours, others', and ten bare passes, forward and backward towards the perturbed tensors alone.

On LXMERT the word embeddings and the region features are perturbed; on a small convolutional network, pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
from measures import Extent, device_of, extent_of, flops
from peers import peer
from races import Entry, Pace, Race, recorded
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LxmertConfig, LxmertForQuestionAnswering

from advvl import L2, PGD, Adapter, Ascent, Attack, AttackResult, EmbeddingPerturber, Linf, Site, adapt

pytestmark = [
    pytest.mark.benchmark(timer=recorded),
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning"),  # captum's
]

STEPS, WORDS, REGIONS = 10, 20, 36
AT_LEAST, SHARE = 1e-5, 0.95  # a loss is as high if it falls short by no more than this part; so many have to be
Norm = Literal["Linf", "L2"]


@dataclass(frozen=True)
class Case:
    """One attack: on what, in which norm, of which radius; theirs are the same."""

    on: Literal["LXMERT", "small LXMERT", "pixels"]
    norm: Norm
    radius: float
    rows: int

    def __str__(self) -> str:
        return f"{self.on}, {self.norm}, {STEPS} steps, {self.rows} rows"

    @property
    def step_size(self) -> float:
        return self.radius / 4


def cases(device: torch.device, extent: Extent) -> list[Case]:
    rows = 4 if extent == "smoke" else 256 if device.type == "cuda" else 64 if extent == "full" else 16
    found = [
        Case("small LXMERT", "Linf", 0.005, rows),
        Case("small LXMERT", "L2", 0.2, rows),
        Case("pixels", "Linf", 8 / 255, 4 * rows),
        Case("pixels", "L2", 0.5, 4 * rows),
    ]
    if extent == "full" or device.type == "cuda":
        found += [Case("LXMERT", "Linf", 0.005, rows // 16), Case("LXMERT", "L2", 0.2, rows // 16)]
    return found


@dataclass
class Scene:
    """What is attacked.

    Arguments:
        target: the adapted model, in eval mode.
        batch: what it takes.
        clean: modality to the tensor at its site.
        losses: from perturbed tensors to the loss of each row, around the adapter.
    """

    target: Adapter
    batch: dict[str, Tensor]
    clean: dict[str, Tensor]
    losses: Callable[[dict[str, Tensor]], Tensor]
    shape: str
    box: tuple[float, float] | None = None
    reached: dict[str, Tensor] = field(default_factory=dict)


SMALL = {
    **{"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 1000},
    **{"l_layers": 2, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 512, "num_qa_labels": 100},
}


def lxmert(rows: int, device: torch.device, **sizes: int) -> Scene:
    """Of the published size but for what is given."""
    config = LxmertConfig(**sizes)
    model = LxmertForQuestionAnswering(config).to(device).eval()
    words, regions = (
        torch.randint(WORDS // 2, WORDS + 1, (rows, 1)),
        torch.randint(REGIONS // 2, REGIONS + 1, (rows, 1)),
    )
    batch = {
        "input_ids": torch.randint(1, config.vocab_size, (rows, WORDS)),
        "attention_mask": (torch.arange(WORDS) < words).long(),
        "visual_feats": torch.randn(rows, REGIONS, config.visual_feat_dim),
        "visual_pos": torch.rand(rows, REGIONS, 4),
        "visual_attention_mask": (torch.arange(REGIONS) < regions).long(),
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    with torch.no_grad():
        answers = model(**batch).question_answering_score.argmax(1)
        embedded = model.lxmert.embeddings.word_embeddings(batch["input_ids"])
    target = adapt(
        model,
        sites={
            "text": Site("lxmert.embeddings.word_embeddings", mask=lambda b: b["attention_mask"]),
            "image": Site("lxmert.encoder.visn_fc", at="input", mask=lambda b: b["visual_attention_mask"]),
        },
        logits=lambda outputs: outputs.question_answering_score,
        loss=lambda outputs, b: F.cross_entropy(outputs.question_answering_score, answers, reduction="none"),
    )
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "visual_feats")}

    def losses(perturbed: dict[str, Tensor]) -> Tensor:
        outputs = model(inputs_embeds=perturbed["text"], visual_feats=perturbed["image"], **rest)
        return F.cross_entropy(outputs.question_answering_score, answers, reduction="none")

    layers = f"{config.l_layers}+{config.r_layers}+{config.x_layers} layers"
    shape = f"{rows} rows, up to {WORDS} words, {REGIONS} regions, width {config.hidden_size}, {layers}"
    return Scene(target, batch, {"text": embedded, "image": batch["visual_feats"]}, losses, shape)


def pixels(rows: int, device: torch.device) -> Scene:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 8 * 8, 10)),
    )
    model = model.to(device).eval()
    images = torch.rand(rows, 3, 32, 32, device=device)
    with torch.no_grad():
        labels = model(images).argmax(1)
    target = adapt(
        model,
        sites={"image": Site("0", at="input")},
        call=lambda m, b: m(b["images"]),
        loss=lambda outputs, b: F.cross_entropy(outputs, b["labels"], reduction="none"),
    )

    def losses(perturbed: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(perturbed["image"]), labels, reduction="none")

    batch = {"images": images, "labels": labels}
    return Scene(target, batch, {"image": images}, losses, f"{rows} images of 3x32x32", (0.0, 1.0))


class Bench:
    """A scene and the lanes that attack it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        scenes = {"LXMERT": lxmert, "small LXMERT": partial(lxmert, **SMALL), "pixels": pixels}
        self.scene = scenes[case.on](case.rows, device)  # type: ignore[operator]
        self.facts = {"shape": self.scene.shape, "dtype": "float32", "radius": case.radius, "rows": case.rows}

    def ours(self) -> Entry:
        """Against what the peer reached, which has run before."""
        ball, rule = (Linf, "sign") if self.case.norm == "Linf" else (L2, "normalised")
        ascent = Ascent(ball(self.case.radius), step_size=self.case.step_size, rule=rule, box=self.scene.box)  # type: ignore[arg-type]
        parts = EmbeddingPerturber(**dict.fromkeys(self.scene.clean, ascent)), PGD(STEPS)
        attack = Attack(*parts, end_pass=False)  # the peers do not judge what they have found either
        results = list[AttackResult]()

        def call() -> None:
            results[:] = [attack(self.scene.target, self.scene.batch)]

        counted = flops(call)
        found = self._reach("ours", {m: x + results[0].deltas[m] for m, x in self.scene.clean.items()})

        def inside() -> None:
            for delta in results[0].deltas.values():
                flat = delta.double().flatten(1)
                norms = flat.abs().amax(1) if self.case.norm == "Linf" else flat.norm(dim=1)
                assert (norms <= self.case.radius).all()

        theirs = [name for name in self.scene.reached if name != "ours"]
        for name in theirs:
            least = self.scene.reached[name] * (1 - AT_LEAST)
            found["share_at_least"] = float((self.scene.reached["ours"] >= least).float().mean())
            assert found["share_at_least"] >= SHARE, f"ours is below {name} on too many rows"
        return Entry(call, inside, "ours", self.facts | found | {"flops": counted})

    def captum(self) -> Entry:
        """One radius and one step size for both modalities, as it takes them; an L2 step is of sign."""
        method = peer("captum.robust").PGD(lambda text, image: {"text": text, "image": image}, self._captum_loss)
        names = ("text", "image")
        clean = tuple(self.scene.clean[name] for name in names)
        batch = self.scene.batch
        masks = tuple(
            batch[name][..., None].expand_as(x).float()
            for name, x in zip(("attention_mask", "visual_attention_mask"), clean, strict=True)
        )
        sizes = clean[0][0].numel()
        step_size = self.case.step_size / (1 if self.case.norm == "Linf" else sizes**0.5)
        found = list[tuple[Tensor, ...]]()

        def call() -> None:
            perturbed = method.perturb(
                clean, self.case.radius, step_size, STEPS, target=None, norm=self.case.norm, mask=masks
            )
            found[:] = [perturbed]

        counted = flops(call)
        facts = self._reach("captum PGD", dict(zip(names, found[0], strict=True)))
        return Entry(call, lambda: self._finite(found[0]), "peer", self.facts | facts | {"flops": counted})

    def torchattacks(self) -> Entry:
        attacks, case = peer("torchattacks"), self.case
        make = attacks.PGD if case.norm == "Linf" else attacks.PGDL2
        method = make(self.scene.target.model, case.radius, case.step_size, STEPS, random_start=False)
        batch, found = self.scene.batch, list[Tensor]()

        def call() -> None:
            found[:] = [method(batch["images"], batch["labels"])]

        counted = flops(call)
        facts = self._reach(f"torchattacks {make.__name__}", {"image": found[0]})
        return Entry(call, lambda: self._finite(found), "peer", self.facts | facts | {"flops": counted})

    def bare(self) -> Entry:
        """Ten passes at the clean tensors."""
        found = list[tuple[Tensor, ...]]()
        scene = self.scene

        def call() -> None:
            for _ in range(STEPS):
                leaves = {m: x.detach().requires_grad_() for m, x in scene.clean.items()}
                found[:] = [torch.autograd.grad(scene.losses(leaves).sum(), list(leaves.values()))]

        counted = flops(call)
        return Entry(call, lambda: self._finite(found[0]), "limit", self.facts | {"flops": counted})

    def _captum_loss(self, perturbed: dict[str, Tensor], target: Any) -> Tensor:
        del target
        return self.scene.losses(perturbed)

    def _reach(self, name: str, perturbed: dict[str, Tensor]) -> dict[str, Any]:
        """Note the losses that a method has come to."""
        with torch.no_grad():
            losses = self.scene.losses(perturbed)
            before = self.scene.losses(self.scene.clean)
        assert (losses > before).float().mean() >= SHARE, f"{name} has raised too few losses"
        self.scene.reached[name] = losses
        return {"loss": float(losses.mean()), "loss_before": float(before.mean())}

    def _finite(self, tensors: Any) -> None:
        assert all(tensor.isfinite().all() for tensor in tensors)


def lanes(case: Case) -> dict[str, Callable[[Bench], Entry]]:
    """Whom a case compares; ours after the peer, whose losses it has to reach."""
    if case.on != "pixels":
        theirs = {"captum PGD": Bench.captum}
    else:
        theirs = {"torchattacks PGD" if case.norm == "Linf" else "torchattacks PGDL2": Bench.torchattacks}
    return theirs | {"ours": Bench.ours, f"{STEPS} bare passes": Bench.bare}


def pace(case: Case) -> Pace:
    """Long enough on a small model in L2 that the interval of the ratio to captum tells 1.03 from 1.05."""
    if case.on == "LXMERT":
        return Pace(budget=15.0, least=3, most=40)
    if case.on == "small LXMERT" and case.norm == "L2":
        return Pace(budget=30.0, least=20, most=60)
    return Pace(budget=10.0, least=7, most=40)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = cases(device_of(metafunc.config), extent_of(metafunc.config))
    pairs = [(case, name) for case in found for name in lanes(case)]
    metafunc.parametrize(("case", "name"), pairs, ids=[f"{case}-{name}" for case, name in pairs])


# The interval of a small model's ratio to captum has to tell 1.03 from 1.05.
paces = {"small LXMERT": Pace(30.0, 20, 60), "pixels": Pace(8.0, 6, 40), "LXMERT": Pace(15.0, 3, 40)}


def test_attack(race: Race, device: torch.device, case: Case, name: str) -> None:
    def build() -> dict[str, Callable[[], Entry]]:
        bench = Bench(case, device)
        return {lane: partial(make, bench) for lane, make in lanes(case).items()}

    race("attack", str(case), name, build, pace(case))
