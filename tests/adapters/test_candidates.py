"""The tensors of a model that could be perturbed, as they are listed."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from support.hf_families import FAMILIES
from support.toy import ToyModel, toy_batch
from torch import Tensor, nn

from advvl import Adapter, Site, adapt, sites
from advvl.adapters.candidates import Candidate, Candidates, outermost
from advvl.errors import ConfigurationError, SiteError


@functools.cache
def family(name: str) -> tuple[Any, dict[str, Any]]:
    chosen = next(family for family in FAMILIES if family.name == name)
    return chosen.model(), chosen.fields()


def what(found: Candidates) -> dict[str, str]:
    return {f"{candidate.module}:{candidate.at}": candidate.what for candidate in found}


def shapes(found: Candidates) -> dict[str, str]:
    return {f"{candidate.module}:{candidate.at}": candidate.shape for candidate in found}


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 10))
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), head)


class Stacked(nn.Module):
    """Two layers that give tuples, and one more that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 4), nn.Embedding(3, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers[:2]:
            x = layer(x)[0]
        return self.head(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.linear(self.norm(x)), None


class Noisy(nn.Module):
    """Draws in any mode, and notes in which it was run."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x + torch.randn_like(x)


def test_a_list_reads_as_a_table() -> None:
    model, batch = family("BERT")
    assert repr(sites(model)) == (
        "site                                    shape    what\n"
        "bert.embeddings.word_embeddings:output  (…, 16)  word embedding\n"
        "bert.encoder.layer.0:output             (…, 16)  hidden layer 0 of 1"
    )
    lines = str(sites(model, batch)).splitlines()
    assert re.split("  +", lines[0]) == ["site", "shape", "norm per token", "norm per row", "what"]
    assert re.fullmatch(
        r"bert\.embeddings\.word_embeddings:output  \(2, 5, 16\)  [\d.]+ +[\d.]+ +word embedding", lines[1]
    )
    assert str(sites(model)[0]) == "bert.embeddings.word_embeddings:output  (…, 16)  word embedding"


def test_padded_words_do_not_count_in_the_norms_and_pixels_have_no_token() -> None:
    model, batch = family("BERT")
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 2:] = 0
    x = model.get_input_embeddings()(batch["input_ids"]).detach()[:, :2]
    found = sites(model, batch | {"attention_mask": mask})[0]
    assert found.token_norm == pytest.approx(float(x.norm(dim=-1).mean()))
    assert found.row_norm == pytest.approx(float(x.flatten(1).norm(dim=1).mean()))
    pictures = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert sites(pictures, torch.ones(2, 3, 4, 4))[0].token_norm is None


def test_the_norms_are_those_of_the_tensor_at_the_site() -> None:
    model, batch = family("BERT")
    x = model.get_input_embeddings()(batch["input_ids"]).detach()
    found = sites(model, {name: value for name, value in batch.items() if name != "attention_mask"})[0]
    assert found.token_norm == pytest.approx(float(x.norm(dim=-1).mean()))
    assert found.row_norm == pytest.approx(float(x.flatten(1).norm(dim=1).mean()))


def test_a_model_with_an_image_lists_its_tower_its_projector_and_its_layers() -> None:
    assert what(sites(family("LLaVA")[0])) == {
        "model.vision_tower.embeddings:output": "patch embedding",
        "model.vision_tower.embeddings.patch_embedding:output": "image convolution",
        "model.vision_tower.encoder.layers.0:output": "hidden layer 0 of 2",
        "model.vision_tower.encoder.layers.1:output": "hidden layer 1 of 2",
        "model.multi_modal_projector:output": "projection",
        "model.language_model.embed_tokens:output": "word embedding",
        "model.language_model.layers.0:output": "hidden layer 0 of 1",
    }


def test_a_batch_gives_the_shapes_and_leaves_out_what_does_not_run() -> None:
    model, batch = family("T5")
    assert {"shared:output", "encoder.embed_tokens:output"} < shapes(sites(model)).keys()
    assert shapes(sites(model, batch)) == {
        "encoder.embed_tokens:output": "(2, 5, 16)",
        "encoder.block.0:output": "(2, 5, 16)",
        "decoder.embed_tokens:output": "(2, 5, 16)",
        "decoder.block.0:output": "(2, 5, 16)",
    }


def test_what_takes_a_field_of_the_batch_is_found_by_running_it() -> None:
    model, batch = family("VisualBERT")
    found = sites(model, batch)
    assert what(found)["visual_bert.embeddings.visual_projection:input"] == "takes the batch's 'visual_embeds'"
    assert shapes(found)["visual_bert.embeddings.visual_projection:input"] == "(2, 3, 6)"
    assert what(sites(model))["visual_bert.embeddings.visual_projection:input"] == "input of a projection"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(FAMILIES)), ids=lambda index: f"{FAMILIES[index].name}-{index}")
def test_the_sites_that_adapt_finds_are_among_them(index: int) -> None:
    model, batch = FAMILIES[index].model(), FAMILIES[index].fields()
    target = adapt(model)
    for found in (sites(model), sites(model, batch)):
        assert {f"{site.module}:{site.at}" for site in target.sites.values()} <= what(found).keys()


def test_any_module_is_looked_at() -> None:
    batch = toy_batch()
    found = sites(ToyModel().double(), batch)
    assert shapes(found) == {
        "words:output": "(3, 5, 8)",
        "project:input": "(3, 4, 5)",
        "project:output": "(3, 4, 8)",
        "mix:input": "(3, 9, 8)",
        "mix:output": "(3, 9, 8)",
        "query:input": "(3, 9, 8)",
        "query:output": "(3, 9, 1)",
        "head:input": "(3, 8)",
        "head:output": "(3, 4)",
    }
    assert what(found)["project:input"] == "takes the batch's 'regions'"


def test_a_network_on_pixels_is_looked_at() -> None:
    found = what(sites(Cnn()))
    assert found["0:output"] == "image convolution"
    ran = sites(Cnn(), torch.rand(2, 3, 16, 16))
    assert shapes(ran)["0:output"] == "(2, 8, 16, 16)"
    called = sites(Cnn(), {"pixels": torch.rand(2, 3, 16, 16)}, call=lambda model, batch: model(batch["pixels"]))
    assert [key for key, looks in what(called).items() if looks == "takes the batch's 'pixels'"] == ["0:input"]


def test_layers_that_give_tuples_are_listed_and_can_be_perturbed() -> None:
    model, ids = Stacked(), torch.ones(2, 3, dtype=torch.long)
    assert what(sites(model)) == {
        "words:output": "word embedding",
        "layers.0:output": "hidden layer 0 of 3",
        "layers.1:output": "hidden layer 1 of 3",
        "layers.2:output": "hidden layer 2 of 3",
    }
    found = sites(model, {"ids": ids})
    assert [candidate.module for candidate in found] == ["words", "layers.0", "layers.1"]
    assert {candidate.shape for candidate in found} == {"(2, 3, 4)"}
    target = Adapter(model, {candidate.module: candidate.site for candidate in found})
    clean = model(ids)
    for candidate in found:
        with torch.no_grad(), target.inject({candidate.module: torch.randn(2, 3, 4)}):
            assert not torch.allclose(model(ids), clean)


def test_a_module_that_runs_several_times_is_refused() -> None:
    class Twice(Stacked):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + super().forward(ids)

    found = sites(Twice(), torch.ones(2, 3, dtype=torch.long))
    assert what(found)["words:output"] == "word embedding; runs 2 times"


def test_looking_leaves_the_model_as_it_was() -> None:
    model = Cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels, random = torch.rand(2, 3, 16, 16), torch.get_rng_state()
    sites(model, pixels)
    assert torch.equal(torch.get_rng_state(), random)
    noisy, random = Noisy().train(), torch.get_rng_state()
    sites(noisy, torch.zeros(2, 3))
    assert noisy.modes == [False]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in (*model.modules(), *noisy.modules()))
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_fails_on_the_batch_is_left_as_it_was_too() -> None:
    model = Cnn().train()
    with pytest.raises(RuntimeError, match="size"):
        sites(model, torch.rand(2, 5, 16, 16))
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_a_candidate_is_a_site() -> None:
    assert Candidate("a.b", "input", "projection", "(…, 3)").site == Site("a.b", at="input")


def test_the_module_around_a_patch_embedding_holds_no_words_and_no_layers() -> None:
    vilt, llava = family("ViLT")[0], family("LLaVA")[0]
    inside = "vilt.embeddings.patch_embeddings.projection"
    assert outermost(vilt, inside) == "vilt.embeddings.patch_embeddings"
    assert outermost(llava, "model.vision_tower.embeddings.patch_embedding") == "model.vision_tower.embeddings"


def test_a_model_that_is_not_known_is_pointed_at_the_list() -> None:
    with pytest.raises(SiteError, match=r"got Cnn; pass sites=…, from those of advvl.sites\(model\); see"):
        adapt(Cnn())


def test_an_adapter_is_no_model() -> None:
    with pytest.raises(ConfigurationError, match=r"got Adapter; of an adapter pass its \.model"):
        sites(adapt(nn.Sequential(nn.Linear(2, 2)), {"x": "0"}))  # type: ignore[arg-type]
