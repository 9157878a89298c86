"""Sites that do not work: each is found, and the error says what is true of this model and this batch."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from support.compare import close
from support.toy import ToyModel, gradients, perturber, toy, toy_batch, toy_sites
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from advvl import (
    PGD,
    Adapter,
    AdversarialTraining,
    Attack,
    FreeLB,
    Site,
    SymmetricKL,
    Uniform,
)
from advvl.adapters.outputs import read_logits
from advvl.errors import ConfigurationError, ShapeError, SiteError

pytestmark = pytest.mark.slow

Call = Callable[[Adapter, Any], object]


def attack(target: Adapter, batch: Any, *modalities: str) -> dict[str, Tensor]:
    return dict(Attack(perturber(*modalities), PGD(2))(target, batch).deltas)


def train(target: Adapter, batch: Any, *modalities: str, regularizer: Any = None) -> dict[str, Tensor]:
    AdversarialTraining(perturber(*modalities), FreeLB(2), regularizer).step(target, batch)
    return gradients(target)


def refused(target: Adapter, batch: Any, message: str, *modalities: str, error: type[Exception] = SiteError) -> None:
    """The attack and the step both end in this error."""
    for call in (attack, train):
        with pytest.raises(error, match=message):
            call(target, batch, *modalities or ("text",))


def adapted(kind: type[ToyModel]) -> Adapter:
    torch.manual_seed(0)
    return Adapter(kind().double(), toy_sites())


class Pooled(ToyModel):
    """The toy model in two halves: the hidden states, and what is made of them."""

    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        return torch.cat([self.words(ids), self.project(regions)], 1)

    def forward(
        self, ids: Tensor, regions: Tensor, mask: Tensor, region_mask: Tensor, labels: Tensor
    ) -> dict[str, Any]:
        return self.finish(torch.tanh(self.mix(self.embed(ids, regions))), labels)

    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        logits = self.head(hidden.mean(1))
        return {"logits": logits, "loss": F.cross_entropy(logits, labels, reduction="none")}


def bert(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    return BertForSequenceClassification(config).double()


WORDS = "bert.embeddings.word_embeddings"


def sentences() -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([[2, 11, 12, 13, 3], [2, 14, 3, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "labels": torch.tensor([0, 2]),
    }


# --- the site did not fire ---


def test_given_embeddings_are_named_as_the_reason_why_the_site_is_silent() -> None:
    batch = sentences()
    del batch["input_ids"]
    batch["inputs_embeds"] = torch.zeros(2, 5, 16, dtype=torch.float64)
    expected = (
        r"'text' \(bert.*\) to fire in a forward, but it did not: the batch gives 'inputs_embeds', .* give ids, or"
    )
    refused(Adapter(bert(), {"text": WORDS}), batch, expected)


class Skips(Pooled):
    """Calls neither its words nor what it holds of `tower`."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        x = self.tower[0][1](self.project(regions))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (
            "words",
            r"'words' \(Embedding\) was not called: Skips ran without it; the batch holds 'ids', 'labels', 'mask', .*; give",
        ),
        ("layers", r"'layers' \(ModuleList\) has no forward of its own, .* name one of 'layers.0', 'layers.1'; see"),
        ("tower.0", r"'tower.0' \(Sequential\) was not called, only what it holds; name one of 'tower.0.1'; see"),
        ("tower.0.0", r"'tower.0.0' \(Linear\) was not called: Skips ran without it"),
    ],
)
def test_a_module_that_is_not_called_is_distinguished_from_one_whose_parts_are(site: str, reason: str) -> None:
    target = Adapter(Skips().double(), {"text": site})
    refused(target, toy_batch(), rf"'text' \({site}\) to fire in a forward, but it did not: {reason}")


@pytest.mark.parametrize("way", ["weight", "forward"])
def test_a_module_whose_weight_is_used_without_a_call_is_named_with_the_operation(way: str) -> None:
    class Borrows(Pooled):
        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            words = self.words.forward(ids) if way == "forward" else F.embedding(ids, self.words.weight)
            return torch.cat([words, self.project(regions)], 1)

    expected = (
        r"'words' \(Embedding\) was not called, but its parameters were used by torch.nn.functional.embedding in Borr"
    )
    refused(adapted(Borrows), toy_batch(), expected)


