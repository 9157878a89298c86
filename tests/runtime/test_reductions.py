"""Wrappers that reduce gradients: found wherever they are, held back, and left as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from advvl.errors import ConfigurationError
from advvl.runtime.reductions import accumulating, check_alone, check_wrappers, no_sync, one_backward


class Replicated(nn.Module):
    """As DDP is, to those who look at it from outside."""

    def __init__(self, module: nn.Module, *, static_graph: bool = False) -> None:
        super().__init__()
        self.module, self.static_graph, self.require_backward_grad_sync = module, static_graph, True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before


class Sharded(nn.Linear):
    """As FSDP2's modules are: its group of parameters may reduce scatters alone (HSDP)."""

    def __init__(self, **group: bool) -> None:
        super().__init__(2, 2)
        self.group = SimpleNamespace(**(group or {"reduce_grads": True, "all_reduce_grads": False}))

    def _get_fsdp_state(self) -> Any:
        return SimpleNamespace(_fsdp_param_groups=[self.group])

    def set_requires_gradient_sync(self, on: bool) -> None:
        self.group.reduce_grads = self.group.all_reduce_grads = on


def test_a_model_without_wrappers_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert no_sync(model) is nullcontext
    assert not one_backward(model, None)
    assert one_backward(model, nullcontext)  # of a way of the user's own nothing is known
    assert not accumulating(model)
    check_wrappers(model)
    check_alone(model)


@pytest.mark.parametrize("error", [None, ValueError])
def test_every_wrapper_is_held_back_and_left_as_found(error: type[Exception] | None) -> None:
    replicated, sharded = Replicated(nn.Linear(2, 2)), Sharded()
    model = nn.Sequential(replicated, nn.Sequential(sharded))
    with pytest.raises(error) if error else nullcontext(), no_sync(model)():
        assert not replicated.require_backward_grad_sync
        assert not sharded.group.reduce_grads
        assert accumulating(model)
        if error:
            raise error
    assert replicated.require_backward_grad_sync
    assert sharded.group.reduce_grads
    assert not sharded.group.all_reduce_grads
    assert not accumulating(model)


def test_an_accumulation_of_the_users_is_seen_and_stays() -> None:
    replicated, sharded = Replicated(nn.Linear(2, 2)), Sharded()
    for model in (nn.Sequential(replicated), nn.Sequential(sharded)):
        replicated.require_backward_grad_sync = False
        sharded.set_requires_gradient_sync(False)
        with no_sync(model)():
            pass
        assert accumulating(model)


def test_only_a_model_that_is_sharded_whole_has_a_backward_for_each_graph() -> None:
    assert not one_backward(nn.Sequential(Sharded()), None)
    assert not one_backward(Sharded(), nullcontext)
    assert one_backward(Replicated(nn.Linear(2, 2)), None)
    assert one_backward(nn.Sequential(Sharded(), Replicated(nn.Linear(2, 2))), None)


def test_parts_that_are_sharded_each_by_itself_share_a_backward() -> None:
    """The last graph alone may not reach all of them."""
    assert one_backward(nn.Sequential(Sharded(), nn.Sequential(Sharded())), None)


def test_a_static_graph_inside_the_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="without static_graph"):
        check_wrappers(nn.Sequential(Replicated(nn.Linear(2, 2), static_graph=True)))


class Engine(nn.Module):
    """As DeepSpeed's engine and FSDP1 are: it has a no_sync, and does not say whether it reduces."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        yield


def test_a_wrapper_of_another_kind_is_refused() -> None:
    for model in (Engine(nn.Linear(2, 2)), nn.Sequential(Engine(nn.Linear(2, 2)))):
        with pytest.raises(
            ConfigurationError, match=r"expected DDP or FSDP2 .*, got Engine, .*; wrap the model by one"
        ):
            check_wrappers(model)
    assert hasattr(FullyShardedDataParallel, "no_sync")
    assert not hasattr(FullyShardedDataParallel, "require_backward_grad_sync")


@pytest.mark.parametrize("wrapper", [Replicated(nn.Linear(2, 2)), Sharded()], ids=["replicated", "sharded"])
def test_a_wrapped_model_does_not_run_by_itself(wrapper: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match=f"wrapped by {type(wrapper).__name__}"):
        check_alone(nn.Sequential(wrapper))


def test_shards_of_an_unknown_kind_are_refused() -> None:
    with (
        pytest.raises(ConfigurationError, match="expected FSDP2's parameter groups to say"),
        no_sync(Sharded(other=True))(),
    ):
        pass
