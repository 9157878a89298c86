"""Files are whole or absent; a directory belongs to one configuration."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advvl.errors import CheckpointError, OutputDirectoryError
from advvl.experiments.outputs import claim, claimed
from advvl.files import (
    differences,
    fingerprint,
    only_writer,
    read_json,
    read_torch,
    remove_temporaries,
    replacing,
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
        with pytest.raises(OutputDirectoryError, match=r"to write .*f', got no space left on device; make room"):
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
    first = claim(tmp_path / "runs" / "a", {"seed": 1, "radii": (0.25, 0.5)})
    write_text(first / "result", "kept")
    again = claim(tmp_path / "runs" / "a", {"radii": [0.25, 0.5], "seed": 1})
    assert again == first
    assert (again / "result").read_text() == "kept"


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 1, "villa": {"steps": 3, "kl": 1.0}, "old": 1})
    (tmp_path / "result").write_text("kept")
    with pytest.raises(OutputDirectoryError) as caught:
        claim(tmp_path, {"seed": 1, "villa": {"steps": 4, "kl": 1.0}, "new": "x"})
    message = str(caught.value)
    assert "villa.steps (3 there, 4 here)" in message
    assert "old (1 there, absent here)" in message
    assert "new (absent there, 'x' here)" in message
    assert "seed" not in message
    assert "--output" in message
    assert "--overwrite" in message
    assert (tmp_path / "result").read_text() == "kept"


def test_overwriting_removes_what_the_other_configuration_left(tmp_path: Path) -> None:
    claim(tmp_path, {"seed": 1})
    write_text(tmp_path / "seed-1" / "result", "stale")
    claim(tmp_path, {"seed": 2}, overwrite=True)
    assert names(tmp_path) == ["configuration.yaml"]
    claim(tmp_path, {"seed": 2})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_somebody_elses_files_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputDirectoryError, match="files and no configuration"):
        claim(tmp_path, {}, overwrite=overwrite)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f" / "deeper"):
        with pytest.raises(OutputDirectoryError, match="--output"):
            claim(path, {})


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    claim(tmp_path, {})
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / ".advvl-model.pt-abc123.partial").write_bytes(b"half")
    (tmp_path / "seed-0" / ".advvl-notes").write_text("mine")
    claim(tmp_path, {})
    assert names(tmp_path) == ["configuration.yaml", "seed-0", "seed-0/.advvl-notes"]


def test_overwriting_results_of_the_same_configuration_keeps_whose_the_directory_is(tmp_path: Path) -> None:
    with claimed(tmp_path, {"seed": 1}) as directory:
        write_text(directory / "seed-1" / "result", "old")
    with pytest.raises(OutputDirectoryError, match="expected no results"), claimed(tmp_path, {"seed": 1}):
        pass
    with claimed(tmp_path, {"seed": 1}, resume=True):
        assert (tmp_path / "seed-1" / "result").exists()
    with claimed(tmp_path, {"seed": 1}, overwrite=True):
        pass
    assert names(tmp_path) == ["configuration.yaml"]


def test_a_file_that_cannot_be_written_is_a_refusal_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(OutputDirectoryError, match=f"expected to write '{path}', got "):
            write_text(path, "x")
        with pytest.raises(OutputDirectoryError, match="choose another place"), only_writer(path):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputDirectoryError, match="folder"):
        write_text(tmp_path / "folder", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    """A limit on the size of files gives the error that a full disk gives, in the middle of a write."""
    code = (
        "import resource, signal, sys; from advvl.files import *; from advvl.errors import OutputDirectoryError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: write_bytes(sys.argv[1], b'x' * 501)\n"
        "except OutputDirectoryError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "f"], capture_output=True, text=True, check=True)
    assert "expected to write" in ran.stdout
    assert names(tmp_path) == []


def test_an_error_of_the_block_about_another_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "f") as stream:
        stream.write(Path("/nowhere/at/all").read_bytes())
    assert names(tmp_path) == []


def test_what_is_being_written_is_not_taken_for_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / ".advvl-g-x.partial").write_bytes(b"half")
    with replacing(tmp_path / "f") as stream:
        stream.write(b"whole")
        remove_temporaries(tmp_path)
        claim(tmp_path / "other", {})
    assert names(tmp_path) == ["f", "other", "other/configuration.yaml"]
    assert (tmp_path / "f").read_bytes() == b"whole"


def test_the_temporaries_of_one_file_are_removed_alone(tmp_path: Path) -> None:
    for name in ("run.pt-1", "run.pt.old-1", "run[1].pt-1"):
        (tmp_path / f".advvl-{name}.partial").write_bytes(b"half")
    remove_temporaries(tmp_path / "run.pt")
    assert names(tmp_path) == [".advvl-run.pt.old-1.partial", ".advvl-run[1].pt-1.partial"]
    remove_temporaries(tmp_path / "run[1].pt")
    assert names(tmp_path) == [".advvl-run.pt.old-1.partial"]


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with only_writer(path):
        with pytest.raises(OutputDirectoryError, match=f"no other process to write '{path}', got one at work"):
            only_writer(path).__enter__()
        with only_writer(tmp_path / "another"):
            pass
    with only_writer(path):
        pass
    assert names(tmp_path) == ["folder"]


def test_a_directory_made_under_its_lock_stays_locked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with only_writer(path):
        path.mkdir()
        with pytest.raises(OutputDirectoryError, match="got one at work"):
            only_writer(path).__enter__()
    with only_writer(path):
        pass
    assert names(tmp_path) == ["new", "new/folder"]


HOLDER = """
import sys, time; from advvl.files import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True); time.sleep(600)
"""


def test_a_writer_that_is_killed_gives_up_its_lock_and_one_that_waits_gets_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "f"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputDirectoryError):
            only_writer(tmp_path / "f").__enter__()
        holder.send_signal(signal.SIGKILL)
        with only_writer(tmp_path / "f", wait=True):
            pass
    assert names(tmp_path) == []


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "x.pt", {"w": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    with pytest.raises(CheckpointError, match=r"y\.pt"):
        read_torch(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' more than once"),
        ("[" * 100_000, "nested too deep"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
    ],
    ids=["twice", "deep", "digits", "empty"],
)
def test_json_that_no_writer_here_makes_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_json(tmp_path / "j.json")
    assert read_json(write_json(tmp_path / "k.json", json.loads('{"a": {"a": 1}}'))) == {"a": {"a": 1}}


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json"):
        read_json(tmp_path / "absent.json")


def test_of_objects_that_differ_their_fields_are_named() -> None:
    found, expected = ({"method": f"Method(maximizer=FreeLB(steps={steps}), note='a')", "seed": 0} for steps in (2, 3))
    assert differences(found, expected) == "method.maximizer.steps (2 there, 3 here)"
    assert differences({"name": "a (b)"}, {"name": "c"}) == "name ('a (b)' there, 'c' here)"
