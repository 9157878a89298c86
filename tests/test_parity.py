"""Parity in float64 with the published VILLA, FreeLB, LXMERT-AdvTrain and UNITER, number for number; and with torchattacks.

The optimal-transport distance is held to the exact linear programme in `test_tasks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from support import golden_cases
from support.golden_cases import batch, disagreements, document, kind, tensors
from support.golden_steps import adversarial, ball, parameter_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LxmertConfig, LxmertForQuestionAnswering

from advvl import (
    L2,
    PGD,
    Adapter,
    AdversarialTraining,
    Ascent,
    Attack,
    EmbeddingPerturber,
    FreeLB,
    Given,
    Linf,
    PassTrace,
    Site,
    Zero,
    adapt,
)
from advvl.models.lxmert.checkpoint import load_lxmert_checkpoint, original_name
from advvl.models.uniter.model import UniterConfig
from advvl.tasks.losses import vqa_losses
from advvl.tasks.lxmert.vqa import LxmertForVQA
from advvl.tasks.uniter.pretraining import UniterForPretraining
from advvl.tasks.uniter.vqa import UniterForVQA

FREELB = sorted(document("freelb_bert", "cases"))
VILLA = sorted(document("villa_vqa", "cases"))
LXMERT = sorted(document("lxmert_vqa", "cases"))


def freelb(case: str) -> dict[str, Tensor]:
    """Every tensor that the golden file of a case holds, from one step of ours."""
    options, start = document("freelb_bert", "cases")[case], tensors("freelb_bert", f"freelb_{case}")["delta_init"]
    model = BertForSequenceClassification(BertConfig(**document("freelb_bert", "config"))).double()
    model.load_state_dict(tensors("freelb_bert", "bert_cls"))
    target = adapt(model, {"text": Site("bert.embeddings.word_embeddings", mask=lambda batch: batch["attention_mask"])})
    ascent = Ascent(ball(options), step_size=options["lr"], start=Given(start), floor=1e-8)
    passes: list[PassTrace] = []
    method = AdversarialTraining(EmbeddingPerturber(text=ascent), FreeLB(options["steps"]))
    method.step(target, batch("freelb_bert"), trace=passes.append)
    found = {"delta_init": passes[0].deltas["text"]} | parameter_gradients(model)
    for step, (this, following) in enumerate(zip(passes, [*passes[1:], None], strict=True)):
        found[f"step{step}.logits"] = this.logits
        found[f"step{step}.loss"] = this.weight * this.task_loss
        if following is not None:
            found[f"step{step}.grad"] = this.weight * this.gradients["text"]
            found[f"step{step}.delta"] = following.deltas["text"]
    return found


@pytest.mark.parametrize("case", FREELB)
def test_freelb_is_the_published_loop(case: str) -> None:
    assert not disagreements(freelb(case), tensors("freelb_bert", f"freelb_{case}"))


def villa(case: str) -> dict[str, Tensor]:
    """Every tensor that the golden file of a case holds, from one step of ours."""
    options, config = document("villa_vqa", "cases")[case], document("villa_vqa", "config")
    answers = config.pop("num_answers")
    model = UniterForVQA(UniterConfig(**config), num_answers=answers).double()
    model.load_state_dict(tensors("villa_vqa", "uniter_vqa"))
    inputs = batch("villa_vqa")
    shapes = {"text": (*inputs["input_ids"].shape, config["hidden_size"]), "image": inputs["img_feat"].shape}
    return adversarial(options, adapt(model), inputs, shapes=shapes)


LXMERTS = {"task": LxmertForVQA, "transformers": LxmertForQuestionAnswering}


def lxmert(case: str, kind: str) -> dict[str, Tensor]:
    """Every tensor that the golden file of a case holds, from one step of ours; names go through the checkpoint's."""
    options, config = document("lxmert_vqa", "cases")[case], document("lxmert_vqa", "config")
    model = LXMERTS[kind](LxmertConfig(**config, num_qa_labels=config["num_answers"])).double()
    load_lxmert_checkpoint(model, golden_cases.folder("lxmert_vqa") / "lxmert_vqa.safetensors")
    inputs = batch("lxmert_vqa")
    shapes = {"text": (*inputs["input_ids"].shape, config["hidden_size"]), "image": inputs["visual_feats"].shape}
    found = adversarial(
        options,
        adapt(model),
        inputs,
        shapes=shapes,
        loss=None if kind == "task" else lambda out, given: vqa_losses(out.question_answering_score, given["targets"]),
    )
    return {
        f"grad.{original_name(name.removeprefix('grad.'), of_task=True).removeprefix('lxrt_encoder.')}"
        if name.startswith("grad.")
        else name: value
        for name, value in found.items()
        if not name.endswith((".task_loss", ".kl_loss"))  # which these files do not hold apart
    }


