"""References and readouts: other weights that run once a round without a graph, and tensors other than logits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.plain import agree, agree_on_gradients, gradients_of, pixel_net, pixels, word_net, words
from support.toy import toy, toy_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, CLIPTextConfig, CLIPTextModel

from advvl import (
    KL,
    L2,
    PGD,
    Adapter,
    AdapterOff,
    AdversarialTraining,
    Ascent,
    Attack,
    Averaged,
    EmbeddingPerturber,
    FreeAT,
    FreeLB,
    Frozen,
    Objective,
    PassTrace,
    Reference,
    Site,
    SquaredDistance,
    SymmetricKL,
    adapt,
)
from advvl.errors import ConfigurationError, ShapeError, SiteError
from advvl.runtime.descriptions import described


def perturber(modality: str = "image") -> EmbeddingPerturber:
    return EmbeddingPerturber(**{modality: Ascent(L2(0.5), step_size=0.2)})


def drift(model: nn.Module, scale: float = 0.1) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[bool]]:
    """For each forward of a model within: whether a graph was recorded."""
    seen: list[bool] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(torch.is_grad_enabled()))
    yield seen
    handle.remove()


def symmetric(p: Tensor, q: Tensor) -> Tensor:
    return ((p.softmax(1) - q.softmax(1)) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()


# ---- a reference runs once a round, without a graph --------------------------------------------------------------------


@pytest.mark.parametrize("maximizer", [FreeLB(3), PGD(4)], ids=["FreeLB", "PGD"])
def test_a_reference_costs_one_forward_and_no_graph(maximizer: Any) -> None:
    """Whatever asks for it: regularisers that share it, on perturbed passes and on the clean one."""
    target, reference = pixel_net(), Frozen.copy_of(pixel_net().model)
    given: list[bool] = []

    class Seen(SymmetricKL):
        def __call__(self, clean: Tensor, perturbed: Tensor, mask: Tensor | None = None) -> Tensor:
            given.append(clean.requires_grad)
            return super().__call__(clean, perturbed, mask)

    shared = (
        Seen(reference=reference),
        Seen(reference=reference, reads=lambda out: out["features"]),
        Seen(reference=reference, reads="mix"),
        Seen(reference=reference, on="clean"),
    )
    with forwards(target.model) as ours, forwards(reference.frozen) as theirs:
        AdversarialTraining(perturber(), maximizer, shared).step(target, pixels())
    plain = pixel_net()
    with forwards(plain.model) as without:
        AdversarialTraining(perturber(), maximizer, SymmetricKL()).step(plain, pixels())
    assert theirs == [False]
    assert len(ours) == len(without)
    assert given
    assert not any(given)
    assert all(parameter.grad is None for parameter in reference.frozen.parameters())


def test_no_clean_pass_is_run_where_only_references_are_looked_at() -> None:
    target = pixel_net()
    method = AdversarialTraining(perturber(), FreeLB(3), KL(reference=Frozen.copy_of(target.model)))
    with forwards(target.model) as ours:
        method.step(target, pixels())
    assert ours == [True] * 3


def test_every_round_has_its_reference() -> None:
    """FreeAT updates after every replay, and the average moves with the weights."""
    target = pixel_net()
    average = Averaged(target.model, decay=0.5)
    method = AdversarialTraining(perturber(), FreeAT(3, carry=False), KL(reference=average))
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.1)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        average.update(target.model)

    with forwards(average.average.module) as theirs:
        method.step(target, pixels(), update=update)
    assert theirs == [False] * 3


def test_two_references_run_one_each() -> None:
    target = pixel_net()
    first, second = Frozen.copy_of(target.model), Frozen.copy_of(target.model)
    with forwards(first.frozen) as one, forwards(second.frozen) as two:
        AdversarialTraining(perturber(), FreeLB(2), (KL(reference=first), KL(reference=second))).step(target, pixels())
    assert (one, two) == ([False], [False])


def test_a_teacher_in_train_mode_keeps_its_buffers_and_its_mode() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 5)).double()
    target = pixel_net(call=lambda model, batch: model(batch["x"]) if model is teacher else model(**batch))
    before = copy.deepcopy(teacher.state_dict())
    method = AdversarialTraining(perturber(), FreeLB(2), KL(reference=Frozen(teacher)))
    method.step(target, pixels())
    assert teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


class Centred(nn.Module):
    """The user's own wrapper, which computes: only its name is that of DDP's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.register_buffer("mean", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.module(x - self.mean, y)


@pytest.mark.parametrize("make", [Frozen.copy_of, Averaged])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["bare", "in-parallel"])
def test_a_copy_computes_all_that_the_model_does(make: Any, wrap: Any) -> None:
    wrapped = wrap(Centred(pixel_net().model))
    reference = make(wrapped)
    with torch.no_grad(), reference.model(wrapped) as copied:
        agree(copied(**pixels())["logits"], wrapped(**pixels())["logits"])
        assert isinstance(copied, Centred)


