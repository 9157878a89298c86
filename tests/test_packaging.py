"""What a release holds and asks for: pinned tools, whole archives, an install that type checkers can follow."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PINNED = {
    line.partition("==")[0].lower().replace("_", "-")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line.partition("#")[0]
}
UNPINNED = {"triton"}  # torch's CUDA builds bring a release of their own


def required(text: str) -> list[str]:
    """The names of the packages that an entry of setup.cfg lists."""
    lines = (line.strip() for line in text.splitlines())
    return [re.split(r"[<>=!~;\s\[]", line)[0].lower().replace("_", "-") for line in lines if line and line[0] != "#"]


def test_everything_that_is_asked_for_is_pinned() -> None:
    asked = required(SETUP["options"]["install_requires"])
    asked += [name for extra in SETUP["options.extras_require"].values() for name in required(extra)]
    assert {"torch", "build", "twine", "pytest"} <= set(asked)
    assert set(asked) - UNPINNED <= PINNED


def test_an_archive_has_the_files_that_the_commands_need() -> None:
    lines = (line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines() if line and line[0] != "#")
    included = {name for command, *names in lines if command in ("include", "graft") for name in names}
    assert {"docs", "examples", "tests", "CHANGELOG.md", "constraints.txt", "Makefile"} <= included
    assert all((ROOT / name).exists() for name in included)


def test_an_editable_install_is_a_path_that_type_checkers_follow() -> None:
    """setuptools writes one where the package's folder is said; otherwise an import hook, which no type checker runs."""
    assert SETUP["options"]["package_dir"].split() == ["=", "."]
    assert (ROOT / "advvl" / "py.typed").exists()


@pytest.mark.parametrize("command", ["python -m build", "twine check --strict"])
def test_ci_builds_the_archives_and_checks_them(command: str) -> None:
    assert "make dist" in (ROOT / ".ci" / "run").read_text()
    (recipe,) = re.findall(r"^dist: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command in recipe
