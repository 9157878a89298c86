"""torch's own layers as sites: samples on the second axis are refused, and nested tensors do not come up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, PGD, Adapter, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeLB, Site, sites
from advvl.errors import ShapeError
from advvl.runtime.fast_path import has_fast_path, no_fast_path

PERTURBER = EmbeddingPerturber(text=Ascent(L2(0.5), step_size=0.3))
CALLS = [
    lambda target, batch: Attack(PERTURBER, PGD(2))(target, batch),
    lambda target, batch: AdversarialTraining(PERTURBER, FreeLB(2)).step(target, batch),
]


class TimeFirst(nn.Module):
    """A transformer as torch makes it by default, which takes (T, B, D)."""

    def __init__(self, reduction: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reduction = reduction
        self.words, self.head = nn.Embedding(30, 16), nn.Linear(16, 3)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.words(ids.T)).mean(0))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction=self.reduction)}


def batch(rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(30, (rows, length), generator=generator),
        "labels": torch.randint(3, (rows,), generator=generator),
    }


@pytest.mark.parametrize("call", CALLS, ids=["attack", "step"])
@pytest.mark.parametrize(("reduction", "of"), [("none", "8 losses"), ("mean", "8 rows of logits")])
def test_samples_on_the_second_axis_are_refused(call: Any, reduction: str, of: str) -> None:
    with pytest.raises(
        ShapeError, match=rf"samples on the first axis of 'text', got .* second of \(5, 8, 16\), by {of}"
    ):
        call(Adapter(TimeFirst(reduction).double(), {"text": "words"}), batch(8, 5))


@pytest.mark.parametrize("call", CALLS, ids=["attack", "step"])
@pytest.mark.parametrize("module", ["encoder.layers.0", "encoder.layers.1.linear1", "encoder"])
def test_samples_on_the_second_axis_are_refused_in_a_square_batch_too(call: Any, module: str) -> None:
    with pytest.raises(ShapeError, match=r"got them on the second of \(5, 5, \d+\), by Transformer"):
        call(Adapter(TimeFirst().double(), {"text": module}), batch(5, 5))


@pytest.mark.parametrize("call", CALLS, ids=["attack", "step"])
def test_a_recurrent_layer_is_refused_unless_samples_come_first(call: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.layer = nn.Embedding(30, 16), nn.GRU(16, 16, batch_first=batch_first)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            first = self.layer.batch_first
            hidden = self.layer(self.words(ids if first else ids.T))[0].mean(1 if first else 0)
            return {"logits": hidden, "loss": F.cross_entropy(hidden, labels, reduction="none")}

    call(Adapter(Recurrent(True).double(), {"text": "layer"}), batch(4, 4))
    with pytest.raises(ShapeError, match=r"second of \(4, 4, 16\), by GRU"):
        call(Adapter(Recurrent(False).double(), {"text": "layer"}), batch(4, 4))


class Nested(nn.Module):
    """An encoder that nests padded batches in eval mode, where no gradient is wanted."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(30, 16), nn.Linear(16, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, ids: Tensor, real: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.words(ids), src_key_padding_mask=~real)[:, 0])
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


IDS = torch.tensor([[1, 5, 6, 7], [1, 8, 0, 0]])
PADDED = {"ids": IDS, "real": IDS > 0, "labels": torch.tensor([0, 3])}


@pytest.mark.parametrize(
    "site",
    ["encoder.layers.0", "encoder.layers.1:input", "encoder.layers.0.linear1:input", "encoder.layers.1.norm1"],
)
def test_an_encoder_that_nests_its_batch_is_attacked_like_one_that_does_not(site: str) -> None:
    at = Site.parse(site)
    at = Site(at.module, at.at, mask=lambda batch: batch["real"])
    attack = Attack(PERTURBER, PGD(3, keep="best"))
    found, expected = (
        attack(Adapter(Nested(nested).double().eval(), {"text": at}), PADDED) for nested in (True, False)
    )
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.deltas["text"], expected.deltas["text"])


def test_an_encoder_that_nests_its_batch_is_looked_at() -> None:
    assert str(sites(Nested(True), PADDED)) == str(sites(Nested(False), PADDED))


def test_a_forward_under_given_perturbations_does_not_nest() -> None:
    model = Nested(True).eval()
    target = Adapter(model, {"text": "encoder.layers.0"})
    with torch.no_grad(), target.inject({"text": torch.zeros(2, 4, 16)}):
        found = model(**PADDED)["loss"]
    torch.testing.assert_close(found, model(**PADDED)["loss"].detach())


def test_the_fast_path_is_off_for_models_that_have_it_and_as_found_afterwards() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled
    assert [has_fast_path(model) for model in (nn.Linear(2, 2), Nested(True))] == [False, True]
    with no_fast_path():
        with no_fast_path():
            assert not enabled()
        assert not enabled()
    assert enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(RuntimeError), no_fast_path():
            raise RuntimeError
        assert not enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
