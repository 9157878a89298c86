"""Regions made of pictures: cells of a grid that lie where they are in the picture, with the features of a tower there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from advvl.data.lxmert.answers import AnswerTable
from advvl.data.uniter.own import vqa_source
from advvl.data.uniter.patches import PatchRegions
from advvl.data.wordpiece import build_tokenizer
from advvl.errors import ConfigurationError, DataError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
CLIP, DINO = CLIPImageProcessorPil(), BitImageProcessorPil(do_center_crop=True, crop_size={"height": 16, "width": 16})


def tower(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=32))
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=32))
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2))
    if kind == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3))
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetModel(ResNetConfig(**sizes, layer_type="basic"))


TOWERS = ("clip", "siglip", "dinov2", "registers", "resnet")


def regions(kind: str = "clip", grid: tuple[int, int] = (4, 4), **options: Any) -> PatchRegions:
    options = ({"size": 32} if kind == "resnet" else {}) | options
    return PatchRegions(tower(kind), CLIP if kind == "clip" else DINO, grid, **options)


def picture(height: int = 48, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Colours(nn.Module):
    """A tower whose features are the colours of its patches of 4 pixels, after two tokens of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.config = type("Config", (), {"image_size": 32, "patch_size": 4})()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        patches = nn.functional.avg_pool2d(pixel_values * self.scale, 4).flatten(2).transpose(1, 2)
        others = torch.full((1, 2, 3), 99.0)
        return type("Output", (), {"last_hidden_state": torch.cat([others, patches], 1)})()


def test_a_cell_has_the_features_of_what_is_seen_in_its_box() -> None:
    grid = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    tall = np.repeat(np.repeat(grid, 50, axis=0), 10, axis=1)  # 150 x 40: what is cut to a square would lose rows
    plain = CLIPImageProcessorPil(do_normalize=False)
    found = PatchRegions(Colours(), plain, (3, 4), size=48)(tall)
    assert len(found) == 12
    torch.testing.assert_close(found.boxes[5, :4], torch.tensor([1 / 4, 1 / 3, 2 / 4, 2 / 3]))
    inner = found.features.mean(1) * 255
    torch.testing.assert_close(inner, torch.from_numpy(grid.flatten()).float(), rtol=0, atol=3.0)


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_transformers_see_where_a_picture_was_changed(kind: str) -> None:
    make = regions(kind)
    one = make(picture())
    assert one.features.shape == (16, 16)
    assert not one.features.requires_grad
    changed = picture()
    changed[36:, 48:] = 255 - changed[36:, 48:]  # the last of 4 x 4 cells
    difference = (make(changed).features - one.features).norm(dim=1)
    assert int(difference.argmax()) == 15


def test_pictures_of_any_kind_give_the_same() -> None:
    make, array = regions(), picture()
    expected = make(array).features
    read_only = array.copy()
    read_only.flags.writeable = False
    for other in (Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1), read_only, array[:, ::-1][:, ::-1]):
        assert torch.equal(make(other).features, expected)
    gray = make(array[..., 0]).features
    assert torch.equal(make(Image.fromarray(array[..., 0])).features, gray)
    assert torch.equal(make(torch.from_numpy(array[..., 0].copy())).features, gray)


def test_features_are_kept_on_the_disk_and_belong_to_a_picture_and_a_tower(tmp_path: Path) -> None:
    array = picture()
    first = regions(cache=tmp_path)
    made = first(array)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 1
    again = regions(cache=tmp_path)
    again.tower.forward = None  # type: ignore[assignment]  # it is not run
    assert torch.equal(again(array).features, made.features)
    assert torch.equal(regions()(array).features, made.features)
    other = regions(cache=tmp_path)
    with torch.no_grad():
        next(other.tower.parameters()).add_(1)
    assert not torch.equal(other(array).features, made.features)
    regions(grid=(2, 2), cache=tmp_path)(array)
    regions(cache=tmp_path)(picture(seed=1))
    PatchRegions(tower("clip"), DINO, (4, 4), cache=tmp_path)(array)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    files[0].write_bytes(b"torn")
    with pytest.raises(DataError, match=r"expected features in '.*\.safetensors', got .*; remove the file"):
        regions(cache=tmp_path)(array)


def test_the_tower_is_left_as_it_was() -> None:
    made = regions("dinov2")
    made.tower.train()
    one = made(picture()).features
    assert made.tower.training
    assert torch.equal(made(picture()).features, one)
    assert all(weight.grad is None for weight in made.tower.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ones((4, 4, 3)), r"expected a picture \(H, W, 3\) of uint8, got float64 of shape \(4, 4, 3\)"),
        (np.ones((4, 4, 4), np.uint8), r"got uint8 of shape \(4, 4, 4\); convert it to RGB"),
        (np.ones((0, 4, 3), np.uint8), r"got uint8 of shape \(0, 4, 3\)"),
        ("park.jpg", r"got <U8 of shape \(\)"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_record(wrong: Any, message: str) -> None:
    records = [{"text": "what ?", "answers": "dog", "image": image} for image in (picture(), wrong)]
    tokenizer, answers = build_tokenizer(["what ?"]), AnswerTable(("dog",))
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        vqa_source(records, tokenizer, answers=answers, regions=regions())
    source = vqa_source(records, tokenizer, answers=answers, regions=regions(), skip_bad=True)
    assert source.batch([0])["img_feat"].shape == (1, 16, 16)


def test_grids_and_towers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected grid to be two whole numbers"):
        regions(grid=(0, 2))
    with pytest.raises(ConfigurationError, match=r"expected patches for a grid of \(9, 9\), got \(8, 8\)"):
        regions(grid=(9, 9))(picture())
    with pytest.raises(
        ConfigurationError, match="expected size as the side of a square in pixels, got None; give size="
    ):
        PatchRegions(tower("resnet"), DINO)
    with pytest.raises(ConfigurationError, match="expected size to be a whole number of 1 or more"):
        regions(size=0)
