"""Traced networks: the graph of a module in fp64, and a copy with the sizes of its weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn.utils import parametrize

from advvl.checks import shown
from advvl.errors import ConfigurationError, DataError, NonFiniteError

WEIGHTED: Final = (nn.Linear, nn.Conv2d)
AFFINE: Final = (*WEIGHTED, nn.AvgPool2d, nn.Flatten, nn.Identity, nn.Dropout)
"""Layers that are affine functions of what they are given."""


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """Copies of a network in fp64 and eval mode, its weights as their parametrizations give them.

    Arguments:
        network: the copy itself.
        graph: the same as a graph.
        absolute: the same with the sizes of its weights, and without biases.
        inputs: the arguments of its forward by name, `(B, …)`, in fp64.
    """

    network: nn.Module
    graph: GraphModule
    absolute: nn.Module
    inputs: Mapping[str, Tensor]


def traced_network(network: nn.Module, inputs: Mapping[str, Tensor], *, perturbed: Sequence[str]) -> TracedNetwork:
    """Trace a network, which stays as it is; see `networks.Network` for arguments and errors."""
    parameters = _checked_arguments(network, inputs, perturbed)
    wide = {name: (x.double() if x.is_floating_point() else x).detach().clone() for name, x in inputs.items()}
    defaults = {name: one.default for name, one in parameters.items() if name not in inputs}
    if not all(one.isfinite().all() for one in network.state_dict().values()):
        raise NonFiniteError(f"expected finite weights, got some in {type(network).__name__} that are not")
    _check_hooks(network)
    whole = copy.deepcopy(network).double().eval().requires_grad_(False)
    inner = _baked(copy.deepcopy(whole))
    if type(inner) in AFFINE:  # its own forward would be traced, not the layer
        inner = nn.Sequential(inner)
    try:
        graph = symbolic_trace(inner, concrete_args=defaults or None)
    except Exception as error:  # tracing runs the network's own code
        raise ConfigurationError(
            f"expected a network that torch.fx can trace, got {error}; write its forward without branches on tensors"
        ) from error
    return TracedNetwork(whole, graph, _absolute(inner), wide)


def _checked_arguments(
    network: object, inputs: Mapping[str, Tensor], perturbed: Sequence[str]
) -> Mapping[str, inspect.Parameter]:
    """Check the inputs of a network, and return the parameters of its forward."""
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"expected a network that is an nn.Module, got {shown(network)}")
    parameters = inspect.signature(network.forward).parameters
    if unknown := sorted(set(inputs) - set(parameters)):
        raise ConfigurationError(f"expected inputs among {sorted(parameters)}, got {unknown}; name the forward's own")
    if missing := sorted(set(perturbed) - set(inputs)):
        raise ConfigurationError(f"expected a budget of inputs {sorted(inputs)}, got {missing}")
    if not perturbed:
        raise ConfigurationError("expected a budget with a ball for one input or more, got none")
    if absent := sorted(_required(parameters) - set(inputs)):
        raise ConfigurationError(f"expected all inputs without a default, got none for {absent}; give them as well")
    if not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs.values()):
        raise DataError("expected inputs that are tensors with one row per example, one or more, got others")
    if integers := sorted(name for name in perturbed if not inputs[name].is_floating_point()):
        raise ConfigurationError(
            f"expected floating-point numbers to perturb, got others in {integers}; embed them first"
        )
    if len({len(x) for x in inputs.values()}) > 1:
        raise DataError(
            f"expected a row for each example in all inputs, got { ({n: len(x) for n, x in inputs.items()}) }"
        )
    return parameters


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name for name, one in parameters.items() if one.default is one.empty and one.kind in named}


def _check_hooks(network: nn.Module) -> None:
    """Refuse hooks, which the graph does not have, and forwards set on an instance."""
    for name, module in network.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if any(hooks) or "forward" in vars(module):
            raise ConfigurationError(
                f"expected a network without hooks, got one on {name or type(module).__name__!r}; "
                "remove it, or close() what adapt(…) returned"
            )


def _baked(network: nn.Module) -> nn.Module:
    """Replace parametrized weights by their values.

    Torch's own `remove_parametrizations` would take them from the original too, as a copy has the same class.
    """
    for module in list(network.modules()):
        if parametrize.is_parametrized(module):
            weights = {name: getattr(module, name) for name in cast(nn.ModuleDict, module.parametrizations)}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in weights.items():
                setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return network


def _absolute(network: nn.Module) -> nn.Module:
    """Copy a network with the sizes of its weights, and without biases."""
    absolute = copy.deepcopy(network)
    for module in absolute.modules():
        if isinstance(module, WEIGHTED):
            module.weight = nn.Parameter(module.weight.abs(), requires_grad=False)
            module.register_parameter("bias", None)
    return absolute
