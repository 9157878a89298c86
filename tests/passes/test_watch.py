"""Optimisers that step inside a backward: refused where a step has several, and as good as any where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import close_gradients
from support.toy import perturber, toy, toy_batch
from torch import Tensor, nn

import advvl.passes.rounds
from advvl import KL, PGD, Adapter, AdversarialTraining, FreeLB, SymmetricKL
from advvl.errors import ConfigurationError

RATE = 0.1


def by_optimizer(parameter: nn.Parameter) -> None:
    torch.optim.SGD([parameter], lr=RATE).step()
    parameter.grad = None


def by_data(parameter: nn.Parameter) -> None:
    """Behind autograd's back, as LOMO and others do."""
    assert parameter.grad is not None
    parameter.data.sub_(RATE * parameter.grad)
    parameter.grad = None


def hooked(update: Callable[[nn.Parameter], None]) -> Adapter:
    target = toy()
    for parameter in target.model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return target


SEVERAL = {
    "FreeLB": AdversarialTraining(perturber(), FreeLB(2)),
    "VILLA": AdversarialTraining(perturber(), FreeLB(2), SymmetricKL()),
    "PGD with a clean branch": AdversarialTraining(perturber(), PGD(2), KL()),
}


@pytest.mark.parametrize("update", [by_optimizer, by_data])
@pytest.mark.parametrize("name", SEVERAL)
def test_an_update_in_a_backward_that_is_not_the_last_is_refused_by_name(name: str, update: Any) -> None:
    target = hooked(update)
    with pytest.raises(ConfigurationError, match=r"updates after a step's last backward, got '[a-z.]+' updated before"):
        SEVERAL[name].step(target, toy_batch())


def test_so_is_one_that_the_callers_backward_does() -> None:
    target = toy()
    optimizer = torch.optim.SGD(target.model.parameters(), lr=RATE)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    with pytest.raises(ConfigurationError, match="updates after a step's last backward"):
        SEVERAL["FreeLB"].step(target, toy_batch(), backward=backward)


@pytest.mark.parametrize("update", [by_optimizer, by_data])
def test_a_method_of_one_backward_goes_with_it(update: Any) -> None:
    method = AdversarialTraining(perturber(), PGD(2))
    plain, target = toy(), hooked(update)
    before = {name: parameter.detach().clone() for name, parameter in plain.model.named_parameters()}
    method.step(plain, toy_batch())
    method.step(target, toy_batch())
    taken = {name: (before[name] - parameter.detach()) / RATE for name, parameter in target.model.named_parameters()}
    close_gradients(taken, {name: parameter.grad for name, parameter in plain.model.named_parameters()})


def test_an_adapter_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, kept = [], advvl.passes.rounds.parameters_kept
    monkeypatch.setattr(advvl.passes.rounds, "parameters_kept", lambda model: looked.append(model) or kept(model))
    target = toy()
    for _ in range(3):
        SEVERAL["VILLA"].step(target, toy_batch())
        for parameter in target.model.parameters():
            torch.nn.init.normal_(parameter)  # updates between steps are as they should be
    assert looked == [target.model]
