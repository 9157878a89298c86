"""A loader's attacks are those of its batches one after another, and come back from a file as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.compare import same
from support.toy import perturber, toy, toy_batch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from advvl import L2, PGD, Attack, AttackResult, Uniform
from advvl.errors import DataError
from advvl.evaluation.loaders import AttackedLoader, attack_loader

BATCHES = [toy_batch(3), toy_batch(2, length=3, seed=1)]


def attack(**options: Any) -> Attack:
    options = {"correct": lambda outputs, batch: outputs["logits"].argmax(1) == batch["labels"]} | options
    return Attack(perturber(ball=L2(0.4), start=Uniform(0.4)), PGD(2), **options)


def alike(ours: AttackResult, theirs: AttackResult) -> None:
    for name in ("losses", "correct"):
        same(getattr(ours, name), getattr(theirs, name))
    for name in ("deltas", "nonfinite", "unmoved", "moved", "effective", "owners"):
        assert getattr(ours, name).keys() == getattr(theirs, name).keys()
        for modality, tensor in getattr(ours, name).items():
            same(tensor, getattr(theirs, name)[modality])


def test_a_loader_is_attacked_batch_by_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = attack_loader(attack(), toy(), BATCHES)
    assert "2/2" in capsys.readouterr().err
    one, target = attack(), toy()
    for ours, batch in zip(found.results, BATCHES, strict=True):
        alike(ours, one(target, batch))
    assert found.losses is not None
    assert found.correct is not None
    assert found.losses.shape == found.correct.shape == (5,)
    assert found.accuracy == found.correct.sum().item() / 5
    assert found.unmoved() == {"text": 0, "image": 0}


def test_a_file_gives_back_every_field(tmp_path: Path) -> None:
    found = attack_loader(attack(), toy(), BATCHES, progress=False)
    read = AttackedLoader.load(found.save(tmp_path / "attacks.safetensors"))
    for ours, theirs in zip(read.results, found.results, strict=True):
        alike(ours, theirs)


def test_without_deltas_or_a_judge_the_rest_is_kept(tmp_path: Path) -> None:
    found = attack_loader(attack(correct=None), toy(), BATCHES, keep_deltas=False, progress=False)
    read = AttackedLoader.load(found.save(tmp_path / "a"))
    assert read.results[0].deltas == {}
    assert read.correct is None
    assert read.losses is not None
    with pytest.raises(DataError, match="give the Attack correct"):
        _ = read.accuracy


def test_batches_are_placed_first() -> None:
    seen = []
    attack_loader(attack(), toy(), [0, 1], place=lambda index: seen.append(index) or BATCHES[index], progress=False)
    assert seen == [0, 1]


def test_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="one batch or more"):
        attack_loader(attack(), toy(), [], progress=False)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"0/losses": torch.zeros(2)}, None),
        ({"0/losses": torch.zeros(2)}, {"advvl": "{"}),
        ({"0/losses": torch.zeros(2)}, {"advvl": json.dumps(["advvl attacks 1", -1])}),
        ({"1/losses": torch.zeros(2)}, {"advvl": json.dumps(["advvl attacks 1", 1])}),
        ({"0/weights": torch.zeros(2)}, {"advvl": json.dumps(["advvl attacks 1", 1])}),
        ({"٣/losses": torch.zeros(2)}, {"advvl": json.dumps(["advvl attacks 1", 9])}),
    ],
)
def test_another_file_is_refused(tmp_path: Path, tensors: Any, metadata: Any) -> None:
    save_file(tensors, tmp_path / "a", metadata=metadata)
    with pytest.raises(DataError):
        AttackedLoader.load(tmp_path / "a")


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        AttackedLoader.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(DataError):
        AttackedLoader.load(tmp_path / "cut")


class Rows(Dataset[dict[str, Any]]):
    """Single rows, as a DataLoader takes them."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[row] for name, value in toy_batch().items()}


@pytest.mark.parametrize("loader", [Rows(), [{"ids": [1, 2], "labels": 0}]], ids=["data set", "lists"])
def test_rows_that_are_no_batches_are_refused(loader: Any) -> None:
    with pytest.raises(
        DataError, match=r"expected a loader of batches of tensors, got .*; pass a DataLoader of the rows"
    ):
        attack_loader(attack(), toy(), loader, progress=False)
    found = attack_loader(attack(), toy(), DataLoader(Rows(), batch_size=2), progress=False)
    assert found.losses is not None
    assert found.losses.shape == (2,)


def test_only_tensors_that_share_memory_are_copied_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own = torch.arange(6.0), torch.ones(2, 3)
    result = AttackResult({"text": shared.view(2, 3), "image": shared.view(2, 3), "audio": own}, shared[:2], None)
    copied: list[tuple[int, ...]] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda tensor: copied.append(tuple(tensor.shape)) or clone(tensor))
    path = AttackedLoader((result,)).save(tmp_path / "a")
    assert sorted(copied) == [(2, 3), (2, 3)]
    alike(AttackedLoader.load(path).results[0], result)