def test_a_module_that_is_called_now_and_then_is_said_to_be() -> None:
    class Moody(Pooled):
        calls = 0

        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            self.calls += 1
            return super().embed(ids, regions) if self.calls % 2 == 0 else self.project(regions)

    with pytest.raises(SiteError, match=r"'words' \(Embedding\) is not called in every forward"):
        attack(adapted(Moody), toy_batch(), "text")


def test_an_injection_says_that_its_site_was_not_called() -> None:
    with (
        pytest.raises(
            SiteError,
            match=r"'text' \(words\) .* did not: 'words' \(Embedding\) was not called; see docs/errors.md#silent-site$",
        ),
        toy().inject({"text": torch.zeros(3, 5, 8)}),
    ):
        pass


DYNAMO = "ignore:The .grad attribute of a Tensor that is not a leaf"  # it reads that itself


@pytest.mark.slow
@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("way", ["wrapper", "method", "part"])
def test_a_model_that_was_compiled_and_run_before_it_was_adapted_is_refused(way: str) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4))

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    torch.compiler.reset()
    model = Small().double().eval()
    compiled = torch.compile(model, backend="eager") if way == "wrapper" else model
    if way == "method":
        model.compile(backend="eager")
    if way == "part":
        model.inner = torch.compile(model.inner, backend="eager")
    ids = toy_batch()["ids"]
    compiled(ids)
    target = Adapter(compiled, {"text": "inner.0"}, loss=lambda outputs, batch: outputs.sum((1, 2)))
    with pytest.raises(
        SiteError, match=r"the model was compiled and run before .* torch.compiler.reset\(\) afterwards"
    ):
        attack(target, ids, "text")
    with (
        pytest.raises(SiteError, match=r"was not called; if the model had run compiled, adapt it before"),
        target.inject({"text": torch.ones(3, 5, 8)}),
    ):
        clean = compiled(ids)
    torch.compiler.reset()  # as it says
    with target.inject({"text": torch.ones(3, 5, 8)}):
        assert not torch.equal(compiled(ids), clean)


@pytest.mark.slow
def test_a_compiled_model_that_goes_round_its_site_is_not_blamed_for_being_compiled() -> None:
    torch.compiler.reset()
    model = torch.compile(Skips().double(), backend="eager")
    with pytest.raises(
        SiteError, match=r"'_orig_mod.words' \(Embedding\) was not called: '_orig_mod' \(Skips\) ran witho"
    ):
        attack(Adapter(model, {"text": "words"}), toy_batch(), "text")


@pytest.mark.slow
@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("way", ["wrapper", "through", "part"])
def test_a_model_that_is_adapted_before_it_is_compiled_gives_the_same(way: str) -> None:
    torch.compiler.reset()
    plain, target = toy(), toy()
    if way == "part":
        target.model.mix.compile(backend="eager")
    elif way == "through":
        target = target.through(torch.compile(target.model, backend="eager"))
    else:
        target = Adapter(torch.compile(target.model, backend="eager"), toy_sites())
    expected, got = train(plain, toy_batch(), "text"), train(target, toy_batch(), "text")
    close({name.removeprefix("_orig_mod."): gradient for name, gradient in got.items()}, expected)


# --- the site fired several times ---


class Tied(Pooled):
    """The same embedding for question and answer, as encoders and decoders share one."""

    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        return torch.cat([self.words(ids), self.words(ids.flip(1)), self.project(regions)], 1)


def test_a_module_that_runs_several_times_is_refused_until_one_time_is_chosen() -> None:
    expected = r"'text' \(words\) to fire once in a forward, got 2 times; .* from Site\(…, firing=0\) to firing=1; see"
    target, batch = adapted(Tied), toy_batch()
    refused(target, batch, expected)
    for regularizer in (SymmetricKL(), SymmetricKL(detach_clean=True)):
        with pytest.raises(SiteError, match=expected):
            train(target, batch, "text", regularizer=regularizer)
    with pytest.raises(SiteError, match=expected), target.inject({"text": torch.zeros(3, 5, 8)}):
        target.model(**batch)
    for firing in (0, 1):
        chosen = Adapter(target.model, {"text": Site("words", firing=firing)})
        assert attack(chosen, batch, "text")["text"].any()
        assert train(chosen, batch, "text")
    with pytest.raises(SiteError, match=r"to fire 3 times in a forward, got 2; .* choose one below 2"):
        attack(Adapter(target.model, {"text": Site("words", firing=2)}), batch, "text")


