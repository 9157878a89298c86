"""Files are whole or absent; a directory belongs to one configuration."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advvl.errors import CheckpointError, OutputDirectoryError
from advvl.experiments.outputs import OutputDirectory
from advvl.files import (
    fingerprint,
    read_json,
    read_torch,
    write_bytes,
    write_json,
    write_safetensors,
    write_text,
    write_torch,
)


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_bytes(tmp_path / "deep" / "er" / "b", b"\x00\xff")
    write_text(tmp_path / "t", "größer\n")
    write_json(tmp_path / "j.json", {"a": [1, 2.5, None, "ü"]})
    write_torch(tmp_path / "x.pt", {"step": 3, "weights": {"w": torch.arange(4.0)}})
    write_safetensors(tmp_path / "x.safetensors", {"w": torch.arange(6.0).view(2, 3).t()})
    assert (tmp_path / "deep" / "er" / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t").read_text(encoding="utf-8") == "größer\n"
    assert read_json(tmp_path / "j.json") == {"a": [1, 2.5, None, "ü"]}
    found = read_torch(tmp_path / "x.pt")
    assert found["step"] == 3
    assert torch.equal(found["weights"]["w"], torch.arange(4.0))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], torch.arange(6.0).view(2, 3).t())


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_text(tmp_path / "f", "old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, moment, fail)
        with pytest.raises(OSError, match="no space left"):
            write_text(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_the_final_name_never_holds_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is on the disk before the rename: at the rename the temporary already holds all of it."""
    seen: list[bytes] = []
    replace = os.replace

    def watch(source: str, target: str) -> None:
        seen.append(Path(source).read_bytes())
        assert Path(source).parent == Path(target).parent
        assert not Path(target).exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write_bytes(tmp_path / "f", b"x" * 100_000)
    assert seen == [b"x" * 100_000]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert mode[0] == mode[1]


def test_json_refuses_what_it_cannot_hold_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "j", {"a": float("nan")})
    assert names(tmp_path) == []


class Dangerous:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


def test_a_file_that_holds_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Dangerous()}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Dangerous(), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="tensors and plain containers"):
            read_torch(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, 0.99], ids=lambda kept: f"kept-{kept}")
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = write_torch(tmp_path / "x.pt", {"w": torch.arange(1000.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"x\.pt"):
        read_torch(path)


def test_a_missing_file_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got none"):
        read_torch(tmp_path / "missing.pt")
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"j\.json"):
        read_json(tmp_path / "j.json")


def test_fingerprints_ignore_the_order_of_keys_and_see_every_value() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1, "b": None})


def test_the_same_configuration_takes_its_directory_up_again(tmp_path: Path) -> None:
    first = OutputDirectory.claim(tmp_path / "runs" / "a", {"seed": 1, "radii": (0.25, 0.5)})
    write_text(first / "result", "kept")
    again = OutputDirectory.claim(tmp_path / "runs" / "a", {"radii": [0.25, 0.5], "seed": 1})
    assert again == first
    assert (again / "result").read_text() == "kept"


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    OutputDirectory.claim(tmp_path, {"seed": 1, "villa": {"steps": 3, "kl": 1.0}, "old": 1})
    (tmp_path / "result").write_text("kept")
    with pytest.raises(OutputDirectoryError) as caught:
        OutputDirectory.claim(tmp_path, {"seed": 1, "villa": {"steps": 4, "kl": 1.0}, "new": "x"})
    message = str(caught.value)
    assert "villa.steps (3 there, 4 here)" in message
    assert "old (1 there, absent here)" in message
    assert "new (absent there, 'x' here)" in message
    assert "seed" not in message
    assert "--output" in message
    assert "--overwrite" in message
    assert (tmp_path / "result").read_text() == "kept"


def test_overwriting_removes_what_the_other_configuration_left(tmp_path: Path) -> None:
    OutputDirectory.claim(tmp_path, {"seed": 1})
    write_text(tmp_path / "seed-1" / "result", "stale")
    claimed = OutputDirectory.claim(tmp_path, {"seed": 2}, overwrite=True)
    assert names(tmp_path) == ["configuration.yaml"]
    assert claimed == OutputDirectory.claim(tmp_path, {"seed": 2})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_somebody_elses_files_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="files and no configuration"):
        OutputDirectory.claim(tmp_path, {}, overwrite=overwrite)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "deeper"):
        with pytest.raises(OutputDirectoryError, match="--output"):
            OutputDirectory.claim(path, {})


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    OutputDirectory.claim(tmp_path, {})
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / ".advvl-model.pt-abc123.partial").write_bytes(b"half")
    (tmp_path / "seed-0" / ".advvl-notes").write_text("mine")
    OutputDirectory.claim(tmp_path, {})
    assert names(tmp_path) == ["configuration.yaml", "seed-0", "seed-0/.advvl-notes"]


def test_clearing_keeps_whose_the_directory_is(tmp_path: Path) -> None:
    claimed = OutputDirectory.claim(tmp_path, {"seed": 1})
    write_text(claimed / "seed-1" / "result", "old")
    claimed.clear()
    assert names(tmp_path) == ["configuration.yaml"]
    assert OutputDirectory.claim(tmp_path, {"seed": 1}) == claimed
