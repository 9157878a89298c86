"""Networks whose outputs can be bounded: arithmetic on the graph of their affine steps and ReLUs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from advvl.errors import ConfigurationError
from advvl.evaluation.tracing import AFFINE, WEIGHTED, traced_network

_FUNCTIONS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "truediv": torch.div,
    "neg": torch.neg,
    "cat": torch.cat,
    "flatten": torch.flatten,
    "reshape": torch.Tensor.reshape,
    "view": torch.Tensor.reshape,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
    "sum": torch.sum,
    "mean": torch.mean,
}
_PRODUCTS: Final = ("mul", "div", "truediv")
_BINARY: Final = (*_PRODUCTS, "add", "sub")
_NEW: Final = (*_BINARY, "neg", "cat", "sum", "mean")
"""Steps whose result shares no memory with what they are computed from."""

_OPTIONS: Final = {"dim", "keepdim", "start_dim", "end_dim"}
_CONSTANT: Final = ("shape", "ndim", "dtype", "device")
"""Attributes of a tensor that do not vary with it."""

_SUPPORTED: Final = "Linear, Conv2d, AvgPool2d, ReLU, Flatten, +, -, * and / with constants, cat, sum, mean, reshape"


class Network:
    """A network of affine steps and ReLUs as a graph, with its constants computed.

    Arguments:
        network: any module that `torch.fx` can trace; a copy in fp64 and eval mode is kept, its weights as their
            parametrizations give them.
        inputs: the arguments of its forward by name, `(B, …)`.
        perturbed: names of those that vary.

    Raises:
        ConfigurationError: a network that cannot be traced, has hooks, or computes other outputs than its graph; a step
            on what varies that is not supported; a step in place; an unknown name.
        DataError: no examples, or inputs of other numbers of rows.
        NonFiniteError: weights that are not finite.
    """

    def __init__(self, network: nn.Module, inputs: Mapping[str, Tensor], *, perturbed: Sequence[str]) -> None:
        traced = traced_network(network, inputs, perturbed=perturbed)
        self.inputs, self._graph, self._absolute = traced.inputs, traced.graph, traced.absolute
        self.examples = len(self.inputs[perturbed[0]])
        self.placeholders: dict[str, Node] = {}
        self.affected: list[Node] = []
        self._constants: dict[Node, Any] = {}
        self.output = self._walk(set(perturbed))
        self._check_outputs(traced.network, perturbed)

    def sources(self, node: Node) -> list[Node]:
        """The tensors that vary from which one is computed."""
        return [one for one in node.all_input_nodes if one not in self._constants]

    def is_relu(self, node: Node) -> bool:
        """True for the result of a ReLU."""
        return type(self._module(node)) is nn.ReLU or _name(node) in ("relu", "relu_")

    def feeds_relu(self, node: Node) -> bool:
        """True for a tensor that goes into a ReLU."""
        return any(self.is_relu(user) for user in node.users)

    def run(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        """Compute a tensor from these values of its sources."""
        if self.is_relu(node):
            (source,) = self.sources(node)
            return values[source].clamp(min=0)
        args, options = self._arguments(node, values)
        module = self._module(node)
        return cast(
            Tensor, module(*args, **options) if module is not None else _FUNCTIONS[_name(node)](*args, **options)
        )

    def spread(self, node: Node, radii: Mapping[Node, Tensor]) -> Tensor:
        """Compute how far the entries of a tensor can move when those of its sources move by up to `radii`."""
        module, name = self._module(node), _name(node)
        if module is not None:
            args, options = self._arguments(node, radii)
            return cast(Tensor, self._absolute.get_submodule(str(node.target))(*args, **options))
        if name in _PRODUCTS:
            args, options = self._arguments(node, radii, constant=_size)
        else:
            args, options = self._arguments(node, radii, constant=lambda one: one * 0)
        if name == "neg":
            return cast(Tensor, args[0])
        return _FUNCTIONS["add" if name == "sub" else name](*args, **options)

    def back(self, node: Node, rows: Tensor) -> tuple[dict[Node, Tensor], Tensor]:
        """Carry weights `(R, B, *S)` of a tensor's entries back to its sources, by source; also the constant `(R, B)`."""
        sources = self.sources(node)
        offset = self.run(node, {one: torch.zeros_like(self.clean[one]) for one in sources})
        # A module treats every row alike, so R·B of them are one batch, which is faster; constants have B rows alone.
        repeats = len(rows) if self._module(node) is not None else 1
        with torch.enable_grad():
            zeros = {
                one: self.clean[one].new_zeros(repeats * self.examples, *self.clean[one].shape[1:]).requires_grad_()
                for one in sources
            }
            out = self.run(node, zeros)
            if repeats == len(rows):
                found = torch.autograd.grad(out, list(zeros.values()), rows.flatten(0, 1))
            else:
                found = torch.autograd.grad(out, list(zeros.values()), rows, is_grads_batched=True)
        back = {one: grad.view(len(rows), *self.clean[one].shape) for one, grad in zip(sources, found, strict=True)}
        return back, (rows * offset).flatten(2).sum(2)

    def _walk(self, perturbed: set[str]) -> Node:
        """Compute every constant, and check what varies; returns the tensor of outputs."""
        nodes = list(self._graph.graph.nodes)
        found = nodes[-1].args[0]
        output = found.get("logits") if isinstance(found, Mapping) else found
        if not isinstance(output, Node):
            raise ConfigurationError(f"expected one tensor of outputs, or one named 'logits', got {found}")
        self.clean: dict[Node, Tensor] = {}  # what varies, at the inputs as given
        wanted = _ancestors(output)
        for node in nodes:
            self._check_in_place(node)
            if node not in wanted:
                continue
            if node.op == "placeholder":
                self.placeholders[str(node.target)] = node
                value, varies = self.inputs.get(str(node.target)), node.target in perturbed
            elif any(one in self.clean for one in node.all_input_nodes) and not _is_constant(node):
                self._check_supported(node)
                value, varies = self.run(node, self.clean), True
                self._check_rows(node, value)
            else:
                value, varies = self._constant(node), False
            if varies:
                self.affected.append(node)
                self.clean[node] = cast(Tensor, value)
            else:
                self._constants[node] = value
        if output not in self.clean:
            raise ConfigurationError(f"expected outputs that depend on {sorted(perturbed)}, got some that do not")
        if self.clean[output].ndim != 2:
            raise ConfigurationError(f"expected outputs (B, K), got {tuple(self.clean[output].shape)}; pool them")
        return output

    def _constant(self, node: Node) -> Any:
        known = self._constants | self.clean  # of what varies, the shape does not
        args, options = map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._graph)
        if node.op == "call_module":
            return self._graph.get_submodule(str(node.target))(*args, **options)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **options)
        return cast(Callable[..., Any], node.target)(*args, **options)

    def _arguments(
        self, node: Node, values: Mapping[Node, Tensor], constant: Callable[[Any], Any] = lambda one: one
    ) -> tuple[Any, dict[str, Any]]:
        """The arguments of a step: the given values of what varies, and what it is joined with as `constant` makes it."""
        joins = _name(node) in (*_BINARY, "cat")  # constants of other steps are shapes and axes

        def value(one: Node) -> Any:
            if one in values:
                return values[one]
            return constant(self._constants[one]) if joins else self._constants[one]

        args, options = map_arg((node.args, node.kwargs), value)
        if _name(node) in _BINARY:
            args = tuple(constant(one) if isinstance(one, int | float) else one for one in args)
        return args, options

    def _module(self, node: Node) -> nn.Module | None:
        return self._graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _check_supported(self, node: Node) -> None:
        module, name = self._module(node), _name(node)
        varying = [one in self.clean for one in node.all_input_nodes]
        fine = (
            type(module) in (*AFFINE, nn.ReLU)  # a subclass may compute something else
            if module is not None
            else name in ("relu", "relu_") or (name in _FUNCTIONS and set(node.kwargs) <= _OPTIONS)
        )
        if isinstance(module, nn.Conv2d):
            fine = fine and module.padding_mode == "zeros"
        if name in _PRODUCTS:
            fine = fine and sum(varying) == 1 and _takes_one(node, self.clean, first=name not in ("mul", "imul"))
        if not fine:
            what = type(module).__name__ if module is not None else name
            raise ConfigurationError(f"expected a network of {_SUPPORTED}; got {what} at {node.name!r}")

    def _check_in_place(self, node: Node) -> None:
        """Refuse a step that overwrites its input, but for a ReLU's that nothing else reads."""
        if self._is_in_place(node) and not (self.is_relu(node) and self._is_free(node.all_input_nodes[0])):
            raise ConfigurationError(
                f"expected in-place steps only of ReLUs whose input is not used again, got {node.name!r}; keep both tensors"
            )

    def _is_in_place(self, node: Node) -> bool:
        module, name = self._module(node), _name(node)
        if module is not None:
            return bool(getattr(module, "inplace", False)) and type(module) is not nn.Dropout  # which does nothing
        written = node.kwargs.get("inplace") or node.kwargs.get("out") is not None or name == "setitem"
        return bool(written) or (name.endswith("_") and not name.endswith("__"))

    def _is_free(self, node: Node) -> bool:
        """True if one step alone reads a tensor, and all that may share memory with it."""
        if node.op == "get_attr" or len(node.users) > 1:
            return False
        module = self._module(node)
        is_new = type(module) in (*WEIGHTED, nn.AvgPool2d) if module is not None else _name(node) in _NEW
        return is_new or all(map(self._is_free, node.all_input_nodes))

    def _check_outputs(self, network: nn.Module, perturbed: Sequence[str]) -> None:
        """Refuse a network whose own forward gives other outputs than its graph, such as one that writes to its tensors."""
        draws = torch.Generator().manual_seed(0)
        shifts = {one: torch.randn(self.inputs[one].shape, generator=draws, dtype=torch.float64) for one in perturbed}
        for scale in (0, 1):  # at the inputs, where parts may be 0, and beside them
            inputs = {name: x.clone() for name, x in self.inputs.items()}
            for name, shift in shifts.items():
                inputs[name] += scale * shift.to(inputs[name].device)
            values = {self.placeholders[name]: inputs[name].clone() for name in perturbed if name in self.placeholders}
            for node in self.affected:
                if node not in values:
                    values[node] = self.run(node, values)
            with torch.no_grad():
                found = network(**inputs)
            found = found["logits"] if isinstance(found, Mapping) else found
            size = found.nan_to_num(0, 0, 0).abs().max().item()
            if not torch.allclose(values[self.output], found, rtol=0, atol=1e-9 * size, equal_nan=True):
                raise ConfigurationError(
                    "expected a forward whose torch.fx graph gives its outputs, got others; write it without in-place steps"
                )

    def _check_rows(self, node: Node, value: Tensor) -> None:
        """Refuse a step that mixes examples, since each has a region of its own."""
        apart = value.ndim > 0 and len(value) == self.examples
        if apart and not self.is_relu(node):
            first = {one: torch.zeros_like(self.clean[one]) for one in self.sources(node)}
            for radius in first.values():
                radius[:1] = 1
            apart = not self.spread(node, first)[1:].any()
        if not apart:
            raise ConfigurationError(
                f"expected steps that keep the {self.examples} examples apart on the first axis, got {node.name!r}"
            )


def _size(constant: Any) -> Any:
    is_bool = isinstance(constant, Tensor) and constant.dtype == torch.bool  # which has no abs
    return constant if is_bool else abs(constant)


def _is_constant(node: Node) -> bool:
    """True for the shape, dtype or device of a tensor, which do not vary."""
    return _name(node) in ("size", "dim") or (_name(node) == "getattr" and node.args[1] in _CONSTANT)


def _ancestors(node: Node) -> set[Node]:
    found, left = {node}, [node]
    while left:
        fresh = set(left.pop().all_input_nodes) - found
        found |= fresh
        left.extend(fresh)
    return found


def _takes_one(node: Node, varying: Mapping[Node, Tensor], *, first: bool) -> bool:
    """True if a product has what varies in one place, which of a quotient is the first."""
    places = [isinstance(arg, Node) and arg in varying for arg in node.args]
    return sum(places) == 1 and (places[0] or not first)


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