def test_several_times_do_not_matter_at_a_site_that_nobody_perturbs() -> None:
    assert attack(adapted(Tied), toy_batch(), "image")["image"].any()
    assert train(adapted(Tied), toy_batch(), "image", regularizer=SymmetricKL())


@pytest.mark.slow
@pytest.mark.filterwarnings(DYNAMO)
def test_one_time_of_several_is_the_same_when_compiled() -> None:
    torch.compiler.reset()
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        target = Adapter(Tied().double(), {"text": Site("words", firing=1)})
        if compiles:
            target.model.compile(backend="eager")
        found.append(train(target, toy_batch(), "text"))
    close(found[1], found[0])


@pytest.mark.parametrize("firing", [True, 1.0, -1, "0"], ids=repr)
def test_a_firing_is_a_whole_number_or_none(firing: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a firing of 0 or more, or None, got"):
        Site("words", firing=firing)


# --- no gradient comes back ---


def under(mode: Any) -> type[ToyModel]:
    class Under(Pooled):
        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            with mode():
                return super().embed(ids, regions)

    return Under


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_site_that_records_no_graph_is_refused_where_it_fires(mode: Any) -> None:
    expected = (
        rf"expected a graph to be recorded at the site of 'text' \(words\), .* under torch\.{mode.__name__}\(\); take"
    )
    refused(adapted(under(mode)), toy_batch(), expected)


def test_a_call_that_runs_the_model_without_gradients_is_refused() -> None:
    @torch.no_grad()
    def call(model: nn.Module, batch: Any) -> Any:
        return model(**batch)

    target = Adapter(ToyModel().double(), toy_sites(), call=call)
    refused(target, toy_batch(), r"runs under torch\.no_grad\(\); take that off the forward from this site on")


def test_the_callers_no_grad_changes_nothing() -> None:
    with torch.no_grad():
        inside = attack(toy(), toy_batch()), train(toy(), toy_batch(), regularizer=SymmetricKL())
    close(inside[0], attack(toy(), toy_batch()))
    close(inside[1], train(toy(), toy_batch(), regularizer=SymmetricKL()))


def test_without_gradients_below_the_site_an_attack_finds_the_same() -> None:
    class Below(Pooled):
        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            with torch.no_grad():
                return super().embed(ids, regions)

    with_, without = (Adapter(adapted(kind).model, {"text": "mix:input"}) for kind in (Pooled, Below))
    close(attack(without, toy_batch(), "text"), attack(with_, toy_batch(), "text"))


class Detached(Pooled):
    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        return super().embed(ids, regions).detach()


class Ungraded(Pooled):
    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            hidden = hidden.exp()
        return super().finish(hidden, labels)


class Unused(Pooled):
    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        self.words(ids).mean()
        return self.project(regions)


class Rounded(Pooled):
    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        return super().finish(self.words.weight[hidden.argmax(2)], labels)


class Read(Pooled):
    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        return super().finish(hidden * 0 + hidden.detach().numpy().sum() * self.head.weight.sum(), labels) | {
            "loss": self.head.bias.sum() + hidden.sum().item()
        }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Detached, r"torch\.Tensor\.detach in Detached takes it out of the graph"),
        (Ungraded, r"torch\.Tensor\.exp in Ungraded runs under torch\.no_grad\(\)"),
        (Unused, r"torch\.Tensor\.mean in Unused is the last to depend on it, and what that gave is not used"),
        (Rounded, r"torch\.Tensor\.argmax in Rounded has no gradient"),
        (Read, r"torch\.Tensor\.item in Read takes it out of the graph"),
    ],
)
def test_where_the_perturbation_is_lost_is_named(kind: type[ToyModel], reason: str) -> None:
    refused(
        adapted(kind),
        toy_batch(),
        f"expected the loss to depend on the perturbation of 'text', but it does not: {reason}",
    )


