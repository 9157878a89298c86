"""The VQGAN has the published sizes and names, reads what fits and refuses what does not, and is a discretiser for DAT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from advvl import Adapter, DiscretePerturber, Site, dat
from advvl.errors import CheckpointError, ConfigurationError, ShapeError
from advvl.models.vqgan.checkpoint import kmeans_codebook, load_vqgan
from advvl.models.vqgan.model import VQGAN, Codebook, VQGANConfig, VQLoss

TINY = VQGANConfig(codes=16, channels=8, multiples=(1, 2), blocks=1, attention=(4,), resolution=8, in_channels=1)

NAMES = [
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.norm1.weight",
    "encoder.down.0.block.1.conv2.bias",
    "encoder.down.0.downsample.conv.weight",
    "encoder.down.1.block.0.nin_shortcut.weight",
    "encoder.down.3.attn.1.proj_out.bias",
    "encoder.mid.block_1.norm2.weight",
    "encoder.mid.attn_1.q.weight",
    "encoder.norm_out.weight",
    "encoder.conv_out.bias",
    "decoder.conv_in.weight",
    "decoder.mid.block_2.conv1.weight",
    "decoder.up.3.block.2.conv1.weight",
    "decoder.up.3.attn.2.k.weight",
    "decoder.up.3.upsample.conv.weight",
    "decoder.up.0.block.0.nin_shortcut.weight",
    "decoder.conv_out.weight",
    "quantize.embedding.weight",
    "quant_conv.weight",
    "post_quant_conv.bias",
]


def tiny(config: VQGANConfig = TINY) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(config).eval()


@pytest.fixture(scope="module")
def published() -> VQGAN:
    with torch.device("meta"):
        return VQGAN()


@pytest.mark.slow
def test_the_published_model_has_67_7_million_parameters(published: VQGAN) -> None:
    assert round(sum(parameter.numel() for parameter in published.parameters()) / 1e6, 1) == 67.7


@pytest.mark.slow
def test_it_has_the_names_of_the_published_checkpoints(published: VQGAN) -> None:
    names = set(published.state_dict())
    assert set(NAMES) <= names
    for absent in (
        "encoder.down.3.downsample.conv.weight",
        "decoder.up.0.upsample.conv.weight",
        "encoder.down.2.attn.0.q.weight",
    ):
        assert absent not in names


@pytest.mark.slow
def test_an_image_of_224_pixels_has_28_codes_a_side(published: VQGAN) -> None:
    with torch.device("meta"):
        assert published.encode(torch.zeros(1, 3, 224, 224)).shape == (1, 28, 28, 4)


def test_called_it_gives_images_in_the_box_that_depend_on_codes_alone() -> None:
    model, images = tiny(), torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        found = model(images)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 1
        codes = model.quantize.embedding(model.quantize.nearest(model.encode(images)))
        torch.testing.assert_close(found, model.decode(codes).clamp(0, 1))
    assert len({tuple(row) for row in codes.reshape(-1, 4).tolist()}) <= 16


def test_the_nearest_code_is_the_nearest() -> None:
    book = Codebook(50, 4)
    vectors = torch.randn(3, 7, 4)
    distances = (vectors[..., None, :] - book.embedding.weight).square().sum(-1)
    assert torch.equal(book.nearest(vectors), distances.argmin(-1))
    assert book(vectors[:0]).shape == (0, 7, 4)
    with pytest.raises(ShapeError, match="as wide as the codes, 4, got 5"):
        book(torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_nearest_code_is_found_in_full_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    book, vectors = Codebook(500, 4), torch.randn(200, 4)
    torch.nn.init.normal_(book.embedding.weight)
    expected = book.nearest(vectors)
    with torch.autocast("cpu", dtype):
        assert torch.equal(book.nearest(vectors), expected)
    halved = vectors.to(dtype)
    assert torch.equal(book.nearest(halved), book.nearest(halved.float()))


def test_a_published_file_is_read_without_its_loss_whose_names_are_said(tmp_path: Path) -> None:
    given = tiny()
    beside = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(2),
    }
    torch.save({"state_dict": {**given.state_dict(), **beside}}, tmp_path / "model.ckpt")
    torch.manual_seed(1)
    other = VQGAN(TINY)
    report = load_vqgan(other, tmp_path / "model.ckpt")
    assert set(report.unexpected) == set(beside)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in given.state_dict().items())


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tiny().state_dict()}, path)
    more = VQGANConfig(**{**vars(TINY), "codes": 32})
    with pytest.raises(CheckpointError, match=r"a codebook of 32 codes of 4 numbers, got \(16, 4\) in .*codes=…"):
        load_vqgan(VQGAN(more), path)
    state = tiny().state_dict()
    del state["decoder.conv_out.bias"]
    torch.save({"state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        load_vqgan(VQGAN(TINY), path)
    with pytest.raises(ShapeError, match=r"sides divisible by 2, got \(1, 1, 7, 8\)"):
        tiny()(torch.zeros(1, 1, 7, 8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"multiples": ()}, "multiples"),
        ({"multiples": 3}, "multiples"),
        ({"attention": 3}, "attention"),
        ({"attention": ("32",)}, "attention"),
        ({"channels": 48}, r"channels \* multiples up to 32, or divisible by 32, got 48"),
        ({"channels": 8, "multiples": (1, 5)}, r"channels \* multiples up to 32, or divisible by 32, got 40"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VQGANConfig(**sizes)


@pytest.mark.parametrize(
    ("features", "codes", "message"),
    [
        ([1.0], 1, "features as a tensor of floats"),
        (torch.tensor(3.0), 1, "features as a tensor of floats"),
        (torch.ones(9, 3).long(), 2, "features as a tensor of floats"),
        (torch.rand(9, 3), 2.5, "codes of 1 to 9"),
        (torch.rand(9, 3), "2", "codes of 1 to 9"),
        (torch.ones(9, 3), 2, "at least 2 different vectors, got 1"),
    ],
)
def test_features_that_make_no_codebook_are_refused(features: Any, codes: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kmeans_codebook(features, codes, seed=0)


@pytest.mark.slow
def test_its_loss_teaches_encoder_codes_and_decoder() -> None:
    """On images of two kinds the reconstruction improves tenfold."""
    model, images = tiny().train(), torch.cat([torch.zeros(8, 1, 8, 8), torch.ones(8, 1, 8, 8)])
    images[8:, :, :4] = 0.5
    optimizer, loss = torch.optim.Adam(model.parameters(), 0.01), VQLoss()

    def error() -> float:
        with torch.no_grad():
            return float((model(images) - images).square().mean())

    before = error()
    for step in range(60):
        optimizer.zero_grad()
        loss(model, images).backward()
        if step == 0:
            assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert error() < 0.1 * before


def test_dat_takes_it_for_pixels() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    target = Adapter(model, {"image": Site("0", at="input")}, call=lambda model, batch: model(batch["x"]))
    batch = {"x": torch.rand(4, 1, 8, 8), "y": torch.arange(4)}
    loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch["y"])  # noqa: E731
    report = dat(tiny()).step(target, batch, loss=loss)
    assert report.loss.isfinite()
    assert bool((report.delta_norms["image"] <= 0.1).all())
    with pytest.raises(ConfigurationError, match="eval mode"):
        dat(VQGAN(TINY))


def test_a_codebook_of_region_features_is_k_means_and_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 6, generator=generator) * 10
    features = centres[torch.arange(200) % 5] + 0.1 * torch.randn(200, 6, generator=generator)
    book = kmeans_codebook(features, 5, seed=0)
    distances = torch.cdist(centres, book.embedding.weight).amin(1)
    assert bool((distances < 0.2).all())
    assert torch.equal(book.embedding.weight, kmeans_codebook(features, 5, seed=0).embedding.weight)
    assert isinstance(dat(book, box=None).perturber, DiscretePerturber)
    with pytest.raises(ConfigurationError, match="codes of 1 to 200, the number of vectors, got 201"):
        kmeans_codebook(features, 201, seed=0)
    with pytest.raises(ConfigurationError, match="finite"):
        kmeans_codebook(features / 0, 5, seed=0)
