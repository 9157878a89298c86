"""The words that users read: errors are one short sentence that links where more is needed, and docstrings are plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import advvl
from advvl import errors

PACKAGE = Path(advvl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "errors.md"

LONGEST = 120
"""Characters of an error's fixed text: its string constants, what is filled in not counted."""

OPENINGS = ("What", "Whether", "Why", "Those", "How")
WORDS = re.compile(r"\b(lest|anew|mend|mends|told)\b", re.IGNORECASE)

OWN = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.AdvVLError)}

FILES = sorted(PACKAGE.rglob("*.py"))


def strings(node: ast.AST) -> list[str]:
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def called(node: ast.AST) -> str:
    """The name of what a call calls; empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the fixed text of every error of ours that is made: raised on the spot, or by who asked for it."""
    for node in ast.walk(tree):
        if called(node) in OWN:
            yield node.lineno, "".join(strings(node))


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the fixed text of everything returned that is text: the reasons that go into messages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield node.lineno, "".join(strings(node))


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of every string that stands by itself: of modules, classes, functions and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def too_long(found: Iterator[tuple[int, str]]) -> list[str]:
    return [f"line {line}: {len(text)} characters" for line, text in found if len(text) > LONGEST]


def file_id(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_an_error_has_at_most_120_characters_of_fixed_text(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not too_long(messages(tree))
    assert path.name != "diagnosis.py" or not too_long(sentences(tree))


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_docstrings_and_messages_are_plain_english(path: Path) -> None:
    tree = ast.parse(path.read_text())
    riddles = [f"line {line}: {text[:40]}" for line, text in docstrings(tree) if text.split()[0] in OPENINGS]
    assert not riddles
    odd = [
        f"line {line}: {word[0]}"
        for line, text in (*docstrings(tree), *messages(tree))
        for word in WORDS.finditer(text)
    ]
    assert not odd


def anchors_used() -> dict[str, str]:
    """The anchor of every call of `more` in the package, and a file that has it."""
    return {
        strings(node)[0]: file_id(path)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if called(node) == "more"
    }


def test_every_link_of_a_message_has_its_section_and_every_section_its_link() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert all(re.fullmatch(r"[A-Za-z]+( [a-z]+)*", heading) for heading in headings)  # letters alone make an anchor
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(anchors_used()) == set(anchors)


def test_the_table_of_the_page_lists_its_sections_in_order() -> None:
    page = PAGE.read_text()
    listed = re.findall(r"^\|.*\[([a-z ]+)\]\(#([a-z-]+)\) \|$", page, re.MULTILINE)
    assert [name for name, _ in listed] == [heading.lower() for heading in re.findall(r"^## (.+)$", page, re.MULTILINE)]
    assert all(anchor == name.replace(" ", "-") for name, anchor in listed)


def test_a_link_follows_what_to_do() -> None:
    assert errors.more("site-silent") == "; see docs/errors.md#site-silent"


def test_the_checks_see_what_they_look_for() -> None:
    long = ast.parse(f"raise SiteError(f'{'x' * 100}{{name}}{'y' * 21}')")
    assert too_long(messages(long)) == ["line 1: 121 characters"]
    assert not too_long(messages(ast.parse("raise SiteError(f'" + "x" * 100 + "{name}')")))
    module = ast.parse('"""What it is."""\nA = 1\n"""How much, lest it be forgotten."""')
    assert [text.split()[0] for _, text in docstrings(module)] == ["What", "How"]
    assert WORDS.findall("mend it anew, as told, lest it break") == ["mend", "anew", "told", "lest"]
    assert not WORDS.search("we recommend untold amendments")