def loss_of(outputs: Any, batch: Any, *, way: str) -> Any:
    if way == "no_grad":
        with torch.no_grad():
            return F.cross_entropy(outputs["logits"], batch["labels"])
    loss = F.cross_entropy(outputs["logits"], batch["labels"])
    return {"detach": loss.detach, "data": lambda: loss.data, "item": lambda: torch.tensor(loss.item())}[way]()


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("no_grad", r"torch\.nn\.functional\.cross_entropy in the loss .* runs under torch\.no_grad\(\)"),
        ("detach", r"torch\.Tensor\.detach in the loss .* takes it out of the graph"),
        ("data", r"torch\.Tensor\.data\.__get__ in the loss .* takes it out of the graph"),
        ("item", r"torch\.Tensor\.item in the loss .* takes it out of the graph"),
    ],
)
def test_the_error_of_a_loss_without_a_graph_says_where_it_left_the_graph(way: str, reason: str) -> None:
    target = Adapter(ToyModel().double(), toy_sites(), loss=partial(loss_of, way=way))
    expected = f"a loss that requires grad, got one that does not depend on the perturbation of 'text': {reason}"
    refused(target, toy_batch(), expected, error=ConfigurationError)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_dynamic is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*an autograd kernel was not registered")
def test_quantised_weights_above_a_site_are_named() -> None:
    model = torch.ao.quantization.quantize_dynamic(ToyModel(), {nn.Linear}, dtype=torch.qint8)
    expected = (
        r"but it does not: quantized.linear_dynamic in 'mix' \(Linear\) has no gradient; use floating-point weights"
    )
    refused(Adapter(model, toy_sites()), toy_batch(dtype=torch.float32), expected)


# --- frozen and offloaded modules ---


def test_a_site_in_a_frozen_module_is_attacked_and_trains_the_others_as_if_it_were_not_frozen() -> None:
    free, frozen = toy(), toy()
    frozen.model.words.requires_grad_(False)
    frozen.model.project.requires_grad_(False)
    close(attack(frozen, toy_batch()), attack(free, toy_batch()))
    for regularizer in (None, SymmetricKL()):
        expected = train(free, toy_batch(), regularizer=regularizer)
        got = train(frozen, toy_batch(), regularizer=regularizer)
        assert not any(name.startswith(("words", "project")) for name in got)
        close(got, {name: gradient for name, gradient in expected.items() if name in got})
        assert {"mix.weight", "head.weight"} <= got.keys()
        free.model.zero_grad()
        frozen.model.zero_grad()


def test_a_model_in_which_everything_is_frozen_is_attacked_and_not_trained() -> None:
    frozen = toy()
    frozen.model.requires_grad_(False)
    close(attack(frozen, toy_batch()), attack(toy(), toy_batch()))
    for start in ({}, {"start": Uniform(0.1)}):
        method = AdversarialTraining(perturber(**start), FreeLB(2))
        with pytest.raises(
            ConfigurationError, match="parameters to train, got ToyModel with none that requires grad; unfr"
        ):
            method.step(frozen, toy_batch())


