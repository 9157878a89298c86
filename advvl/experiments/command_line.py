"""Configuration from the command line: one flag for each field of nested dataclasses.

    options = parse(UniterOptions, ["--config", "villa.yaml", "--finetune.epochs", "3"], presets=PRESETS)

Flags win over the file, the file over the preset, the preset over the defaults. Metadata of a field that is read here:
`help`, `flags` (further names of its flag), `parse` (from the flag's text to the value), `metavar`, `wanted` (what `parse`
takes, in words). A tuple that has a `parse` and the metavar N is given by its length.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from advvl.checks import shown
from advvl.errors import ConfigurationError
from advvl.experiments.config import Layer, Leaf, build, leaves, read_yaml, unknown, without_none

T = TypeVar("T")


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    file: str = "YAML file",
) -> None:
    """Add `--config FILE` and one flag for each field of `cls`, dotted where dataclasses nest.

    The help of a flag shows its default, and what `presets` would have instead. A tuple is comma-separated and its flag
    may be repeated; a bool is `--name` or `--no-name`. `file` names the format of FILE.
    """
    parser.add_argument("--config", metavar="FILE", help=f"{file} of options; flags win over it")
    instead = {name: _flat(values) for name, values in (presets or {}).items()}
    for leaf in leaves(cls):
        names = [f"--{leaf.name}", *leaf.metadata.get("flags", ())]
        settings: dict[str, Any] = {"dest": leaf.name, "default": argparse.SUPPRESS, "help": _help(leaf, instead)}
        if leaf.annotation is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **settings)
            continue
        settings["type"] = _explained(leaf) if "parse" in leaf.metadata else _reader(leaf.annotation)
        settings["metavar"] = leaf.metadata.get("metavar", _kind(leaf.annotation))
        if get_origin(leaf.annotation) is tuple:
            settings["action"] = "extend"
        parser.add_argument(*names, **settings)


def from_flags(
    cls: type[T],
    namespace: argparse.Namespace,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    read: Callable[[str], Layer] = read_yaml,
) -> T:
    """Return the configuration that parsed flags ask for: flags over `--config` over the preset over the defaults.

    `presets` maps what the field `preset` may be to values; flags, then the file, then the field's default choose one.
    `read` reads the file.
    """
    given = vars(namespace)
    known = [leaf.name for leaf in leaves(cls)]
    layers = [Layer("the flags", _nested({name: given[name] for name in known if name in given}))]
    if given.get("config") is not None:
        layers.insert(0, read(given["config"]))
    if presets is not None:
        default = next(leaf.default for leaf in leaves(cls) if leaf.name == "preset")
        source, chosen = next(
            ((layer.source, layer.values["preset"]) for layer in reversed(layers) if "preset" in layer.values),
            ("the defaults", default),
        )
        if not isinstance(chosen, str) or chosen not in presets:
            unknown(chosen, "a preset", presets, source)
        layers.insert(0, Layer(f"preset {chosen}", presets[chosen]))
    return build(cls, *layers)


def parse(
    cls: type[T],
    arguments: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    description: str | None = None,
    prog: str | None = None,
    read: Callable[[str], Layer] = read_yaml,
    file: str = "YAML file",
) -> T:
    """Return the configuration that a command line asks for.

    Arguments:
        presets, read: as of `from_flags`.
        description, prog: of `--help`, which names the format of the file of options by `file`.

    Raises:
        ConfigurationError: flags that are unknown or malformed, or values that `cls` refuses.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s [option ...]",
        description=description,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser, cls, presets=presets, file=file)
    return from_flags(cls, parser.parse_args(arguments), presets=presets, read=read)


_EPILOG = """Flags win over the file of --config, the file over the preset, the preset over the defaults shown here. The
configuration that comes of it is written to configuration.yaml in the output directory."""


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose errors are one sentence, and name the flag nearest to an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"expected {self.prog} as its --help says, got {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            name = next((text.partition("=")[0] for text in rest if text.startswith("-")), None)
            near = difflib.get_close_matches(name or "", self._option_string_actions, n=1, cutoff=0.0)
            hint = "" if name is None else f"; the flag nearest to {name} is {near[0]}"
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found, rest


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"finetune.epochs": 3}` as `{"finetune": {"epochs": 3}}`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        section = nested
        for step in path:
            section = section.setdefault(step, {})
        section[last] = value
    return nested


def _reader(annotation: Any) -> Callable[[str], Any]:
    """Return a function from a flag's text to its value; it raises what argparse turns into an error message."""
    inner = without_none(annotation)

    def read(text: str) -> Any:
        if inner is not annotation:
            return None if text == "none" else _reader(inner)(text)
        if get_origin(annotation) is tuple:
            return [_reader(get_args(annotation)[0])(item.strip()) for item in text.split(",")]
        if get_origin(annotation) is Literal:
            if text in get_args(annotation):
                return text
        else:
            with suppress(ValueError):
                return annotation(text)
        raise argparse.ArgumentTypeError(f"expected {_kind(annotation)}, got {shown(text)}")

    return read


def _kind(annotation: Any) -> str:
    inner = without_none(annotation)
    if inner is not annotation:
        return f"{_kind(inner)}|none"
    if get_origin(annotation) is tuple:
        return f"{_kind(get_args(annotation)[0])},..."
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    return {int: "N", float: "X", str: "TEXT"}[annotation]


def _explained(leaf: Leaf) -> Callable[[str], Any]:
    """Return the field's own `parse`, whose ValueError becomes an error message that says what was expected."""
    wanted = leaf.metadata.get("wanted", leaf.metadata.get("metavar", _kind(leaf.annotation)))

    def read(text: str) -> Any:
        try:
            return leaf.metadata["parse"](text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {shown(text)}") from error

    return read


def _by_length(leaf: Leaf) -> bool:
    return get_origin(leaf.annotation) is tuple and "parse" in leaf.metadata and leaf.metadata.get("metavar") == "N"


def _help(leaf: Leaf, presets: Mapping[str, Mapping[str, Any]]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return str(len(value)) if _by_length(leaf) else ",".join(map(str, value))
        return str(value)

    shown = (
        [] if any(leaf.default is nothing for nothing in (MISSING, None, False)) else [f"default {text(leaf.default)}"]
    )
    shown += [f"{text(values[leaf.name])} by preset {name}" for name, values in presets.items() if leaf.name in values]
    said = leaf.metadata.get("help", "").replace("None:", "none (null in YAML):")
    return " ".join(filter(None, (said, f"({'; '.join(shown)})" * bool(shown)))).replace("%", "%%")


def _flat(nested: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{"finetune": {"epochs": 3}}` as `{"finetune.epochs": 3}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return flat
