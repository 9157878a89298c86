"""Names: dropping the prefixes that wrappers add to names in a model, and finding a module by its plain name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from advvl.errors import SiteError

# the attributes in which DDP, torch.compile and PEFT keep the wrapped model
_WRAPPERS = (("module",), ("_orig_mod",), ("base_model", "model"))
_FRAMEWORKS = ("torch", "peft", "accelerate", "deepspeed")


def without_wrappers(parts: Sequence[str]) -> list[str]:
    """The parts of a dotted name without the prefixes of wrappers."""
    plain, rest = list[str](), tuple(parts)
    while rest:
        wrapper = next((path for path in _WRAPPERS if rest[: len(path)] == path), ())
        plain += [] if wrapper else rest[:1]
        rest = rest[len(wrapper) or 1 :]
    return plain


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, which hold nothing else or, for PEFT, only their own prompts."""
    inner = _held(model)
    if inner is None and type(model).__module__.partition(".")[0] == "peft":
        children: dict[str, nn.Module] = dict(model.named_children())
        inner = children.get("base_model")
    return model if inner is None else unwrapped(inner)


def without_frameworks(model: nn.Module) -> nn.Module:
    """The model without the wrappers of torch, PEFT and others that only run it; a user's own wrapper may compute."""
    inner, forward = _held(model), type(model).forward
    known = getattr(forward, "__module__", "").partition(".")[0] in _FRAMEWORKS
    return model if inner is None or not known else without_frameworks(inner)


def _held(model: nn.Module) -> nn.Module | None:
    """The model that a wrapper holds, if it holds nothing else; None if the module is not a wrapper."""
    for path in _WRAPPERS:
        inner: nn.Module | None = model
        for name in path:
            children = {} if inner is None else dict(inner.named_children())
            inner = children.get(name) if len(children) == 1 else None
        if inner is not None:
            return inner
    return None


def find(model: nn.Module, name: str) -> nn.Module:
    """The module of this name in a model; prefixes of wrappers may be left out.

    Raises:
        SiteError: there is none; the message has the nearest existing names.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name in modules:
        return modules[name]
    inside: dict[str, nn.Module] = dict(unwrapped(model).named_modules())
    if name in inside:
        return inside[name]
    plain: dict[str, nn.Module] = {}
    for path, module in modules.items():
        plain.setdefault(".".join(without_wrappers(path.split("."))), module)
    if name in plain:
        return plain[name]
    near = difflib.get_close_matches(name, plain, n=3, cutoff=0.4)
    near += [path for path in plain if path.endswith("." + name.rpartition(".")[2]) and path not in near][:3]
    raise SiteError(
        f"expected the name of a module of {type(unwrapped(model)).__name__}, got {name!r}; "
        f"the nearest are {', '.join(map(repr, near)) or 'none'}"
    )