def offloaded(how: str, folder: Any) -> Adapter:
    target = toy()
    if how == "cpu":
        accelerate.cpu_offload(target.model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(target.model, folder, execution_device="cpu")
    else:
        accelerate.cpu_offload(target.model.words, execution_device="cpu")
    return target


@pytest.mark.parametrize("how", ["cpu", "disk", "one module"])
def test_an_offloaded_model_is_attacked_like_any_and_not_trained(how: str, tmp_path: Any) -> None:
    target = offloaded(how, tmp_path)
    close(attack(target, toy_batch()), attack(toy(), toy_batch()))
    with pytest.raises(
        ConfigurationError,
        match=r"to train to be in memory, got 'words.weight' on the meta device; .*#offloaded-weights$",
    ):
        train(target, toy_batch())


def test_what_is_offloaded_and_frozen_trains_the_rest(tmp_path: Any) -> None:
    target = offloaded("one module", tmp_path)
    target.model.words.requires_grad_(False)
    got, expected = train(target, toy_batch()), train(toy(), toy_batch())
    close(got, {name: gradient for name, gradient in expected.items() if name != "words.weight"})


# --- what the module of a site gives ---

Named = namedtuple("Named", ["hidden", "rest"])


@dataclass
class Record:
    hidden: Tensor


class Gives(nn.Module):
    """A model whose first module gives what `make` makes of a tensor, from which `read` reads it."""

    def __init__(self, make: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.read = Giver(make), read

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.read(self.inner(x))
        return {"loss": hidden.square().sum((1, 2)), "logits": hidden}


class Giver(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make, self.kept = nn.Linear(4, 4).double(), make, list[Any]()

    def forward(self, x: Tensor) -> Any:
        self.kept.append(self.make(self.layer(x)))
        return self.kept[-1]


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: x, lambda given: given),
        (lambda x: (x, x.detach()), lambda given: given[0]),
        (lambda x: Named(x, None), lambda given: given.hidden),
        (lambda x: {"hidden": x, "mask": x > 0}, lambda given: given["hidden"]),
        (lambda x: OrderedDict(mask=x > 0, hidden=x), lambda given: given["hidden"]),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda given: given.last_hidden_state),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda given: given["last_hidden_state"]),
        (lambda x: BaseModelOutput(last_hidden_state=x), lambda given: given[0]),
    ],
    ids=["tensor", "tuple", "named tuple", "dict", "ordered dict", "attribute", "key", "index"],
)
def test_the_one_tensor_in_what_a_module_gives_is_perturbed(make: Any, read: Any) -> None:
    model = Gives(make, read)
    target, x, delta = Adapter(model, {"x": "inner"}), torch.randn(2, 3, 4, dtype=torch.float64), torch.ones(2, 3, 4)
    with target.inject({"x": delta}):
        got = model(x)["logits"]
    torch.testing.assert_close(got, model.inner.layer(x) + delta)
    assert torch.equal(read(model.inner.kept[0]), model.inner.layer(x)), "what the module keeps of it is its own"
    assert attack(target, {"x": x}, "x")["x"].any()
    assert train(target, {"x": x}, "x")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda x: [x], "list"),
        (lambda x: None, "NoneType"),
        (lambda x: (None, x), "tuple"),
        (Record, "Record"),
        (lambda x: {"a": x, "b": x}, "dict with a, b"),
        (lambda x: {"a": x > 0}, "dict with none"),
        (
            lambda x: BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0]),
            "BaseModelOutputWithPooling with last_hidden_state, pooler_output",
        ),
    ],
    ids=["list", "none", "tuple", "dataclass", "dict of two", "dict of none", "ModelOutput of two"],
)
def test_what_has_no_one_tensor_is_refused_with_the_modules_inside_it(make: Any, got: str) -> None:
    target = Adapter(Gives(make, lambda given: given), {"x": "inner"})
    expected = rf"one in a tuple or dict at .*'x', got {got} from Giver; name the module that gives it, of \['layer'\]"
    refused(target, {"x": torch.randn(2, 3, 4, dtype=torch.float64)}, expected, "x")


