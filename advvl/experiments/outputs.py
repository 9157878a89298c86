"""Output directories: each belongs to one configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from advvl.checks import path_of
from advvl.errors import OutputDirectoryError
from advvl.experiments import plain_yaml
from advvl.files import LOCK_FILE, differences, fingerprint, only_writer, remove_temporaries, write_text, writing_to
from advvl.runtime.processes import check_agreement

_OWNER: Final = "configuration.yaml"


@contextmanager
def claimed(
    path: str | os.PathLike[str],
    configuration: Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    results: str = "seed-*",
) -> Iterator[Path]:
    """Claim an output directory, and keep other processes from it while the block runs.

    On an error a directory that was claimed here and got nothing to hold is given up again.

    Arguments:
        configuration: whose directory it is.
        resume: take up the results that it holds.
        overwrite: lose them.
        results: a pattern of the folders in it that hold results.

    Raises:
        OutputDirectoryError: as `claim`; another process writes there; or it holds results that are neither to be taken up
            nor to be lost.
    """
    with only_writer(_made(path)):
        owner = Path(path, _OWNER)
        claimed_before = owner.exists()
        try:
            directory = claim(path, configuration, overwrite=overwrite)
            if any(_files(folder) for folder in directory.glob(results)):
                if not (overwrite or resume):
                    raise OutputDirectoryError(
                        f"expected no results in {str(path)!r}, got some of this configuration; pass --resume to keep "
                        "or --overwrite to lose them"
                    )
                if overwrite:
                    with writing_to(directory):
                        _remove_files(directory, spared=owner)
            yield directory
        except BaseException:
            if not claimed_before and owner.exists() and _files(owner.parent) == [owner]:
                _remove_files(owner.parent, spared=owner)
                owner.unlink()
            raise


@contextmanager
def claimed_by_main(
    path: str | os.PathLike[str], configuration: Mapping[str, Any], *, main: bool, **choices: Any
) -> Iterator[None]:
    """Claim an output directory in the main process; every process hears of a refusal.

    Arguments:
        choices: as `claimed` takes them.

    Raises:
        OutputDirectoryError: as `claimed`.
    """
    refusal: OutputDirectoryError | None = None
    with ExitStack() as held:
        if main:
            try:
                held.enter_context(claimed(path, configuration, **choices))
            except OutputDirectoryError as error:
                refusal = error
        check_agreement("access to the output directory", str(refusal))
        if refusal is not None:
            raise refusal
        yield


def claim(path: str | os.PathLike[str], configuration: Mapping[str, Any], *, overwrite: bool = False) -> Path:
    """Make a directory, or take it up again if it belongs to the same configuration.

    The configuration and its fingerprint lie in `configuration.yaml`. With `overwrite` a directory that belongs to another
    configuration has the files in it removed, so that no result of the other is taken for one of this; one that holds files
    and no `configuration.yaml` is never touched.

    Raises:
        OutputDirectoryError: a directory of another configuration, whose keys that differ it names; one that holds other
            files, or cannot be made or written.
    """
    directory, mark = _made(path), fingerprint(configuration)
    owner = directory / _OWNER
    with writing_to(directory):
        remove_temporaries(directory)
        if owner.exists():
            found = _read_owner(owner)
            if found.get("fingerprint") == mark:
                return directory
            if not overwrite:
                raise OutputDirectoryError(
                    f"expected {str(directory)!r} to belong to this configuration, got one that differs in "
                    f"{differences(found.get('configuration', {}), configuration)}; another --output or --overwrite helps"
                )
            _remove_files(directory, spared=owner)
            owner.unlink()
        elif _held(directory):
            raise OutputDirectoryError(
                f"expected {str(directory)!r} to be an output directory, got files and no {_OWNER}; choose another --output"
            )
        document = {"fingerprint": mark, "configuration": json.loads(json.dumps(configuration, default=str))}
        write_text(owner, plain_yaml.dump(document))
    return directory


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
