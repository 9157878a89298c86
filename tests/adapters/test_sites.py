"""Sites, injection and the registry: perturbed exactly where it says, and never silently elsewhere or nowhere."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support.draws import randn
from support.toy import ToyModel, gradients, perturber, toy, toy_batch, toy_sites
from support.wrappers import Wrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    InnerMaximizer,
    PassTrace,
    Site,
    SymmetricKL,
    Uniform,
    adapt,
    register,
)
from advvl.errors import ConfigurationError, ShapeError, SiteError
from advvl.runtime.names import find, unwrapped


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# --- where a perturbation is added ---


def test_an_output_site_adds_to_the_output_of_its_module() -> None:
    target, batch = toy(), toy_batch()
    delta = randn(3, 5, 8)
    seen: list[Tensor] = []
    handle = target.model.words.register_forward_hook(lambda module, args, output: seen.append(output))
    with target.inject({"text": delta}):
        target.model(**batch)
    handle.remove()
    assert torch.equal(seen[0], target.model.words.weight[batch["ids"]] + delta)


def test_an_input_site_adds_to_the_first_input_of_its_module() -> None:
    target, batch = toy(), toy_batch()
    delta = randn(3, 4, 5)
    moved = dict(batch, regions=batch["regions"] + delta)
    with target.inject({"image": delta}):
        perturbed = target.model(**batch)
    assert torch.equal(perturbed["logits"], target.model(**moved)["logits"])
    assert not torch.equal(perturbed["logits"], target.model(**batch)["logits"])


def test_an_input_site_finds_a_tensor_given_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(flag=True, x=x)

    class Scale(nn.Module):
        def forward(self, *, flag: bool, x: Tensor) -> Tensor:
            return 2 * x

    target = Adapter(Named(), {"x": Site("inner", at="input")})
    with target.inject({"x": torch.ones(2, 3)}):
        assert torch.equal(target.model(torch.zeros(2, 3)), torch.full((2, 3), 2.0))


def test_a_tuple_output_is_perturbed_in_its_first_entry() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str, Tensor]:
            return x, "kept", x

    target = Adapter(nn.Sequential(Pair()), {"x": "0"})
    with target.inject({"x": torch.ones(2, 3)}):
        first, word, last = target.model(torch.zeros(2, 3))
    assert torch.equal(first, torch.ones(2, 3))
    assert word == "kept"
    assert not last.any()


def test_an_input_site_without_a_tensor_is_refused() -> None:
    class Nothing(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(2, 3)

    target = Adapter(Nothing(), {"x": Site("", at="input")})
    message = "expected a tensor as first input of the site of 'x', got none in Nothing; name"
    with pytest.raises(SiteError, match=message), target.inject({"x": torch.ones(2, 3)}):
        target.model()


@pytest.mark.parametrize(
    ("x", "delta"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=["fp64+fp32", "fp32+fp16", "bf16+fp32", "fp16+bf16"],
)
def test_a_sum_is_taken_in_the_wider_precision_and_cast_once(x: torch.dtype, delta: torch.dtype) -> None:
    target = Adapter(nn.Sequential(nn.Identity()), {"x": "0"})
    value, moved = randn(4, 501).to(x), (randn(4, 501, seed=1) / 3).to(delta)
    with target.inject({"x": moved}):
        got = target.model(value)
    assert got.dtype == x
    wide = torch.promote_types(x, delta)
    assert torch.equal(got, (value.to(wide) + moved.to(wide)).to(x))


def test_one_firing_of_several_is_perturbed() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.shared(x), self.shared(x), self.shared(x)])

    for firing in range(3):
        target = Adapter(Thrice(), {"x": Site("shared", firing=firing)})
        with target.inject({"x": torch.ones(2, 3)}):
            got = target.model(torch.zeros(2, 3))
        assert [bool(part.any()) for part in got] == [firing == i for i in range(3)]
        target.close()
    target = Adapter(Thrice(), {"x": Site("shared", firing=3)})
    with (
        pytest.raises(
            SiteError, match=r"to fire 4 times in a forward, got 3; firing counts from 0: choose one below 3"
        ),
        target.inject({"x": torch.ones(2, 3)}),
    ):
        target.model(torch.zeros(2, 3))


def test_a_site_that_does_not_fire_is_an_error() -> None:
    class Branch(ToyModel):
        def forward(self, **batch: Tensor) -> Mapping[str, Tensor]:
            embedded = self.words.weight[batch["ids"]].mean(1)
            return {"logits": self.head(embedded), "loss": self.head(embedded).sum(1)}

    target = Adapter(Branch().double(), toy_sites())
    expected = r"expected the site of 'text' \(words\) to fire in a forward, but it did not: 'words' \(Embedding\) was"
    with pytest.raises(SiteError, match=expected), target.inject({"text": randn(3, 5, 8)}):
        target.model(**toy_batch())
    with pytest.raises(SiteError, match=expected):
        Attack(perturber("text"), PGD(1))(target, toy_batch())
    with pytest.raises(SiteError, match=expected):
        AdversarialTraining(perturber("text"), FreeLB(2)).step(target, toy_batch())


def test_an_integer_tensor_cannot_be_perturbed() -> None:
    target = Adapter(ToyModel().double(), {"text": Site("words", at="input")})
    with pytest.raises(
        SiteError, match=r"expected a floating-point tensor at the site of 'text' \(words\), got torch.int64"
    ):
        Attack(perturber("text"), PGD(1))(target, toy_batch())


# --- masks, packing, shapes ---


@pytest.mark.parametrize("shape", [(3, 6), (2, 5), (5, 3)], ids=str)
def test_a_mask_of_another_shape_than_its_site_is_refused(shape: tuple[int, int]) -> None:
    sites = {"text": Site("words", mask=lambda batch: torch.ones(shape, dtype=torch.bool))}
    target = Adapter(ToyModel().double(), sites)
    with pytest.raises(
        ShapeError, match=rf"expected a mask of 'text' over the .*\(3, 5, 8\), got \({shape[0]}, {shape[1]}\)"
    ):
        Attack(perturber("text"), PGD(1))(target, toy_batch())


def test_a_floating_point_mask_is_refused() -> None:
    sites = {"text": Site("words", mask=lambda batch: (~batch["mask"]).double() * -1e4)}
    with pytest.raises(ShapeError, match=r"of bool or of whole numbers 0/1, got torch\.float64; .* mask == 0"):
        Attack(perturber("text"), PGD(1))(Adapter(ToyModel().double(), sites), toy_batch())


@pytest.mark.parametrize("what", ["mask", "rows"])
def test_a_field_that_a_site_does_not_find_is_named_with_its_modality(what: str) -> None:
    target = Adapter(ToyModel().double(), {"text": Site("words", **{what: lambda batch: batch["attention_mask"]})})
    with pytest.raises(
        SiteError, match=f"expected {what} of the site of 'text' .*'ids'.*no 'attention_mask'"
    ) as caught:
        Attack(perturber("text"), PGD(1))(target, toy_batch())
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_integer_mask_is_read_as_a_boolean_one() -> None:
    model, batch = ToyModel().double(), toy_batch()
    sites = toy_sites()
    plain = Attack(perturber("text"), PGD(2))(Adapter(model, sites), batch)
    counted = {"text": Site("words", mask=lambda batch: batch["mask"].long())}
    assert torch.equal(
        Attack(perturber("text"), PGD(2))(Adapter(model, counted), batch).deltas["text"], plain.deltas["text"]
    )


def test_an_injected_perturbation_of_another_shape_is_refused() -> None:
    target = toy()
    expected = r"expected a perturbation of 'text' of shape \(3, 5, 8\), got \(3, 6, 8\); make it of"
    with pytest.raises(ShapeError, match=expected), target.inject({"text": randn(3, 6, 8)}):
        target.model(**toy_batch())


def test_a_packed_site_moves_like_the_padded_one_it_is() -> None:
    class Packed(ToyModel):
        def forward(self, ids: Tensor, packed: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor) -> object:
            regions = packed.new_zeros(*region_mask.shape, 8).masked_scatter(
                region_mask.unsqueeze(-1), self.project(packed)
            )
            hidden = torch.tanh(self.mix(torch.cat([self.words(ids), regions], 1)))
            scores = self.query(hidden).squeeze(-1).masked_fill(~torch.cat([mask, region_mask], 1), -torch.inf)
            logits = self.head((scores.softmax(1).unsqueeze(-1) * hidden).sum(1))
            return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels, reduction="none")}

    batch = toy_batch()
    real = batch["region_mask"]
    padded = toy()
    packed_model = Packed().double()
    packed_model.load_state_dict(padded.model.state_dict())
    packed = Adapter(
        packed_model,
        {"image": Site("project", at="input", rows=lambda batch: batch["region_mask"].nonzero()[:, 0])},
    )
    packed_batch = {name: value for name, value in batch.items() if name != "regions"} | {
        "packed": batch["regions"][real]
    }
    for maximizer in (PGD(3), FreeLB(3), PGD(2, keep="best")):
        one = Attack(perturber("image"), maximizer)(padded, batch)
        two = Attack(perturber("image"), maximizer)(packed, packed_batch)
        torch.testing.assert_close(two.deltas["image"], one.deltas["image"][real], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(two.losses, one.losses, rtol=1e-12, atol=0.0)


# --- names ---


def test_what_only_looks_like_a_wrapper_is_a_model() -> None:
    """As a model with a head beside its `model`, in what PEFT makes of it for prompt tuning."""

    class Headed(ToyModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    outer = nn.Module()
    outer.base_model = Headed()
    assert unwrapped(outer) is outer
    assert unwrapped(Wrapper(ToyModel(), "module", "base_model", "model", "_orig_mod")).__class__ is ToyModel
    assert find(outer, "base_model.words") is outer.base_model.words


@pytest.mark.parametrize("name", ["wordz", "encoder.words", "word"])
def test_an_unknown_module_is_an_error_that_names_the_nearest(name: str) -> None:
    with pytest.raises(SiteError, match=rf"expected the name of a module of ToyModel, got '{name}'; .*'words'"):
        Adapter(ToyModel(), {"text": Site(name)})


def test_an_adapter_that_could_not_be_made_leaves_no_hook() -> None:
    model = ToyModel()
    with pytest.raises(SiteError, match="got 'nowhere'"):
        Adapter(model, {"text": Site("words"), "image": Site("nowhere")})
    assert hooks(model) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_module_that_takes_no_hooks_is_named_and_no_other_keeps_any() -> None:
    model = ToyModel()
    model.head = torch.jit.script(model.head)
    with pytest.raises(
        SiteError, match=r"takes hooks at the site of 'head', got 'head' \(.*\), .*; name one that does"
    ):
        Adapter(model, {"text": "words", "head": "head"})
    assert hooks(model) == 0


def test_a_closed_adapter_raises_also_through_another() -> None:
    target = toy()
    target.through(Wrapper(target.model, "module")).close()
    assert hooks(target.model) == 0
    for call in (
        lambda: Attack(perturber(), PGD(1))(target, toy_batch()),
        lambda: AdversarialTraining(perturber(), FreeLB(2)).step(target, toy_batch()),
    ):
        with pytest.raises(SiteError, match=r"this adapter was closed .*; adapt the model again"):
            call()


@pytest.mark.parametrize(
    "path",
    [("module",), ("_orig_mod",), ("base_model", "model"), ("module", "_orig_mod"), ("module", "base_model", "model")],
    ids=".".join,
)
def test_site_names_are_found_through_wrappers(path: tuple[str, ...]) -> None:
    plain = toy()
    wrapped = Adapter(Wrapper(plain.model, *path), toy_sites())
    plain.close()
    batch, delta = toy_batch(), randn(3, 5, 8)
    with wrapped.inject({"text": delta}):
        got = wrapped.model(**batch)["logits"]
    again = Adapter(plain.model, toy_sites())
    wrapped.close()
    with again.inject({"text": delta}):
        assert torch.equal(again.model(**batch)["logits"], got)


def test_site_names_are_found_through_torchs_own_wrappers() -> None:
    model = ToyModel().double()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        target = Adapter(wrapped, toy_sites())
        with pytest.raises(SiteError, match=r"module of ToyModel, got 'wordz'; .*'words'"):
            Adapter(wrapped, {"text": "wordz"})
        target.close()
    assert hooks(model) == 0


def test_a_site_is_read_from_text() -> None:
    assert Site.parse("encoder.embed") == Site("encoder.embed")
    assert Site.parse("encoder.embed:output") == Site("encoder.embed")
    assert Site.parse("encoder.proj:input") == Site("encoder.proj", at="input")
    assert adapt(ToyModel(), {"image": "project:input"}).sites == {"image": Site("project", at="input")}


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("expected a site at 'output' or 'input', got 'middle'", lambda: Site.parse("words:middle")),
        ("expected a firing of 0 or more, or None, got -1", lambda: Site("words", firing=-1)),
        ("expected mask as a function of the batch, or None, got Tensor", lambda: Site("w", mask=torch.ones(1))),
        ("expected rows as a function of the batch, or None, got Tensor", lambda: Site("w", rows=torch.ones(1))),
        ("expected the name of a module, .*, got Linear", lambda: Site(nn.Linear(1, 1))),
        ("expected a model, got an adapter of ToyModel", lambda: adapt(toy())),
        (r"expected a model \(nn.Module\) or its adapter, got dict", lambda: adapt({}, {"text": "words"})),
        (
            r"expected a model \(nn.Module\) or its adapter, got dict",
            lambda: AdversarialTraining(perturber(), FreeLB(2)).step(toy_batch(), toy()),
        ),
    ],
    ids=["at", "firing", "mask", "rows", "module", "adapter", "model", "swapped"],
)
def test_a_site_that_makes_no_sense_is_refused(message: str, make: object) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    ("message", "sites"),
    [
        (r"expected sites as a mapping .*, got \['words'\]", ["words"]),
        ("expected sites as a mapping from modality to Site, got {}", {}),
        ("expected a Site, or the name of a module, for 'text', got Linear", {"text": nn.Linear(1, 1)}),
    ],
    ids=["list", "none", "module"],
)
def test_sites_that_are_none_are_refused(message: str, sites: Any) -> None:
    with pytest.raises(SiteError, match=message):
        adapt(ToyModel(), sites)


def test_an_adapter_shows_its_model_and_sites() -> None:
    assert repr(toy()) == "Adapter(ToyModel, {'text': 'words:output', 'image': 'project:input'})"


def test_a_modality_that_the_adapter_lacks_is_an_error() -> None:
    target, batch = toy(), toy_batch()
    expected = r"expected a modality of ToyModel among \['image', 'text'\], got 'audio'"
    with pytest.raises(SiteError, match=expected):
        Attack(perturber("text", "audio"), PGD(1))(target, batch)
    with pytest.raises(SiteError, match=expected):
        AdversarialTraining(perturber("audio"), FreeLB(2)).step(target, batch)
    with pytest.raises(SiteError, match=expected), target.inject({"audio": randn(1, 1)}):
        pass


def test_a_modality_that_the_perturber_does_not_name_stays_clean() -> None:
    target, batch = toy(), toy_batch()
    seen: list[Tensor] = []
    handle = target.model.project.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    Attack(perturber("text"), PGD(2))(target, batch)
    handle.remove()
    assert all(torch.equal(regions, batch["regions"]) for regions in seen)


# --- what is left behind ---


def test_hooks_are_gone_after_close_and_close_may_be_called_twice() -> None:
    target = toy()
    assert hooks(target.model) == 2
    target.close()
    target.close()
    assert hooks(target.model) == 0


@pytest.mark.slow
def test_hooks_are_gone_with_the_adapter() -> None:
    model = ToyModel()
    target = Adapter(model, toy_sites())
    assert hooks(model) == 2
    del target
    gc.collect()
    assert hooks(model) == 0


def test_an_adapter_adds_nothing_to_the_model_and_keeps_no_parameter() -> None:
    model = ToyModel()
    names = list(model.state_dict())
    target = Adapter(model, toy_sites())
    assert list(model.state_dict()) == names
    assert not isinstance(target, nn.Module)
    assert target.model is model


def test_a_model_that_raises_leaves_nothing_bound() -> None:
    target, batch = toy(), toy_batch()
    clean = target.model(**batch)["logits"]
    broken = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(TypeError), target.inject({"text": randn(3, 5, 8)}):
        target.model(**broken)
    assert torch.equal(target.model(**batch)["logits"], clean)
    handle = target.model.head.register_forward_pre_hook(_fail)
    for call in (
        lambda: Attack(perturber(), PGD(2))(target, batch),
        lambda: AdversarialTraining(perturber(), FreeLB(2), SymmetricKL()).step(target, batch),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    handle.remove()
    assert torch.equal(target.model(**batch)["logits"], clean)


def _fail(module: nn.Module, args: object) -> None:
    raise ZeroDivisionError


def test_after_an_injection_the_model_is_clean_again() -> None:
    target, batch = toy(), toy_batch()
    clean = target.model(**batch)["logits"]
    with target.inject({"text": randn(3, 5, 8)}):
        assert not torch.equal(target.model(**batch)["logits"], clean)
    assert torch.equal(target.model(**batch)["logits"], clean)


def test_injections_nest_and_the_outer_one_returns() -> None:
    target = Adapter(nn.Sequential(nn.Identity()), {"x": "0"})
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    with target.inject({"x": one}):
        with target.inject({"x": 5 * one}):
            assert torch.equal(target.model(zero), 5 * one)
        assert torch.equal(target.model(zero), one)


def test_gradients_flow_into_an_injected_perturbation() -> None:
    target, batch = toy(), toy_batch()
    delta = torch.zeros(3, 5, 8, dtype=torch.float64, requires_grad=True)
    with target.inject({"text": delta}):
        target.model(**batch)["loss"].sum().backward()
    assert delta.grad.abs().sum() > 0


# --- activation checkpointing ---


class Checkpointed(ToyModel):
    """Both sites inside a region that is run again in the backward."""

    def forward(self, ids: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor) -> object:
        def embed(ids: Tensor, regions: Tensor) -> Tensor:
            return torch.tanh(self.mix(torch.cat([self.words(ids), self.project(regions)], 1)))

        hidden = checkpoint(embed, ids, regions, use_reentrant=False)
        scores = self.query(hidden).squeeze(-1).masked_fill(~torch.cat([mask, region_mask], 1), -torch.inf)
        logits = self.head((scores.softmax(1).unsqueeze(-1) * hidden).sum(1))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels, reduction="none")}


def checkpointed() -> tuple[Adapter, Adapter]:
    plain = toy()
    model = Checkpointed().double()
    model.load_state_dict(plain.model.state_dict())
    return plain, Adapter(model, toy_sites())


@pytest.mark.parametrize("order", ["together", "in turn"])
@pytest.mark.parametrize("kind", [partial(FreeLB, 3), partial(PGD, 2)], ids=["FreeLB", "PGD"])
def test_activation_checkpointing_around_a_site_changes_no_gradient(kind: partial, order: str) -> None:
    plain, again = checkpointed()
    for target in (plain, again):
        AdversarialTraining(perturber(), kind(modalities=order)).step(target, toy_batch())
    expected, got = gradients(plain), gradients(again)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")


def test_activation_checkpointing_around_a_site_changes_no_attack() -> None:
    plain, again = checkpointed()
    one, two = (Attack(perturber(), PGD(3))(target, toy_batch()) for target in (plain, again))
    for name in one.deltas:
        torch.testing.assert_close(two.deltas[name], one.deltas[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("maximizer", [FreeLB(2), PGD(2)], ids=["FreeLB", "PGD"])
def test_one_backward_over_checkpointed_sites_of_two_passes_is_refused(maximizer: InnerMaximizer) -> None:
    """As under DDP, where the clean and the last perturbed graph share one."""
    _, target = checkpointed()
    method = AdversarialTraining(perturber(), maximizer, SymmetricKL())
    with pytest.raises(
        SiteError, match=r"outside any activation-checkpointed region.* both the clean and the last perturbed"
    ):
        method.step(target, toy_batch(), sync=lambda: nullcontext())


@pytest.mark.parametrize("dropout", ["fresh", "shared"])
@pytest.mark.parametrize("maximizer", [FreeLB(2), PGD(2)], ids=["FreeLB", "PGD"])
def test_activation_checkpointing_goes_with_a_live_clean_branch(maximizer: InnerMaximizer, dropout: Any) -> None:
    plain, again = checkpointed()
    for target in (plain, again):
        AdversarialTraining(perturber(), maximizer, SymmetricKL(), dropout=dropout).step(target, toy_batch())
    expected, got = gradients(plain), gradients(again)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-15)


def test_activation_checkpointing_goes_with_a_detached_clean_branch() -> None:
    plain, again = checkpointed()
    for target in (plain, again):
        AdversarialTraining(perturber(), FreeLB(2), SymmetricKL(detach_clean=True)).step(target, toy_batch())
    expected, got = gradients(plain), gradients(again)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-15)


def test_activation_checkpointing_goes_with_a_clean_pass_that_owes_no_gradient() -> None:
    """Shared masks: it answers the words' first probe from its graph, and is not in the last backward."""
    plain, again = checkpointed()
    image = Ascent(L2(1.0), step_size=0.3, start=Uniform(0.9))
    mixed = EmbeddingPerturber(image=image, text=Ascent(L2(1.0), step_size=0.3))
    method = AdversarialTraining(mixed, PGD(2, "in turn"), SymmetricKL(detach_clean=True), dropout="shared")
    traces: list[list[PassTrace]] = [[], []]
    for target, trace in zip((plain, again), traces, strict=True):
        method.step(target, toy_batch(), generator=torch.Generator().manual_seed(0), trace=trace.append)
    for one, two in zip(*traces, strict=True):
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(two.gradients[name], gradient, rtol=1e-12, atol=1e-15)
    expected, got = gradients(plain), gradients(again)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-15)