# --- what the model gives ---


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        (lambda hidden: None, "outputs with a loss, got NoneType without; give what it is computed from"),
        (lambda hidden: {"hidden": hidden}, r"outputs with a loss, got dict of \['hidden'\] without"),
        (
            lambda hidden: {"loss": hidden.sum().item()},
            "the loss of the outputs as a tensor, got float; .* without item",
        ),
        (lambda hidden: {"loss": [hidden]}, "the loss of the outputs as a tensor, got list"),
    ],
    ids=["nothing", "hidden states", "number", "list"],
)
def test_a_model_whose_loss_is_no_tensor_is_refused(outputs: Any, got: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Any:
            return outputs(self.layer(x))

    batch = {"x": torch.randn(2, 3, 4, dtype=torch.float64)}
    refused(Adapter(Model(), {"x": "layer"}), batch, f"expected {got}", "x", error=ConfigurationError)


@pytest.mark.parametrize(
    ("loss", "got"), [(0.5, "float"), (None, "NoneType"), (torch.zeros(3, 4), r"\(3, 4\)")], ids=str
)
def test_a_loss_function_that_gives_no_loss_is_refused(loss: Any, got: str) -> None:
    target = Adapter(ToyModel().double(), toy_sites(), loss=lambda outputs, batch: loss)
    expected = (
        rf"expected a loss as a scalar tensor or one per row \(B,\), got {got}; reduce the other axes, without item"
    )
    refused(target, toy_batch(), expected, error=ShapeError)


# --- packed sites ---


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (torch.zeros(4, dtype=torch.long), r"sample of each row or position of \(15, 8\), got \(4,\); give"),
        (torch.zeros(15, 1, dtype=torch.long), r"sample of each row .* of \(15, 8\), got \(15, 1\); give"),
        (torch.zeros(15, 8, dtype=torch.long), r"sample of each row .* of \(15, 8\), got \(15, 8\); give"),
        (torch.zeros(15), r"whole numbers, got torch.float32; give"),
        (torch.zeros(15, dtype=torch.bool), r"whole numbers, got torch.bool; give"),
        (torch.arange(-1, 14), "numbers of 0 or more, got -1; count from 0, and leave padding to the mask"),
    ],
    ids=["too few", "two axes", "entries", "float", "mask", "negative"],
)
def test_rows_that_do_not_fit_are_refused(rows: Tensor, got: str) -> None:
    target = Adapter(Flat().double(), {"text": Site("words", rows=lambda batch: rows)})
    refused(target, toy_batch(), rf"expected rows of 'text' as .*{got}", error=ShapeError)


class Flat(Pooled):
    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        return torch.cat([self.words(ids.flatten()).view(*ids.shape, 8), self.project(regions)], 1)


def test_a_packed_tensor_without_rows_is_refused() -> None:
    target = Adapter(Flat().double(), {"text": "words"})
    expected = r"a row for each of 3 losses at the site of 'text', got a tensor of \(15, 8\); .* Site\(…, rows=…\)"
    refused(target, toy_batch(), expected, error=ShapeError)
    owned = Adapter(target.model, {"text": Site("words", rows=lambda batch: torch.arange(3).repeat_interleave(5))})
    assert attack(owned, toy_batch(), "text")["text"].shape == (15, 8)


class Mean(Flat):
    """Its loss is a scalar, as that of transformers' models."""

    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        found = super().finish(hidden, labels)
        return {**found, "loss": found["loss"].mean()}


def test_with_a_scalar_loss_the_logits_tell_how_many_samples_there_are() -> None:
    target = Adapter(Mean().double(), {"text": "words"})
    refused(target, toy_batch(), r"a row for each of 3 rows of logits at .* of \(15, 8\)", error=ShapeError)
    unread = Adapter(target.model, {"text": "words"}, logits=lambda outputs: read_logits({}))
    assert attack(unread, toy_batch(), "text")["text"].shape == (15, 8)  # nothing tells


# --- activation checkpointing ---


def region(use_reentrant: bool, *, nested: bool = False) -> type[ToyModel]:
    class Region(Pooled):
        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            inner = super().embed
            if nested:
                inner = partial(checkpoint, inner, use_reentrant=use_reentrant)
            return checkpoint(lambda *x: inner(*x).tanh(), ids, regions, use_reentrant=use_reentrant)

    return Region


class Plain(Pooled):
    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        return super().embed(ids, regions).tanh()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch's own, of the clean pass
@pytest.mark.parametrize("regularizer", [None, SymmetricKL()], ids=["alone", "with a clean pass"])
def test_a_site_in_a_reentrant_region_is_refused(regularizer: Any) -> None:
    target = adapted(region(True))
    expected = (
        r"a graph to be recorded .* but activation checkpointing with use_reentrant=True runs it; .*use_reentrant=Fal"
    )
    for call in (attack, partial(train, regularizer=regularizer)):
        with pytest.raises(SiteError, match=expected):
            call(target, toy_batch())