PUBLISHED = {
    **{f"villa-{case}": (partial(villa, case), ("villa_vqa", f"villa_{case}")) for case in VILLA},
    **{
        f"lxmert-{case}-{kind}": (partial(lxmert, case, kind), ("lxmert_vqa", f"lxmert_adv_{case}"))
        for case in LXMERT
        for kind in LXMERTS
    },
}


@pytest.mark.parametrize(("ours", "golden"), PUBLISHED.values(), ids=PUBLISHED)
def test_villas_loop_is_the_published_one(ours: Callable[[], dict[str, Tensor]], golden: tuple[str, str]) -> None:
    assert not disagreements(ours(), tensors(*golden))


@pytest.mark.parametrize("golden", sorted({golden for _, golden in PUBLISHED.values()}), ids="-".join)
def test_one_changed_number_is_seen(golden: tuple[str, str]) -> None:
    """In the tensor of each kind that has the largest entry, in no more than its last eight digits."""
    expected = tensors(*golden)
    largest = {kind(name): name for name in sorted(expected, key=lambda name: expected[name].abs().max())}
    assert {"clean_logits", "grad", "loss"} <= largest.keys()
    for name in largest.values():
        changed = expected | {name: expected[name].clone()}
        changed[name].view(-1)[changed[name].abs().argmax()] *= 1 + 1e-8
        problems = disagreements(changed, expected)
        assert [problem.partition(":")[0] for problem in problems] == [name]


TASKS = {"mlm": "mlm", "itm": "itm", "mrfr": "mrfr", "mrc": "mrc", "mrckl": "mrc-kl"}  # golden name to ours
ONLY = {  # the fields of one task or another
    "mlm": {"txt_labels"},
    "itm": {"targets"},
    "mrfr": {"img_masks", "img_mask_tgt", "feat_targets"},
    "mrc": {"img_masks", "img_mask_tgt", "label_targets"},
    "mrckl": {"img_masks", "img_mask_tgt", "label_targets"},
}


def pretraining_inputs(case: str) -> dict[str, Tensor]:
    fields, others = batch("uniter_pretrain"), set().union(*ONLY.values()) - ONLY[case]
    if "img_masks" in ONLY[case]:
        fields["img_feat"] = fields["img_feat"].masked_fill(fields["img_masks"][..., None], 0.0)
    return {name: value for name, value in fields.items() if name not in others}


def pretraining_golden(case: str) -> dict[str, Tensor]:
    """The golden tensors of a task, less its name."""
    every = tensors("uniter_pretrain", "losses")
    return {name.partition(".")[2]: value for name, value in every.items() if name.partition(".")[0] == case}


def pretraining(case: str, **options: Any) -> dict[str, Tensor]:
    """What the golden file holds of a task, from ours; gradients of the parameters that it names."""
    model = UniterForPretraining(UniterConfig(**document("uniter_pretrain", "config") | options)).double()
    model.load_state_dict(tensors("uniter_pretrain", "uniter_pretrain"))
    fields = pretraining_inputs(case)
    output = model(task=TASKS[case], **fields)
    output.loss.backward()
    found = {"loss": output.losses.detach(), "total": output.loss.detach()}
    if output.distances is not None:
        found["ot_pos"] = output.distances.detach()[fields["targets"] == 1]
        found["ot_neg"] = output.distances.detach()[fields["targets"] == 0]
    for name in pretraining_golden(case):
        if name.startswith("grad."):
            gradient = model.get_parameter(name.removeprefix("grad.")).grad
            assert gradient is not None, name
            found[name] = gradient
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", TASKS)
def test_a_pretraining_task_is_the_published_one(case: str, attention: str) -> None:
    assert not disagreements(pretraining(case, attn_implementation=attention), pretraining_golden(case))


