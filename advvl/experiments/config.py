"""Nested frozen dataclasses as configuration: from YAML, and to a canonical form.

A configuration is built from layers, later ones over earlier, all of them over the dataclass's defaults:

    options = build(UniterOptions, Layer("preset demo", PRESETS["demo"]), read_yaml("villa.yaml"))

Fields are `int`, `float`, `str`, `bool`, a `Literal` of texts, tuples of these, any of these `| None`, or a dataclass.
Names and types are judged here, values by the dataclasses' own `__post_init__`. A field whose metadata says
`identity=False` does not change what an output directory holds. The command line is `advvl.experiments.command_line`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Final, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from advvl.checks import path_of, shown
from advvl.errors import ConfigurationError
from advvl.experiments import plain_yaml

T = TypeVar("T")

_LONGEST: Final = 1 << 20  # bytes of a configuration
_NAMES: Final = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True)
class Layer:
    """Nested values by field name, and where they come from, for error messages."""

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)


def build(cls: type[T], *layers: Layer) -> T:
    """Make a `cls` of its defaults and the layers, later over earlier.

    Raises:
        ConfigurationError: an unknown name, a wrong type, a missing value, or a value that `cls` refuses; it names the
            dotted key and the layers that set it.
    """
    typed = [Layer(layer.source, _section(cls, layer.values, "", layer.source)) for layer in layers]
    return _construct(cls, typed, "")


def read_yaml(path: str | os.PathLike[str]) -> Layer:
    """Return the layer that a YAML file holds; an empty file holds nothing.

    Raises:
        ConfigurationError: a file that cannot be read, is too long, is not YAML, or is not a mapping; a key that stands
            twice, or an alias.
    """
    path = path_of(path)
    try:
        with open(path, "rb") as stream:
            text = stream.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ConfigurationError(f"expected at most {_LONGEST} bytes in {str(path)!r}, got more; check --config")
        values = plain_yaml.load(text.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"expected a readable file {str(path)!r}, got {error}; check --config") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"expected YAML in {str(path)!r}, got {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"expected a mapping of options in {str(path)!r}, got {_shown(values)}")
    return Layer(str(path), values)


@dataclass(frozen=True)
class Leaf:
    """A field that is not itself a dataclass: its dotted name, annotation, default (or `MISSING`) and metadata.

    Metadata without `help` get it from the field's entry under "Arguments:" in the docstring of its dataclass.
    """

    name: str
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]


def leaves(cls: type, path: str = "", default: Any = MISSING) -> Iterator[Leaf]:
    """Return the leaves of `cls` in order; their defaults are those of `default`, an instance, if there is one."""
    hints, described = get_type_hints(cls), _descriptions(cls)
    for item in fields(cls):
        value = _default(item) if default is MISSING else getattr(default, item.name)
        if is_dataclass(hints[item.name]):
            yield from leaves(typing.cast(type, hints[item.name]), f"{path}{item.name}.", value)
        else:
            help = {"help": described[item.name]} if item.name in described else {}
            yield Leaf(f"{path}{item.name}", hints[item.name], value, {**help, **item.metadata})


def identity(config: Any) -> dict[str, Any]:
    """Return the configuration as nested dicts, lists, numbers, texts and None; every float field is a float.

    Fields that do not change what an output directory holds are left out.
    """
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for item in fields(config):
        if not item.metadata.get("identity", True):
            continue
        value = getattr(config, item.name)
        if is_dataclass(value):
            values[item.name] = identity(value)
        else:
            typed = _typed(hints[item.name], value, item.name, type(config).__name__)
            values[item.name] = list(typed) if isinstance(typed, tuple) else typed
    return values


def without_none(annotation: Any) -> Any:
    """Return the `T` of `T | None`, which is `annotation` itself where None is not allowed."""
    if get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    return next(part for part in get_args(annotation) if part is not types.NoneType)


def _section(cls: type, values: Any, path: str, source: str) -> dict[str, Any]:
    """Return the values of one dataclass, named and typed rightly, or an error."""
    if not isinstance(values, Mapping):
        _wrong(path, "a mapping of options", values, source)
    hints = get_type_hints(cls)
    known = {item.name: hints[item.name] for item in fields(cls)}
    typed = {}
    for key, value in values.items():
        if key not in known:
            unknown(key, f"an option of {path!r}" if path else "an option", known, source)
        name = f"{path}.{key}" if path else key
        nested = is_dataclass(known[key])
        typed[key] = _section(known[key], value, name, source) if nested else _typed(known[key], value, name, source)
    return typed


def _typed(annotation: Any, value: Any, path: str, source: str) -> Any:
    """Return the value as `annotation` has it: a whole number as a float where one is due, a list as a tuple."""
    if without_none(annotation) is not annotation:
        return None if value is None else _typed(without_none(annotation), value, path, source)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        if value not in parts:
            _wrong(path, f"one of {', '.join(parts)}", value, source)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            _wrong(path, "a list", value, source)
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            _wrong(path, f"a list of {len(parts)}", value, source)
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(
            _typed(kind, item, f"{path}[{i}]", source) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not annotation:
        _wrong(path, _NAMES[annotation], value, source)
    return value


def _construct(cls: type[T], layers: Sequence[Layer], path: str) -> T:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for item in fields(cls):  # type: ignore[arg-type]
        setting = [layer for layer in layers if item.name in layer.values]
        name = f"{path}.{item.name}" if path else item.name
        if is_dataclass(hints[item.name]):
            default = _default(item)
            below = [] if default is MISSING else [Layer("defaults", asdict(default))]
            nested = [Layer(layer.source, layer.values[item.name]) for layer in setting]
            if nested or default is MISSING:
                arguments[item.name] = _construct(hints[item.name], below + nested, name)
        elif setting:
            arguments[item.name] = setting[-1].values[item.name]
        elif _default(item) is MISSING:
            raise ConfigurationError(f"expected a value for {name}, got none; set it in the file or as --{name}")
    try:
        return cls(**arguments)
    except ConfigurationError as error:
        sources = ", ".join(layer.source for layer in layers if layer.values and layer.source != "defaults")
        raise ConfigurationError(
            f"{path + ': ' if path else ''}{error}{f' (set by {sources})' if sources else ''}"
        ) from error


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"


def _wrong(path: str, wanted: str, value: Any, source: str) -> NoReturn:
    raise ConfigurationError(f"expected {path} to be {wanted}, got {_shown(value)} in {source}")


def unknown(key: Any, what: str, known: Mapping[str, Any], source: str) -> NoReturn:
    """Raise the `ConfigurationError` for a name that is none of `known`; it names the nearest that is."""
    nearest = difflib.get_close_matches(str(key)[:80], known, n=1, cutoff=0.0)
    advice = f"; the nearest known one is {nearest[0]!r}" if nearest else ""
    raise ConfigurationError(f"expected {what}, got {shown(key)} in {source}{advice}")


def _descriptions(cls: type) -> dict[str, str]:
    """Return what a docstring says of each field under "Arguments:", as one line."""
    _, _, section = (inspect.getdoc(cls) or "").partition("\nArguments:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section.partition("\n\n")[0]):
        names, _, text = entry.partition(": ")
        found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(text.split()))
    return found