# ---- against a plain loop ----------------------------------------------------------------------------------------------


READS: dict[str, tuple[Any, Callable[[dict[str, Tensor]], Tensor]]] = {
    "logits": (None, lambda out: out["logits"]),
    "callable": (lambda out: out["features"], lambda out: out["features"]),
    "module": ("dropout", lambda out: out["features"]),
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "clean"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_read_is_what_is_compared(reads: str, frozen: bool, dropout: float) -> None:
    """The task + the squared distance of what is read from a frozen copy's, or from the clean pass's: FreeLB's K passes."""
    batch, steps, weight = pixels(), 3, 1.5
    ours, theirs = pixel_net(dropout=dropout), pixel_net(dropout=dropout).model
    readout, plainly = READS[reads]
    original = plainly(pixel_net().model.eval()(**batch)).detach()
    distance = SquaredDistance(weight, reads=readout, reference=Frozen.copy_of(ours.model) if frozen else None)
    drift(ours.model)
    drift(theirs)
    torch.manual_seed(7)
    passes: list[PassTrace] = []
    AdversarialTraining(perturber(), FreeLB(steps), distance).step(ours, batch, trace=passes.append)

    torch.manual_seed(7)
    clean = original if frozen else plainly(theirs(**batch))
    delta, total = torch.zeros_like(batch["x"]), torch.zeros((), dtype=torch.float64)
    for seen in [one for one in passes if one.modalities]:
        agree(seen.deltas["image"], delta, least=1.0)
        leaf = delta.clone().requires_grad_()
        outputs = theirs(**batch, delta=leaf)
        loss = outputs["loss"] + weight * (plainly(outputs) - clean).square().sum(1).mean()
        total = total + loss / steps
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        delta = delta + 0.2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = delta * (0.5 / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    agree_on_gradients(ours.model, gradients_of(total, theirs))


def test_a_penalty_on_the_clean_pass_is_taught_once_a_round() -> None:
    batch, ours, theirs = pixels(), pixel_net(), pixel_net().model
    reference = Frozen.copy_of(ours.model)
    original = theirs(**batch)["logits"].detach()
    drift(ours.model)
    drift(theirs)
    method = AdversarialTraining(perturber(), FreeLB(3), SymmetricKL(2.0, reference=reference, on="clean"))
    report = method.step(ours, batch)
    without = pixel_net()
    drift(without.model)
    AdversarialTraining(perturber(), FreeLB(3)).step(without, batch)
    penalty = 2.0 * symmetric(theirs(**batch)["logits"], original)
    agree(report.regularization, penalty.detach())
    expected = gradients_of(penalty, theirs)
    for name, parameter in without.model.named_parameters():
        expected[name] = expected[name] + parameter.grad  # type: ignore[operator]
    agree_on_gradients(ours.model, expected)


# ---- an average of the weights -----------------------------------------------------------------------------------------


def test_an_average_is_its_formula_from_the_first_update_and_survives_a_checkpoint() -> None:
    target = pixel_net()
    average = Averaged(target.model, decay=0.7)
    formula = {name: p.detach().clone() for name, p in target.model.named_parameters()}
    method = AdversarialTraining(perturber(), FreeLB(2), SymmetricKL(5.0, reference=average))
    optimizer = torch.optim.SGD(target.model.parameters(), lr=0.5)
    for step in range(3):
        method.step(target, pixels(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        average.update(target.model)
        for name, parameter in target.model.named_parameters():
            formula[name] = 0.7 * formula[name] + 0.3 * parameter.detach()
    with average.model(target.model) as model:
        for name, ours in model.named_parameters():
            agree(ours.detach(), formula[name])
            assert not ours.requires_grad
        assert not model.training

    restored = Averaged(pixel_net().model, decay=0.7)
    restored.load_state_dict(copy.deepcopy(average.state_dict()))
    drift(target.model)
    for one in (average, restored):
        one.update(target.model)
    for ours, theirs in zip(average.average.parameters(), restored.average.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("positions", torch.arange(600))
        self.register_buffer("open", torch.tensor([True, False]))


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.9, 0.999])
def test_buffers_of_numbers_are_averaged_and_counts_and_flags_taken_as_they_are(decay: float) -> None:
    model = Counting()
    average = Averaged(model, decay)
    for _ in range(3):
        model.norm(torch.randn(8, 3) + 5)
        average.update(model)
    model.open.logical_not_()
    before, now = average.average.module.norm.running_mean.clone(), model.norm.running_mean
    average.update(model)
    ours = average.average.module
    torch.testing.assert_close(ours.norm.running_mean, decay * before + (1 - decay) * now)
    for name in ("norm.num_batches_tracked", "positions", "open"):
        assert torch.equal(ours.get_buffer(name), model.get_buffer(name)), name


def test_averages_of_other_decays_are_described_otherwise() -> None:
    model = pixel_net().model
    texts = [described(SymmetricKL(reference=Averaged(model, decay))) for decay in (0.9, 0.999, 0.9)]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a decay in \[0, 1\)"):
        Averaged(pixel_net().model, decay=decay)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_model_of_other_parameters_is_not_averaged() -> None:
    """Torch pairs parameters by their order, and leaves out those without a partner."""
    average = Averaged(bert())
    with pytest.raises(ConfigurationError, match=r"the model that is averaged, got one of other parameters"):
        average.update(lora(bert(), target_modules=["query"]))
    average = Averaged(pixel_net().model)
    with pytest.raises(ConfigurationError, match=r"the model that is averaged, got one of other parameters"):
        average.update(nn.Sequential(nn.Conv2d(3, 6, 2, 2).double()))


# ---- a PEFT adapter switched off ---------------------------------------------------------------------------------------


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(**config, vocab_size=20, num_labels=3)).double()


def clip_text() -> nn.Module:
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return CLIPTextModel(CLIPTextConfig(**config, vocab_size=20, bos_token_id=1, eos_token_id=2)).double()


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """An adapter that does something, half of it frozen by the user."""
    tuned = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, **options))
    learning = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.3 * torch.randn_like(parameter))
    learning[0].requires_grad_(False)
    return tuned


