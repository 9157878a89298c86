"""YAML that says what it seems to say: scalars as in YAML 1.2, no key twice, no aliases.

PyYAML reads YAML 1.1, in which 010 is 8, 1:30 is 90, `no` is False and 2e-3 is a text, keeps the last of two equal keys,
and copies what an alias stands for: 300 bytes can hold a billion entries.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml

_SCALARS: Final = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "int": (r"[-+]?(0|[1-9][0-9]{0,17})", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""The texts without quotes that are no texts, each kind with the characters that it may begin with."""


def load(text: str) -> Any:
    """Return what a YAML document holds, made of dicts, lists, texts, numbers, bools and None.

    Raises:
        yaml.YAMLError: no YAML, a tag that asks for anything else, a key that stands twice in a mapping, or an alias.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("lists or mappings nested too deep") from error
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # of a tag on a text that is nothing of the kind
        raise yaml.YAMLError(f"a tag that does not fit: {error}") from error


def dump(value: Any) -> str:
    """Return YAML that `load`, and any other reader, turns back into the value; keys stay in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what readers of YAML 1.1 or 1.2 would take for something else than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="found an alias; write out what it stands for", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            names = [str(key.value)[:80] for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), "a key")
            raise yaml.MarkedYAMLError(problem=f"found {twice!r} more than once", problem_mark=node.start_mark)
        return found


_Loader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
