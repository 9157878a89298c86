"""Output directories: each belongs to one configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from advvl.checks import path_of
from advvl.errors import OutputDirectoryError
from advvl.experiments import plain_yaml
from advvl.experiments.config import identity
from advvl.files import LOCK_FILE, differences, fingerprint, only_writer, remove_temporaries, write_text, writing_to

OWNER_FILE: Final = "configuration.yaml"


class Claiming(Protocol):
    """Options of a run that has an output directory."""

    @property
    def output(self) -> str:
        """The directory."""

    @property
    def resume(self) -> bool:
        """True to take up what it holds."""

    @property
    def overwrite(self) -> bool:
        """True to lose what it holds."""


@dataclass(frozen=True)
class OutputDirectory:
    """A directory whose every file was written under one configuration; made by `OutputDirectory.claim`."""

    path: Path
    fingerprint: str

    @staticmethod
    def claim(
        path: str | os.PathLike[str], configuration: Mapping[str, Any], *, overwrite: bool = False
    ) -> OutputDirectory:
        """Make `path`, or take it up again if it belongs to the same configuration.

        The configuration and its fingerprint lie in `configuration.yaml`. With `overwrite` a directory that belongs to
        another configuration has the files in it removed, so that no result of the other is taken for one of this; one
        that holds files and no `configuration.yaml` is never touched.

        Raises:
            OutputDirectoryError: a directory of another configuration, whose keys that differ it names; one that holds
                other files, or cannot be made or written.
        """
        directory = _made(path)
        with writing_to(directory):
            return OutputDirectory._claim(directory, configuration, overwrite)

    @staticmethod
    def _claim(directory: Path, configuration: Mapping[str, Any], overwrite: bool) -> OutputDirectory:
        remove_temporaries(directory)
        mark = fingerprint(configuration)
        owner = directory / OWNER_FILE
        if owner.exists():
            found = _read_owner(owner)
            if found.get("fingerprint") == mark:
                return OutputDirectory(directory, mark)
            if not overwrite:
                raise OutputDirectoryError(
                    f"expected {str(directory)!r} to belong to this configuration, got one that differs in "
                    f"{differences(found.get('configuration', {}), configuration)}; another --output or --overwrite helps"
                )
            _remove_files(directory, spared=owner)
            owner.unlink()
        elif _held(directory):
            raise OutputDirectoryError(
                f"expected {str(directory)!r} to be an output directory, got files and no {OWNER_FILE}; "
                "choose another --output"
            )
        document = {"fingerprint": mark, "configuration": json.loads(json.dumps(configuration, default=str))}
        write_text(owner, plain_yaml.dump(document))
        return OutputDirectory(directory, mark)

    def clear(self) -> None:
        """Remove everything in it but the mark of whose it is."""
        with writing_to(self.path):
            _remove_files(self.path, spared=self.path / OWNER_FILE)

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def claim(options: Claiming, results: str = "seed-*") -> OutputDirectory:
    """Claim the output directory of these options.

    Arguments:
        results: a pattern of the folders in it that hold results.

    Raises:
        OutputDirectoryError: as `OutputDirectory.claim`; or it holds results that are neither to be taken up (`resume`)
            nor to be lost (`overwrite`).
    """
    directory = OutputDirectory.claim(options.output, identity(options), overwrite=options.overwrite)
    if any(_files(folder) for folder in directory.path.glob(results)):
        if options.overwrite:
            directory.clear()
        elif not options.resume:
            raise OutputDirectoryError(
                f"expected no results in {options.output!r}, got some of this configuration; pass --resume to keep or "
                "--overwrite to lose them"
            )
    return directory


@contextmanager
def released_if_empty(options: Claiming) -> Iterator[None]:
    """On an error, take back the claim on an output directory that was claimed within and got nothing to hold."""
    owner = Path(options.output, OWNER_FILE)
    claimed_before = owner.exists()
    try:
        yield
    except BaseException:
        if not claimed_before and owner.exists() and _files(owner.parent) == [owner]:
            _remove_files(owner.parent, spared=owner)
            owner.unlink()
        raise


@contextmanager
def claimed(options: Claiming, results: str = "seed-*") -> Iterator[OutputDirectory]:
    """Claim the output directory of these options, and keep other processes from it while the block runs.

    On an error a directory that got nothing to hold is given up again.

    Raises:
        OutputDirectoryError: as `claim`; or another process writes there.
    """
    with only_writer(_made(options.output)), released_if_empty(options):
        yield claim(options, results)


def _made(path: str | os.PathLike[str]) -> Path:
    directory = path_of(path)
    with writing_to(directory):
        if directory.exists() and not directory.is_dir():
            raise OutputDirectoryError(
                f"expected a directory at {str(directory)!r}, got a file; choose another --output"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except NotADirectoryError as error:
            raise OutputDirectoryError(
                f"expected directories above {str(directory)!r}, got a file; choose another --output"
            ) from error
    return directory


def _held(directory: Path) -> list[Path]:
    """Return everything in a directory but the lock of who writes it now."""
    return [path for path in directory.iterdir() if path.name != LOCK_FILE]


def _files(directory: Path) -> list[Path]:
    """Return every file in a directory or below, but for those that writers leave: locks and temporaries."""
    return [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".advvl-")]


def _read_owner(owner: Path) -> dict[str, Any]:
    try:
        found = plain_yaml.load(owner.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OutputDirectoryError(f"expected YAML in {str(owner)!r}, got {error}; choose another --output") from error
    if not isinstance(found, dict) or not isinstance(found.get("configuration"), dict):
        raise OutputDirectoryError(
            f"expected {str(owner)!r} to hold a fingerprint and a configuration, got something else; "
            "choose another --output"
        )
    return found


def _remove_files(directory: Path, *, spared: Path) -> None:
    """Remove everything in `directory` but `spared`, which goes on saying whose the rest is while this runs."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path == spared or path == directory / LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
