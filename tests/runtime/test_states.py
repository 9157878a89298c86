"""A model comes back as it was: modes, buffers with what belongs to them, weights that a forward writes to."""

from __future__ import annotations

import pytest
import torch
from support.draws import randn
from torch import Tensor, nn
from torch.nn import functional as F

from advvl import L2, PGD, AdversarialTraining, Ascent, Attack, EmbeddingPerturber, FreeLB, SymmetricKL, adapt
from advvl.runtime.states import kept_buffers, kept_modes, kept_stats


class Merging(nn.Module):
    """A layer that, like loralib's, merges a part of its weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        self.merged = not mode
        return self


def test_a_module_that_works_in_train_does_that_work_when_modes_come_back() -> None:
    model = nn.Sequential(Merging(), nn.Dropout()).train()
    model[1].eval()
    with kept_modes(model):
        model.eval()
        assert model[0].merged
    assert not model[0].merged
    assert [module.training for module in model.modules()] == [True, True, False]


class Rotary(nn.Module):
    """Frequencies that a forward replaces, with the length that they were computed for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.length = 4

    def grow(self, length: int) -> None:
        self.register_buffer("frequencies", torch.full((3,), 0.5), persistent=False)
        self.length = length


def test_a_buffer_that_was_replaced_comes_back_with_the_numbers_beside_it() -> None:
    model = Rotary()
    before = model.frequencies
    with kept_buffers(model):
        model.grow(8)
    assert model.frequencies is before
    assert model.length == 4


def test_a_buffer_that_was_empty_or_not_there_is_so_again() -> None:
    model = nn.Sequential(nn.Module(), nn.Module())
    model[0].register_buffer("cache", None)
    with kept_buffers(model):
        model[0].cache = torch.ones(2)
        model[1].register_buffer("late", torch.ones(2), persistent=False)
    assert model[0].cache is None
    assert not hasattr(model[1], "late")
    assert not model.state_dict()
    model[1].register_buffer("late", torch.ones(2))
    assert "1.late" in model.state_dict()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_buffers_of_a_scripted_module_come_back() -> None:
    """Its dict of buffers is none of Python's, and takes no clearing."""
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.Linear(3, 2))
    before = model[0].running_mean.clone()
    with kept_buffers(model):
        model(randn(4, 3, dtype=torch.float32) + 1)
    assert torch.equal(model[0].running_mean, before)


def test_an_expanded_buffer_comes_back() -> None:
    model = nn.Module()
    model.register_buffer("scale", torch.ones(1, 1).expand(4, 6))
    with kept_buffers(model):
        model.scale.data[:1, :1].fill_(3.0)
    assert model.scale.shape == (4, 6)
    assert (model.scale == 1).all()


class Norms(nn.Module):
    """Every kind of norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.site(x)
        logits = self.head(sum(norm(z) for norm in self.norms).relu().mean(2))  # type: ignore[union-attr]
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def test_the_clean_pass_alone_reaches_the_statistics_of_every_norm() -> None:
    batch = {"x": randn(6, 4, 5, dtype=torch.float32), "labels": torch.arange(6) % 3}
    torch.manual_seed(0)
    model = Norms()
    method = AdversarialTraining(
        EmbeddingPerturber(x=Ascent(L2(), step_size=2.0)), FreeLB(3), SymmetricKL(), track_stats="clean"
    )
    method.step(adapt(model, {"x": "site"}), batch)
    torch.manual_seed(0)
    plain = Norms()
    plain(**batch)
    for norm, expected in zip(model.norms, plain.norms, strict=True):
        torch.testing.assert_close(norm.running_mean, expected.running_mean, rtol=0, atol=0)
        torch.testing.assert_close(norm.running_var, expected.running_var, rtol=0, atol=0)


def test_statistics_are_kept_by_name_whatever_the_norm_is_called() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(2))

    model = nn.Sequential(Own())
    with kept_stats(model):
        model[0].running_mean += 1
    assert (model[0].running_mean == 0).all()


class Tied(nn.Module):
    """An embedding whose forward writes to its weight, which the head uses again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 8, max_norm=1.0)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = F.linear(self.words(ids).tanh().mean(1), self.words.weight)
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def test_an_attack_leaves_a_weight_that_the_forward_writes_to() -> None:
    model, batch = Tied().eval(), {"ids": torch.arange(20).view(4, 5), "labels": torch.arange(4)}
    before = model.words.weight.detach().clone()
    Attack(EmbeddingPerturber(text=Ascent(L2(1.0), step_size=0.5)), PGD(2))(adapt(model, {"text": "words"}), batch)
    assert torch.equal(model.words.weight, before)