def test_activation_checkpointing_around_a_site_that_fires_several_times_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for _ in range(2):
                x = checkpoint(lambda x: self.shared(x).tanh(), x, use_reentrant=False)
            return {"loss": x.sum(1), "logits": x}

    target = Adapter(Twice(), {"x": Site("shared", firing=0)})
    with pytest.raises(SiteError, match="to fire once a forward under activation checkpointing, got several"):
        Attack(perturber("x"), PGD(1))(target, {"x": randn(2, 3)})


# --- the registry, and what an adapter reads from outputs ---


def test_a_registered_class_and_its_subclasses_are_adapted_without_sites() -> None:
    class Registered(ToyModel):
        pass

    class Heir(Registered):
        pass

    with pytest.raises(SiteError, match="expected a model with a registered adapter, got Registered; pass sites=…"):
        adapt(Registered())
    register(f"{Registered.__module__}.{Registered.__qualname__}", f"{__name__}:toy_adapter")
    paths = (["module"], ["_orig_mod"], ["base_model", "model"], ["module", "base_model", "model"])
    for model in (Registered(), Heir(), *(Wrapper(Heir(), *path) for path in paths)):
        target = adapt(model)
        assert target.model is model
        assert set(target.sites) == {"text", "image"}
    own = adapt(Registered(), logits=lambda outputs: outputs["loss"], pure=True)
    assert set(own.sites) == {"text", "image"}
    assert own.logits(own.forward(toy_batch(dtype=torch.float32))).shape == (3,)
    assert own.pure
    assert not target.pure


