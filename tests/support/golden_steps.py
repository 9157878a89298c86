"""One step of ours on a golden case, named as the golden files name its tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from advvl import (
    L2,
    Adapter,
    AdversarialTraining,
    Ascent,
    Ball,
    EmbeddingPerturber,
    FreeLB,
    Given,
    Linf,
    PassTrace,
    Start,
    SymmetricKL,
    Zero,
    adapt,
)
from advvl.models.uniter.config import UniterConfig
from advvl.models.uniter.task import UniterTask
from support.golden_cases import disagreements, kind


def ball(case: dict[str, Any]) -> Ball:
    radius = case["max_norm"] or math.inf
    return L2(radius) if case["norm"] == "l2" else Linf(radius)


def parameter_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


def adversarial(
    options: dict[str, Any],
    target: Adapter,
    inputs: dict[str, Tensor],
    *,
    shapes: dict[str, Any] | None = None,
    loss: Any = None,
    kl_share: float = 1.0,
) -> dict[str, Any]:
    """What the golden file of a case of VILLA's loop holds, from one step of ours; gradients under the model's names.

    Arguments:
        shapes: of the perturbations, where there is one step.
        kl_share: of J that the published loop takes.
    """
    shapes = shapes or {}
    in_turn = options["modality"] == "alter"
    modalities = ("text", "image") if options["modality"] in ("both", "alter") else (options["modality"],)
    starts: dict[str, Start] = {
        # one step from Zero() is refused, since it would be clean; a case may have it all the same
        m: Zero() if options["steps"] > 1 else Given(torch.zeros(shapes[m], dtype=torch.float64))
        for m in modalities
    }
    perturber = EmbeddingPerturber(
        **{m: Ascent(ball(options), step_size=options[f"lr_{m}"], start=starts[m], floor=1e-8) for m in modalities}
    )
    method = AdversarialTraining(
        perturber,
        FreeLB(options["steps"], "in turn" if in_turn else "together"),
        SymmetricKL(kl_share * options["kl_weight"]),
    )
    passes: list[PassTrace] = []
    method.step(target, inputs, loss=loss, trace=passes.append)

    found: dict[str, Any] = {"clean_logits": passes[0].logits} | parameter_gradients(target.model)
    turns = len(modalities) if in_turn else 1
    for step in range(options["steps"]):
        group = passes[1 + step * turns : 1 + (step + 1) * turns]
        following = passes[1 + (step + 1) * turns :]
        for seen in group:
            found[f"step{step}.logits" + (f"_{seen.modalities[0]}" if in_turn else "")] = seen.logits
            found |= {f"step{step}.{m}_grad": seen.weight * g for m, g in seen.gradients.items()}
        for seen in following[:turns]:
            found |= {f"step{step}.{m}_delta": d for m, d in seen.deltas.items()}
        found[f"step{step}.task_loss"] = sum(seen.task_loss for seen in group)
        found[f"step{step}.kl_loss"] = sum(seen.regularization for seen in group) / options["kl_weight"]
        found[f"step{step}.loss"] = sum(seen.weight * (seen.task_loss + seen.regularization) for seen in group)
    return found


def shapes_of(config: UniterConfig, inputs: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the perturbations of a UNITER."""
    return {"text": (*inputs["input_ids"].shape, config.hidden_size), "image": tuple(inputs["img_feat"].shape)}


def sees_one_changed_number(expected: dict[str, Tensor]) -> bool:
    """Change, in the tensor of each kind that has the largest entry, no more than its last eight digits."""
    largest = {kind(name): name for name in sorted(expected, key=lambda name: expected[name].abs().max())}
    for name in largest.values():
        changed = expected | {name: expected[name].clone()}
        changed[name].view(-1)[changed[name].abs().argmax()] *= 1 + 1e-8
        if [problem.partition(":")[0] for problem in disagreements(changed, expected)] != [name]:
            return False
    return len(largest) > 2


def step_of_task(
    options: dict[str, Any], model: UniterTask, inputs: dict[str, Tensor], *, kl_share: float = 1.0
) -> dict[str, Tensor]:
    """What the golden file of a case of a UNITER task holds, from one step of ours, adversarial or not."""
    if options["modality"] != "none":
        return adversarial(options, adapt(model), inputs, shapes=shapes_of(model.config, inputs), kl_share=kl_share)
    output = model(**inputs)
    loss = output.loss.mean()
    loss.backward()
    found = {"logits": output.logits.detach(), "losses": output.losses.detach(), "loss": loss.detach()}
    return found | parameter_gradients(model)