TUNED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Tensor], Any]] = {
    "bert": (
        bert,
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        {
            "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
            "labels": torch.tensor([0, 2]),
        },
        SymmetricKL,
    ),
    "clip": (
        clip_text,
        {"target_modules": ["q_proj", "v_proj"]},
        {
            "input_ids": torch.tensor([[1, 4, 5, 2], [1, 8, 2, 2]]),
            "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
        },
        lambda **options: SquaredDistance(reads=lambda out: out.pooler_output, **options),
    ),
}


def added(model: nn.Module, **options: Any) -> nn.Module:
    """As `lora`, by transformers' own `add_adapter`, which puts no PEFT model around it."""
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.1, **options))  # type: ignore[operator]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.3 * torch.randn_like(parameter))
    learning[0].requires_grad_(False)
    return model


def state_of(model: nn.Module) -> list[Any]:
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    modes = [(name, part.training, getattr(part, "disable_adapters", None)) for name, part in model.named_modules()]
    return [flags, modes]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("lora", [lora, added], ids=["PEFT model", "add_adapter"])
def test_an_adapter_switched_off_is_the_base_model_without_a_second_copy(lora: Any, kind: str) -> None:
    make, options, batch, regularizer = TUNED[kind]
    found = []
    for reference in (AdapterOff(), Frozen(make().eval())):
        tuned = lora(make(), **options).train()
        before, alive = state_of(tuned), set[int]()
        parameters = {id(parameter) for parameter in tuned.parameters()}
        method = AdversarialTraining(
            perturber("text"), PGD(2), regularizer(reference=reference), teach=Objective(task=0)
        )
        known = _parameters_alive()
        with reference.model(tuned) as used:
            used(**batch)
            alive = _parameters_alive() - known
        torch.manual_seed(7)
        report = method.step(tuned, batch)
        found.append((report.loss, {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}))
        assert state_of(tuned) == before
        if isinstance(reference, AdapterOff):
            assert not alive
            assert {id(parameter) for parameter in used.parameters()} == parameters
    (ours, our_gradients), (theirs, their_gradients) = found
    agree(ours, theirs)
    assert ours > 0
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        agree(our_gradients[name], gradient)


def _parameters_alive() -> set[int]:
    return {id(one) for one in gc.get_objects() if type(one) is nn.Parameter}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("lora", [lora, added], ids=["PEFT model", "add_adapter"])
