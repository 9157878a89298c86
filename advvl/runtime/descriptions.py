"""Descriptions: a method, an option or anything made of them as a text that is the same in every process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

_LONGEST: Final = 60  # characters that a message shows of a description


def described(value: Any) -> str:
    """Return a text that is equal for equal values, in every process and every run, and differs for others.

    It is like `repr`, with these differences: it leaves out memory addresses and device numbers; it describes tensors
    by a hash of all their entries, objects by their attributes, functions by their names alone, and modules by their
    structure.
    """
    return _described(value, ())


def differing(there: str, here: str, name: str = "") -> str:
    """Return the fields in which two descriptions differ, dotted and after `name`, each with both values.

    A field that is of another kind of object, or has other fields, counts as one.
    """
    return ", ".join(_differing(there, here, name)) or "nothing"


def _differing(there: str, here: str, path: str) -> list[str]:
    if there == here:
        return []
    (kind, ours), (other, theirs) = _fields(here), _fields(there)
    if not ours or kind != other or ours.keys() != theirs.keys():
        shown = " ".join((path, f"({_short(there)} there, {_short(here)} here)")).strip()
        return [shown]
    return [one for name in ours for one in _differing(theirs[name], ours[name], f"{path}.{name}".lstrip("."))]


def _fields(text: str) -> tuple[str, dict[str, str]]:
    """Return the kind of a described object and the description of each of its fields, if it has any."""
    whole = re.fullmatch(r"([\w.<>]*)(?:\((.*)\)|\[(.*)\]|\{(.*)\})", text, re.DOTALL)
    if whole is None:
        return "", {}
    found = {}
    for number, part in enumerate(_split("".join(filter(None, whole.groups()[1:])))):
        named = re.match(r"(\w+)=|'(\w+)': ", part)
        name = str(number) if named is None else named[1] or named[2]
        found[name] = part if named is None else part[named.end() :]
    return whole[1], found


def _split(text: str) -> list[str]:
    """Return the entries of a list of descriptions, which may be lists themselves or hold texts in quotes."""
    parts, depth, quote, begin = [], 0, "", 0
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[at - 1] != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[begin:at])
            begin = at + 2
    return [*parts, text[begin:]]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _described(value: Any, around: tuple[int, ...]) -> str:
    if id(value) in around:
        return "…"
    inner = functools.partial(_described, around=(*around, id(value)))
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        return f"{kind}({tuple(value.shape)}, {value.dtype}, {_hash(value)})"
    if isinstance(value, torch.device):
        return f"device({value.type!r})"
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return f"{inner(value.__self__)}.{value.__name__}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{inner(key)}: {inner(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, Set):
        return f"{kind}({', '.join(sorted(map(inner, value)))})"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | range):
        left, right = "[]" if isinstance(value, list) else "()"
        return left + ", ".join(map(inner, value)) + right
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Enum):
        named = vars(value)
    else:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return f"{kind}({', '.join(f'{name}={inner(entry)}' for name, entry in named.items())})"


def _hash(tensor: Tensor) -> str:
    """A hash of the entries' bytes."""
    there = tensor.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(there.data_ptr(), there.nbytes)).hexdigest()[:16]