@pytest.mark.parametrize("regularizer", [None, SymmetricKL()], ids=["alone", "with a clean pass"])
@pytest.mark.parametrize("nested", [False, True], ids=["one", "nested"])
def test_a_site_in_a_region_that_is_not_reentrant_changes_nothing(nested: bool, regularizer: Any) -> None:
    plain, target = adapted(Plain), adapted(region(False, nested=nested))
    close(attack(target, toy_batch()), attack(plain, toy_batch()))
    close(train(target, toy_batch(), regularizer=regularizer), train(plain, toy_batch(), regularizer=regularizer))


def test_a_backward_in_an_injection_recomputes_under_its_perturbation() -> None:
    found = []
    for kind in (Plain, region(False)):
        target = adapted(kind)
        with target.inject({"text": torch.ones(3, 5, 8, dtype=torch.float64)}):
            target.model(**toy_batch())["loss"].sum().backward()
        found.append(gradients(target))
    close(found[1], found[0])


def test_a_shared_module_does_not_hinder_the_checkpointing_of_another() -> None:
    class Both(Tied):
        def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
            words = torch.cat([self.words(ids), self.words(ids)], 1)
            return torch.cat([words, checkpoint(lambda x: self.project(x).tanh(), regions, use_reentrant=False)], 1)

    target = Adapter(Both().double(), toy_sites() | {"text": Site("words", firing=0)})
    assert train(target, toy_batch())


RECENT = "ignore:`gradient_checkpointing_enable` is deprecated"  # and what follows it is not there in transformers 5.17


@pytest.mark.filterwarnings(RECENT)
@pytest.mark.parametrize("regularizer", [None, SymmetricKL()], ids=["alone", "with a clean pass"])
@pytest.mark.parametrize("maximizer", [FreeLB(2), PGD(2)], ids=["FreeLB", "PGD"])
@pytest.mark.parametrize("site", [WORDS, "bert.encoder.layer.0", "bert.encoder.layer.1.intermediate:input"])
def test_gradient_checkpointing_of_transformers_changes_nothing(site: str, maximizer: Any, regularizer: Any) -> None:
    found = []
    for checkpoints in (False, True):
        model = bert()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        target = Adapter(model.train(), {"text": site})
        AdversarialTraining(perturber("text"), maximizer, regularizer).step(target, sentences())
        found.append(gradients(target) | Attack(perturber("text"), PGD(2), train_mode=True)(target, sentences()).deltas)
    close(found[1], found[0])


@pytest.mark.filterwarnings(RECENT)
def test_reentrant_checkpointing_of_transformers_is_right_or_refused() -> None:
    """Above the site it works with what a backward of everything gives, and not with gradients of perturbations alone."""
    plain = Adapter(bert().train(), {"text": WORDS})
    model = bert().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    words, hidden = Adapter(model, {"text": WORDS}), Adapter(model, {"text": "bert.encoder.layer.0.intermediate"})
    for regularizer in (None, SymmetricKL()):
        for target in (plain, words):
            target.model.zero_grad()
        expected = train(plain, sentences(), "text", regularizer=regularizer)
        close(train(words, sentences(), "text", regularizer=regularizer), expected)
    alone = (
        r"expected activation checkpointing that gives gradients of perturbations alone, got .*use_reentrant=True above"
    )
    with pytest.raises(SiteError, match=alone):
        Attack(perturber("text"), PGD(1), train_mode=True)(words, sentences())
    with pytest.raises(SiteError, match=alone):
        AdversarialTraining(perturber("text"), PGD(1)).step(words, sentences())
    with pytest.raises(SiteError, match="activation checkpointing with use_reentrant=True runs it"):
        train(hidden, sentences(), "text")


# --- what a diagnosis leaves behind ---