def toy_adapter(model: nn.Module) -> Adapter:
    return Adapter(model, toy_sites())


def test_a_bare_model_is_adapted_for_one_attack_and_left_without_hooks() -> None:
    class Bare(ToyModel):
        pass

    register(f"{Bare.__module__}.{Bare.__qualname__}", f"{__name__}:toy_adapter")
    model = Bare().double()
    assert Attack(perturber(), PGD(1))(model, toy_batch()).deltas.keys() == {"text", "image"}
    assert hooks(model) == 0


def test_a_batch_that_is_no_mapping_is_the_models_one_argument() -> None:
    target = Adapter(nn.Sequential(nn.Linear(3, 2)), {"x": "0:input"}, loss=lambda outputs, batch: outputs.sum(1))
    assert target.forward(torch.ones(4, 3)).shape == (4, 2)
    assert Attack(perturber("x"), PGD(1))(target, torch.ones(4, 3)).losses.shape == (4,)


def test_outputs_without_a_loss_or_logits_are_named() -> None:
    target = Adapter(nn.Sequential(nn.Linear(3, 2)), {"x": "0:input"})
    with pytest.raises(ConfigurationError, match="expected outputs with a loss, got Tensor without"):
        Attack(perturber("x"), PGD(1))(target, torch.ones(4, 3))
    target = Adapter(
        nn.Sequential(nn.Linear(3, 2)), {"x": "0:input"}, call=lambda model, batch: {"loss": model(batch).sum(1)}
    )
    with pytest.raises(
        ConfigurationError, match=r"expected outputs with logits to compare, got dict of \['loss'\] without"
    ):
        AdversarialTraining(perturber("x"), FreeLB(2), SymmetricKL()).step(target, torch.ones(4, 3))