def test_no_pretraining_tensor_is_left_out() -> None:
    assert {name.partition(".")[0] for name in tensors("uniter_pretrain", "losses")} == TASKS.keys()
    assert all(len(pretraining_golden(case)) >= 5 for case in TASKS)


@pytest.mark.parametrize("case", TASKS)
def test_a_difference_in_any_pretraining_tensor_is_seen(case: str) -> None:
    found, expected = pretraining(case), pretraining_golden(case)
    for name, value in found.items():
        off = found | {name: value + 1e-8 * value.abs().max()}
        assert len(disagreements(off, expected)) == 1
        rest = {other: tensor for other, tensor in found.items() if other != name}
        assert disagreements(rest, expected) == [f"missing {name}"]


@pytest.mark.parametrize("exists", [False, True], ids=["no-folder", "empty-folder"])
def test_without_golden_tensors_nothing_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    if exists:
        (tmp_path / "uniter_pretrain").mkdir()
    monkeypatch.setattr(golden_cases, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="uniter_pretrain"):
        pretraining("mlm")


def test_masked_features_and_their_embedding_count() -> None:
    model = UniterForPretraining(UniterConfig(**document("uniter_pretrain", "config"))).double()
    model.load_state_dict(tensors("uniter_pretrain", "uniter_pretrain"))
    fields = pretraining_inputs("mrfr")
    unmasked = {name: value for name, value in fields.items() if name != "img_masks"}
    losses = [model(task="mrfr", **batch_).losses for batch_ in (fields, unmasked)]
    assert (losses[0] - losses[1]).abs().max() > 1e-3
    torch.testing.assert_close(losses[0], pretraining_golden("mrfr")["loss"], rtol=1e-11, atol=1e-11)


def convnet() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    return nn.Sequential(*layers).double().eval()


def uniform_start(images: Tensor, eps: float) -> Tensor:
    return torch.empty_like(images).uniform_(-eps, eps)


def spherical_start(images: Tensor, eps: float) -> Tensor:
    direction = torch.empty_like(images).normal_()
    length = direction.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return direction * (torch.zeros_like(length).uniform_(0, 1) / length * eps)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("random_start", [True, False], ids=["random", "zero"])
@pytest.mark.parametrize(
    ("theirs", "ball", "rule", "eps", "alpha", "begin"),
    [
        pytest.param(torchattacks.PGD, Linf, "sign", 8 / 255, 2 / 255, uniform_start, id="PGD"),
        pytest.param(torchattacks.PGD, Linf, "sign", 0.7, 0.3, uniform_start, id="PGD-into-the-box"),
        pytest.param(torchattacks.PGDL2, L2, "normalised", 0.5, 0.2, spherical_start, id="PGDL2"),
        pytest.param(torchattacks.PGDL2, L2, "normalised", 9.0, 3.0, spherical_start, id="PGDL2-into-the-box"),
    ],
)
def test_pgd_on_pixels_is_that_of_torchattacks(
    theirs: type,
    ball: type[L2] | type[Linf],
    rule: str,
    eps: float,
    alpha: float,
    begin: Callable[[Tensor, float], Tensor],
    random_start: bool,
    seed: int,
) -> None:
    model = convnet()
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (6,), generator=generator)
    torch.manual_seed(seed)
    expected = theirs(model, eps=eps, alpha=alpha, steps=5, random_start=random_start)(images, labels)
    torch.manual_seed(seed)
    start = Given(begin(images, eps)) if random_start else Zero()
    target = Adapter(
        model,
        {"image": Site("", at="input")},
        loss=lambda outputs, batch: F.cross_entropy(outputs, labels, reduction="none"),
    )
    ascent = Ascent(ball(eps), step_size=alpha, start=start, rule=rule, box=(0.0, 1.0))
    delta = Attack(EmbeddingPerturber(image=ascent), PGD(5))(target, images).deltas["image"]
    assert delta.any()
    torch.testing.assert_close(images + delta, expected, rtol=1e-6, atol=1e-8)  # they add 1e-10 to norms
    assert ((images + delta >= 0) & (images + delta <= 1)).all()