class Watched(Skips):
    """Counts its forwards, and changes what a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.forwards = nn.BatchNorm1d(8), nn.Dropout(0.5), 0

    def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        self.forwards += 1
        return super().finish(self.dropout(self.norm(hidden.mean(1))).unsqueeze(1), labels)


class WatchedUnused(Watched):
    def embed(self, ids: Tensor, regions: Tensor) -> Tensor:
        self.words(ids).detach()
        return super().embed(ids, regions)


@pytest.mark.parametrize("kind", [Watched, WatchedUnused], ids=["silent", "independent"])
def test_a_diagnosis_runs_the_model_once_more_and_leaves_it_as_a_forward_would(kind: type[Watched]) -> None:
    states = []
    for diagnoses in (False, True):
        target = adapted(kind)
        torch.manual_seed(1)
        if diagnoses:
            with pytest.raises(SiteError):
                train(target, toy_batch(), "text")
            assert target.model.forwards == 2
        else:
            target.model(**toy_batch())
        flags = [parameter.requires_grad for parameter in target.model.parameters()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.model.modules())
        states.append((torch.get_rng_state().tolist(), flags, hooks, target.model.norm.running_mean.tolist()))
    assert states[0] == states[1]


@pytest.mark.parametrize("kind", [Watched, WatchedUnused], ids=["silent", "independent"])
def test_among_processes_nothing_is_run_again(kind: type[Watched]) -> None:
    """Where the others have not failed, a forward might wait for them for ever."""
    target = adapted(kind)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(SiteError, match=r"was not called; see|lost between the site and the loss"):
            train(target, toy_batch(), "text")
    finally:
        dist.destroy_process_group()
    assert target.model.forwards == 1


def test_a_diagnosis_that_fails_hides_nothing() -> None:
    class Once(Watched):
        def finish(self, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
            if self.forwards:
                raise ZeroDivisionError
            return super().finish(hidden, labels)

    with pytest.raises(
        SiteError, match=r"'text' \(words\) to fire in a forward, but it did not: 'words' .* not called; see"
    ):
        train(adapted(Once), toy_batch(), "text")


# --- masks the wrong way round ---


@pytest.mark.parametrize("length", [5, 1], ids=["padded", "unpadded"])
def test_an_inverted_mask_is_refused(length: int) -> None:
    sites = toy_sites()
    sites["text"] = Site("words", mask=lambda batch: ~batch["mask"])
    target = Adapter(ToyModel().double(), sites)
    batch = toy_batch(rows=3 if length > 1 else 1)
    assert bool(batch["mask"].all()) is (length == 1)
    refused(target, batch, "got only masked ones; for a key_padding_mask pass ~mask", "text")


def test_a_mask_may_leave_out_what_matters_and_a_modality_may_be_absent() -> None:
    """Only some words are to be perturbed; or no row of this batch has a region, and so none matters."""
    sites = toy_sites()
    sites["text"] = Site("words", mask=lambda batch: batch["mask"] & (torch.arange(5) == 1))
    target, batch = Adapter(ToyModel().double(), sites), toy_batch()
    batch["region_mask"] = torch.zeros_like(batch["region_mask"])
    found = attack(target, batch)
    assert found["text"][:, 1].any(1).all()
    assert not found["text"][:, [0, 2, 3, 4]].any()
    assert not found["image"].any()
    assert target.masks_verified == {"text"}  # of the other it is not known yet


# --- calls, and what judges ---


def test_fields_that_the_model_does_not_take_are_named() -> None:
    refused(
        toy(),
        toy_batch() | {"further": 1},
        "unexpected keyword argument 'further'; pass call=",
        error=ConfigurationError,
    )
    lacking = {name: value for name, value in toy_batch().items() if name != "labels"}
    refused(toy(), lacking, "required positional argument: 'labels'; pass call=", error=ConfigurationError)


def test_an_error_of_the_models_own_is_left_alone() -> None:
    class Odd(ToyModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise TypeError("an int and a list")

    with pytest.raises(TypeError, match="an int and a list"):
        attack(adapted(Odd), toy_batch())


@pytest.mark.parametrize(
    "correct",
    [
        lambda outputs, batch: 1.0,
        lambda outputs, batch: batch["labels"],
        lambda outputs, batch: batch["labels"][:1] == 0,
    ],
    ids=["no tensor", "no bool", "too few"],
)
def test_verdicts_that_are_not_one_a_row_are_refused(correct: Any) -> None:
    attacking = Attack(perturber("text"), PGD(2), correct=correct)
    with pytest.raises(ShapeError, match=r"one verdict for each of 3 rows, a bool tensor \(B,\)"):
        attacking(toy(), toy_batch())