def test_an_adapter_is_on_again_after_an_exception(lora: Any) -> None:
    make, options, batch, regularizer = TUNED["bert"]
    tuned = lora(make(), **options).train()
    before = state_of(tuned)

    def fails(model: nn.Module, given: Any) -> Any:
        if not model.training:
            raise KeyError("in the reference")
        return model(**given)

    target = adapt(tuned, call=fails)
    method = AdversarialTraining(perturber("text"), FreeLB(2), regularizer(reference=AdapterOff()))
    with pytest.raises(KeyError, match="in the reference"):
        method.step(target, batch)
    assert state_of(tuned) == before


@pytest.mark.parametrize("saved", [[], ["classifier"]], ids=["lora", "with a module trained whole"])
def test_layers_of_an_adapter_that_the_user_switched_off_stay_off(saved: list[str]) -> None:
    make, options, batch, _ = TUNED["bert"]
    tuned: Any = added(make(), **options, modules_to_save=saved).eval()
    layers: Any = [part for part in tuned.modules() if isinstance(getattr(part, "disable_adapters", None), bool)]
    layers[0].enable_adapters(False)
    before, on = state_of(tuned), tuned(**batch).logits
    with AdapterOff().model(tuned):
        assert all(layer.disable_adapters for layer in layers)
        agree(tuned(**batch).logits, make().eval()(**batch).logits)
    assert state_of(tuned) == before
    agree(tuned(**batch).logits, on)


def test_without_an_adapter_there_is_nothing_to_switch_off() -> None:
    method = AdversarialTraining(perturber(), FreeLB(2), KL(reference=AdapterOff()))
    with pytest.raises(ConfigurationError, match=r"expected a PEFT model for AdapterOff\(\), got PixelNet"):
        method.step(pixel_net(), pixels())


# ---- readouts: compiled, checkpointed, missing -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at one
def test_a_module_of_a_compiled_model_is_read_if_it_was_tapped_before() -> None:
    plain, found = pixel_net(), []
    distance = SquaredDistance(reads="mix")
    AdversarialTraining(perturber(), FreeLB(2), distance).step(plain, pixels())
    for early in (True, False):
        torch._dynamo.reset()
        target = pixel_net()
        if early:
            target.tap("mix")
        compiled = target.through(torch.compile(target.model, backend="eager"))
        with target.clean():
            compiled.forward(pixels())
        method = AdversarialTraining(perturber(), FreeLB(2), distance)
        if early:
            method.step(compiled, pixels())
            found.append({name: p.grad for name, p in target.model.named_parameters()})
        else:
            with pytest.raises(SiteError, match=r"module 'mix' to run in every pass, .*before torch\.compile"):
                method.step(compiled, pixels())
    for name, parameter in plain.model.named_parameters():
        agree(found[0][name], parameter.grad)


class Checkpointed(nn.Module):
    """A hidden layer in a region that is run again in the backward, under a site outside it."""

    def __init__(self, *, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        def region(h: Tensor) -> Tensor:
            return torch.tanh(self.hidden(torch.tanh(h)))

        hidden = self.first(x)
        reentrant = self.use_reentrant
        hidden = region(hidden) if reentrant is None else checkpoint(region, hidden, use_reentrant=reentrant)
        logits = self.head(hidden)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, y)}


def checkpointed(use_reentrant: bool | None) -> Adapter:
    torch.manual_seed(0)
    return Adapter(Checkpointed(use_reentrant=use_reentrant).double(), {"image": Site("first")})


