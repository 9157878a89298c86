"""Parts of an update: cut in any way, it is the update of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.compare import close_gradients
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import (
    KL,
    L2,
    PGD,
    Adam,
    Adapter,
    AdversarialTraining,
    Ascent,
    AscentState,
    Distance,
    EmbeddingPerturber,
    FreeLB,
    Frozen,
    Objective,
    Site,
    SquaredDistance,
    SymmetricKL,
    adapt,
)
from advvl.errors import ConfigurationError
from advvl.fit.loop import fit
from advvl.fit.options import LoopOptions, OptimizerOptions
from advvl.fit.shares import cut
from advvl.fit.updates import Adversary

LENGTHS = torch.tensor([6, 5, 1, 1, 4, 2, 1, 6])
MASK = torch.arange(6) < LENGTHS[:, None]
TAGGED = MASK & (torch.arange(6) % 2 == 0)  # of the words, those whose tag is known
ROWS = len(LENGTHS)


class Source:
    """Sentences of one to six words, of which some are tagged; fewer than asked of a part whose number is named."""

    def __init__(self, short: dict[int, int] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids, self.tags = (torch.randint(20, (ROWS, 6), generator=generator) for _ in range(2))
        self.short, self.calls = short or {}, 0

    def __len__(self) -> int:
        return ROWS

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> dict[str, Any]:
        rows = list(indices)[: self.short.get(self.calls)]
        self.calls += 1
        return {"ids": self.ids[rows], "tags": self.tags[rows], "mask": MASK[rows], "tagged": TAGGED[rows]}


class Tagger(nn.Module):
    """A loss and logits, each of rows or of words."""

    def __init__(self, *, loss: str, logits: str, sure: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.tag, self.topic = nn.Embedding(20, 8), nn.Linear(8, 20), nn.Linear(8, 4)
        self.loss, self.logits, self.sure = loss, logits, sure
        self.double()

    def forward(self, ids: Tensor, tags: Tensor, mask: Tensor, tagged: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.words(ids))
        weights = mask[..., None].to(hidden)
        topics = self.topic((hidden * weights).sum(1) / weights.sum(1)) * self.sure
        losses = F.cross_entropy(topics, tags[:, 0] % 4 if self.sure == 1 else topics.argmax(1), reduction="none")
        if self.loss == "words":
            losses = F.cross_entropy(self.tag(hidden)[tagged], tags[tagged])
        logits = {"rows": topics, "words": self.tag(hidden), "tagged": self.tag(hidden)[tagged]}
        return {"loss": losses, "logits": logits[self.logits]}


def update(
    model: Tagger, method: AdversarialTraining, accumulate: int, source: Source | None = None
) -> dict[str, Tensor]:
    """What one update by a gradient step of size 1 takes off the parameters."""

    def target(prepared: nn.Module) -> Adapter:
        counts = (lambda batch: batch["mask"]) if model.logits == "words" else None
        return adapt(prepared, {"text": Site("words", mask=lambda batch: batch["mask"])}, positions=counts)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(
        model,
        Source() if source is None else source,
        options=OptimizerOptions(epochs=1, batch_size=ROWS, learning_rate=1.0, clip=1e9),
        seed=1,
        updates=1,
        method=method,
        target=target,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        accelerator=Accelerator(cpu=True),
        count=(lambda batch: batch["tagged"].sum()) if model.loss == "words" else None,
        loop=LoopOptions(accumulate=accumulate),
    )
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def perturber(**options: Any) -> EmbeddingPerturber:
    return EmbeddingPerturber(text=Ascent(L2(2.0), step_size=1.0, **options))


METHODS = {
    "freelb": AdversarialTraining(perturber(), FreeLB(3)),
    "villa": AdversarialTraining(perturber(), FreeLB(3), SymmetricKL(5.0), clean_weight=0.5),
    "clean task and penalty": AdversarialTraining(
        perturber(), PGD(2), KL(5.0), clean_weight=1.0, teach=Objective(task=0), climb=Objective(penalty=0.5)
    ),
}


@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize("logits", ["rows", "words"])
@pytest.mark.parametrize("loss", ["rows", "words"])
@pytest.mark.parametrize("name", METHODS)
def test_each_mean_is_weighed_by_what_it_is_over(name: str, loss: str, logits: str, accumulate: int) -> None:
    """The loss and the penalty may be means over rows, words, or tagged words: parts hold another number of each."""
    whole, parts = (update(Tagger(loss=loss, logits=logits), METHODS[name], cut) for cut in (1, accumulate))
    close_gradients(parts, whole)


@pytest.mark.parametrize("options", [{"floor": 1e-3}, {"rule": Adam(eps=1e-3)}], ids=["a floor", "Adam's eps"])
def test_a_number_that_gradients_are_compared_with_is_that_of_the_whole_batch(options: dict[str, Any]) -> None:
    """Of sure answers, whose gradients are as small as the number."""
    method = AdversarialTraining(perturber(**options), FreeLB(3))
    whole, parts, free = (
        update(Tagger(loss="rows", logits="rows", sure=20.0), method, cut)
        for method, cut in ((method, 1), (method, 8), (METHODS["freelb"], 1))
    )
    close_gradients(parts, whole)
    with pytest.raises(AssertionError):
        close_gradients(free, whole)  # the number matters here


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rows", [0, 1])
def test_a_source_that_leaves_examples_out_is_refused(rows: int, accumulate: int) -> None:
    model = Tagger(loss="rows", logits="rows")
    with pytest.raises(ConfigurationError, match=rf"one for each of {ROWS // accumulate} rows, got \({rows},\)"):
        update(model, METHODS["villa"], accumulate, Source(short={accumulate - 1: rows}))


def test_logits_of_other_rows_than_examples_have_to_be_known_where_a_batch_is_cut() -> None:
    update(Tagger(loss="words", logits="tagged"), METHODS["villa"], 1)
    model = Tagger(loss="words", logits="tagged")
    before = model.words.weight.detach().clone()
    with pytest.raises(ConfigurationError, match=r"as many rows of logits for each example, got \[1.5, 2.25\]"):
        update(model, METHODS["villa"], 2)
    assert torch.equal(model.words.weight, before)


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("logits", ["rows", "words"])
def test_each_regulariser_is_weighed_by_what_its_own_mean_is_over(logits: str, accumulate: int) -> None:
    """Over positions or rows, over the rows that it names, and over all words of a module."""
    teacher = Frozen(Tagger(loss="rows", logits=logits, sure=2.0))
    regularizers = (
        SymmetricKL(reference=teacher),
        SquaredDistance(3.0, reads="tag", rows=lambda batch: batch["tagged"]),
        Distance(2.0, reads="tag", reference=teacher, rows=lambda batch: batch["mask"] & ~batch["tagged"]),
        SymmetricKL(reads="topic"),
    )
    for method in (
        AdversarialTraining(perturber(), FreeLB(2), regularizers),
        AdversarialTraining(perturber(), PGD(2), regularizers, climb=Objective(task=0)),
    ):
        whole, parts = (update(Tagger(loss="rows", logits=logits), method, cut) for cut in (1, accumulate))
        close_gradients(parts, whole)


def test_each_task_weighs_the_regularisers_of_its_own_method() -> None:
    """Of two tasks in one update each penalty's mean is over the rows of its own parts."""
    methods = {
        "all": AdversarialTraining(perturber(), FreeLB(2), SymmetricKL(reads="topic")),
        "tagged": AdversarialTraining(
            perturber(), FreeLB(2), SquaredDistance(3.0, reads="tag", rows=lambda batch: batch["tagged"])
        ),
    }
    model = Tagger(loss="rows", logits="rows")
    target = adapt(model, {"text": Site("words", mask=lambda batch: batch["mask"])})
    adversary = Adversary(methods, None, target, AscentState())
    batch = Source().batch(range(ROWS), torch.Generator().manual_seed(0))
    parts = [{**batch, "task": task} for task in ("all", "tagged", "tagged")]
    parts[2]["tagged"] = batch["mask"]
    shares = cut(
        [[0], [1], [2]], parts, mine=range(3), count=None, compared=adversary.compared, total=lambda *sums: list(sums)
    )
    one, two = float(batch["tagged"].sum()), float(batch["mask"].sum())
    assert [list(adversary.compared_in(share)) for share in shares] == [
        [None],
        [pytest.approx(2 / 3 * one / (one + two))],
        [pytest.approx(2 / 3 * two / (one + two))],
    ]