def test_a_loss_of_two_axes_is_refused() -> None:
    target = Adapter(nn.Sequential(nn.Linear(3, 2)), {"x": "0:input"}, loss=lambda outputs, batch: outputs)
    with pytest.raises(ShapeError, match=r"expected a loss as a scalar tensor or one per row \(B,\), got \(4, 2\)"):
        Attack(perturber("x"), PGD(1))(target, torch.ones(4, 3))


@pytest.mark.slow
def test_an_adapter_goes_on_through_a_wrapper_that_came_later() -> None:
    target = toy()
    wrapper = Wrapper(target.model, "module")
    wrapped = target.through(wrapper, logits=lambda outputs: outputs["logits"] * 2)
    del target
    gc.collect()  # the hooks stay as long as either is used
    assert hooks(wrapper) == 2
    batch = toy_batch()
    report = AdversarialTraining(perturber(), FreeLB(2)).step(wrapped, batch)
    assert report.delta_norms["image"].all()
    outputs = wrapped.forward(batch)
    torch.testing.assert_close(wrapped.logits(outputs), outputs["logits"] * 2)


def test_a_wrapper_of_another_model_is_refused() -> None:
    target = toy()
    with pytest.raises(SiteError, match="does not hold its sites"):
        target.through(Wrapper(ToyModel(), "module"))


def test_numbers_of_texts_are_no_mask() -> None:
    sites = {"text": Site("words", mask=lambda batch: torch.tensor([[1, 1, 2, 2, 0]] * 3))}
    with pytest.raises(
        ShapeError, match=r"mask of 'text' of 0 and 1, got numbers up to 2; pass mask > 0, and give rows"
    ):
        Attack(perturber("text"), PGD(1))(Adapter(ToyModel().double(), sites), toy_batch())