RAW = {"x": torch.randn(4, 4, dtype=torch.float64), "y": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("maximizer", [FreeLB(3), PGD(2)], ids=["FreeLB", "PGD"])
def test_a_module_is_read_as_the_forward_had_it_under_activation_checkpointing(maximizer: Any) -> None:
    plain, again = checkpointed(None), checkpointed(False)
    for target in (plain, again):
        AdversarialTraining(perturber(), maximizer, SquaredDistance(reads="hidden")).step(target, RAW)
    for ours, theirs in zip(again.model.parameters(), plain.model.parameters(), strict=True):
        agree(ours.grad, theirs.grad)


def test_what_is_read_is_not_replaced_by_what_a_backward_runs_again() -> None:
    target = checkpointed(False)
    target.tap("hidden")
    with target.clean() as binding:
        outputs = target.forward(RAW)
        kept = binding.taps["hidden"]
        outputs["loss"].backward()
    assert binding.taps["hidden"] is kept


def test_a_module_that_a_reentrant_checkpoint_runs_without_a_graph_cannot_be_read() -> None:
    """Its penalty would be a number without a gradient."""
    method = AdversarialTraining(perturber(), FreeLB(3), SquaredDistance(reads="hidden"))
    with pytest.raises(SiteError, match="a graph to be recorded in the module 'hidden'"):
        method.step(checkpointed(True), RAW)


@pytest.mark.parametrize("reference", [None, "frozen"])
def test_a_module_that_does_not_run_cannot_be_read(reference: str | None) -> None:
    target = pixel_net()
    target.model.unused = nn.Linear(2, 2)
    other = Frozen.copy_of(target.model) if reference else None
    method = AdversarialTraining(perturber(), FreeLB(2), SquaredDistance(reads="unused", reference=other))
    with pytest.raises(SiteError, match="expected the module 'unused' to run in every pass, but it did not"):
        method.step(target, pixels())


@pytest.mark.parametrize(
    ("error", "reads", "said"),
    [
        (SiteError, "mixx", "expected the name of a module of PixelNet, got 'mixx'; the nearest are 'mix'"),
        (SiteError, "record", "expected a module that gives a tensor to read, got str"),
        (ConfigurationError, lambda out: list(out), "expected reads to give a tensor from the outputs, got list"),
        (
            ShapeError,
            lambda out: out["features"].mean(),
            "expected embeddings with one row or more and a last axis, got a single number",
        ),
    ],
    ids=["misspelt", "no-tensor", "list", "scalar"],
)
def test_a_readout_that_gives_no_tensor_to_compare_is_refused(error: type[Exception], reads: Any, said: str) -> None:
    class Named(nn.Module):
        def forward(self) -> str:
            return "no tensor"

    target = pixel_net(call=lambda model, batch: (model.record(), model(**batch))[1])
    target.model.record = Named()
    with pytest.raises(error, match=said):
        AdversarialTraining(perturber(), FreeLB(2), SquaredDistance(reads=reads)).step(target, pixels())


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("expected a reference for on='clean', got None", {"on": "clean"}),
        (r"expected on to be one of \('perturbed', 'clean'\), got 'both'", {"on": "both"}),
        ("expected reads as None, a module's name or a function of the outputs, got 3", {"reads": 3}),
        ("expected a reference such as .*, got PixelNet", {"reference": pixel_net().model}),
    ],
    ids=["on-clean", "on-both", "reads", "reference"],
)
def test_sides_that_make_no_sense_are_refused(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AdversarialTraining(perturber(), FreeLB(2), SymmetricKL(**options))


def test_a_frozen_reference_is_a_model() -> None:
    with pytest.raises(ConfigurationError, match=r"expected a model \(nn.Module\) to hold frozen, got Adapter"):
        Frozen(pixel_net())  # type: ignore[arg-type]


# ---- copies of an adapted model ----------------------------------------------------------------------------------------


def test_a_copy_made_in_the_middle_of_a_pass_takes_no_part_in_it() -> None:
    target, batch, copies = word_net(), words(), list[nn.Module]()
    clean = target.model(**batch)["logits"].detach()

    def loss(outputs: Any, given: Any) -> Tensor:
        copies.append(copy.deepcopy(target.model))
        return outputs["loss"]

    Attack(perturber("text"), PGD(2), loss=loss)(target, batch)
    assert len(copies) == 3
    for copied in copies:
        agree(copied(**batch)["logits"].detach(), clean)


def test_a_copy_of_an_adapted_model_is_not_perturbed_by_later_passes() -> None:
    target, batch = word_net(), words()
    reference: Reference = Frozen.copy_of(target.model)
    clean = target.model(**batch)["logits"].detach()
    delta = torch.randn(*batch["ids"].shape, 6, dtype=torch.float64)
    with target.inject({"text": delta}), reference.model(target.model) as frozen:
        perturbed = target.forward(batch)["logits"].detach()
        agree(frozen(**batch)["logits"], clean)
    assert (perturbed - clean).abs().max() > 0.01


def test_the_model_that_trains_is_no_frozen_one() -> None:
    target = toy()
    method = AdversarialTraining(
        EmbeddingPerturber(text=Ascent(L2(), step_size=0.1)), PGD(1), SymmetricKL(reference=Frozen(target.model))
    )
    with pytest.raises(ConfigurationError, match=r"expected another model to hold frozen.*Frozen\.copy_of\(model\)"):
        method.step(target, toy_batch())
    with pytest.raises(ConfigurationError, match=r"expected a model \(nn\.Module\) to copy, got Adapter"):
        Frozen.copy_of(target)  # type: ignore[arg-type]
