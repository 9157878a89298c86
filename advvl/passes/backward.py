"""Backwards: a pass is differentiated with respect to its perturbations alone, or to everything that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from advvl.adapters.diagnosis import NON_REENTRANT, is_reentrant, why_independent, why_second_backward
from advvl.adapters.positions import matters
from advvl.errors import ConfigurationError, SiteError
from advvl.passes.forward import Pass, Passes
from advvl.passes.scaling import scaled, scaled_whole

Backward = Callable[[Tensor], object]


def input_gradients(objective: Tensor, run: Pass, passes: Passes, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """The gradients of an objective with respect to the perturbations of its pass alone; parameters get none.

    A backward in fp16 is run at a loss scale that suits each row, since no scaler of the caller's reaches it.

    Raises:
        SiteError: the objective does not depend on one of them; activation checkpointing with `use_reentrant=True`,
            which cannot give the gradients of some tensors only.
        ConfigurationError: it depends on nothing.
    """
    if not run.leaves:
        return {}
    _check_differentiable(objective, run, passes)
    leaves, scales = run.leaves, _in_half(run, passes)

    def differentiate(scale: float = 1.0) -> tuple[Tensor | None, ...]:
        given = None if scale == 1 else torch.full_like(objective, scale)
        return torch.autograd.grad(
            objective, list(leaves.values()), given, retain_graph=retain_graph or scales, allow_unused=True
        )

    with _explained(objective, passes):
        found = scaled(differentiate, run.places, most=_most(objective)) if scales else differentiate()
    return all_found(dict(zip(leaves, found, strict=True)), run, passes)


def weight_gradients(total: Tensor, weights: Mapping[str, Tensor], run: Pass, passes: Passes) -> dict[str, Tensor]:
    """The gradients of `total` with respect to those of these weights that it depends on; `.grad` is not changed.

    A backward in fp16 is run at a loss scale that suits each weight.

    Raises:
        SiteError, ConfigurationError: as `input_gradients`.
    """
    _check_differentiable(total, run, passes)
    scales = _in_half(run, passes)

    def differentiate(scale: float = 1.0) -> tuple[Tensor | None, ...]:
        given = None if scale == 1 else torch.full_like(total, scale)
        return torch.autograd.grad(total, list(weights.values()), given, retain_graph=scales, allow_unused=True)

    with _explained(total, passes):
        found = scaled_whole(differentiate, len(weights), most=_most(total)) if scales else differentiate()
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def _in_half(run: Pass, passes: Passes) -> bool:
    """True if part of a pass's backward is in fp16, by its weights or by autocast at a site or, by the logits, after it."""
    if passes.in_half or passes.autocasts_to_half:
        return True
    logits = passes.logits_if_any(run.outputs)
    return logits is not None and logits.dtype == torch.float16


def _most(objective: Tensor) -> float:
    """The largest scale of an objective that its own dtype holds."""
    return 2.0**15 if objective.dtype == torch.float16 else 2.0**100


def accumulate(total: Tensor, backward: Backward | None, run: Pass, passes: Passes) -> Tensor | None:
    """Accumulate the gradients of `total` into every leaf's `.grad`, by the caller's backward if there is one.

    Returns:
        The factor by which that scaled the gradients, read from a zero leaf added to `total`; None for 1.

    Raises:
        SiteError: the caller's backward differentiates nothing.
        ConfigurationError: nothing is to be differentiated.
    """
    _check_differentiable(total, run, passes)
    if backward is None:
        with _explained(total, passes):
            total.backward()  # type: ignore[no-untyped-call]
        return None
    unit = torch.zeros_like(total, requires_grad=True)
    with _explained(total, passes):
        backward(total + unit)
    if unit.grad is None:
        raise SiteError(
            "expected backward to differentiate the loss it was given, but it did not; call backward() on it or a multiple"
        )
    return unit.grad


def all_found(gradients: Mapping[str, Tensor | None], run: Pass, passes: Passes) -> dict[str, Tensor]:
    """The gradients of a pass; each must exist, and not only at masked positions.

    Raises:
        SiteError: one does not.
    """
    complete, verified = {}, passes.adapter.masks_verified
    for modality, gradient in gradients.items():
        if gradient is None:
            raise SiteError(
                f"expected the loss to depend on the perturbation of {modality!r}, but it does not: "
                f"{_why_independent(run, modality, passes)}"
            )
        complete[modality] = gradient
        if modality not in verified and matters(modality, run.places[modality], gradient):
            verified.add(modality)
    return complete


@contextmanager
def _explained(objective: Tensor, passes: Passes) -> Iterator[None]:
    """Translate torch's errors of a backward into their meaning here."""
    try:
        yield
    except RuntimeError as error:
        if is_reentrant(objective):
            raise SiteError(
                "expected activation checkpointing that gives gradients of perturbations alone, got use_reentrant=True"
                f" above a site; {NON_REENTRANT}"
            ) from error
        if reason := why_second_backward(error, passes.adapter.model, passes.batch):
            raise ConfigurationError(reason) from error
        raise


def _check_differentiable(objective: Tensor, run: Pass, passes: Passes) -> None:
    if objective.requires_grad:
        return
    expected = "expected a loss that requires grad, got one that"
    for modality, leaf in run.leaves.items():
        if leaf.requires_grad:
            why = _why_independent(run, modality, passes)
            raise ConfigurationError(f"{expected} does not depend on the perturbation of {modality!r}: {why}")
    raise ConfigurationError(
        f"{expected} does not; let a parameter require grad, and compute the loss without detach, item or no_grad"
    )


def _why_independent(run: Pass, modality: str, passes: Passes) -> str:
    """The reason why the loss does not depend on a modality's perturbation, once that is known."""
    leaf = run.leaves[modality].detach().requires_grad_()
    return why_independent(
        passes.adapter.model, leaf, lambda: passes.task(passes.forward({modality: leaf}, wants=True))[1]
    )
