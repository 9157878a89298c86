"""LMDB files: one environment per path and process, readers that travel, whole or absent, and never a crash."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest
from torch.utils.data import DataLoader

from advvl.data.uniter import lmdb_files
from advvl.data.uniter.lmdb_files import DATA, LmdbFile, open_lmdb, writing_lmdb
from advvl.errors import DataError, OutputDirectoryError


def write(folder: Path, count: int = 3, size: int = 10) -> Path:
    with writing_lmdb(folder) as file:
        for number in range(count):
            file.put(f"k{number}", bytes([number % 256]) * size)
    return folder


class Values:
    """A dataset of the records of a database."""

    def __init__(self, file: LmdbFile) -> None:
        self.file = file

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> int:
        return int(self.file.require(f"k{index}")[0])


def test_what_is_put_is_read_by_its_key(tmp_path: Path) -> None:
    file = open_lmdb(write(tmp_path / "db"))
    assert bytes(file.require("k2")) == b"\x02" * 10
    assert file.get("k3") is None
    assert file.get("") is None
    assert file.get("x" * 1000) is None
    assert list(file) == ["k0", "k1", "k2"]
    assert len(file) == 3


def test_readers_of_a_path_share_one_environment_and_the_last_closes_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "db")
    (tmp_path / "link").symlink_to(folder)
    one, two = open_lmdb(folder), open_lmdb(tmp_path / "link" / ".." / "link")
    assert one is two
    with pytest.raises(lmdb.Error, match="already open"):
        lmdb.open(str(folder), readonly=True, lock=False)
    del one, two
    lmdb.open(str(folder), readonly=True, lock=False).close()


def test_a_database_that_was_replaced_is_not_taken_for_the_open_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "db")
    file = open_lmdb(folder)
    shutil.move(folder, tmp_path / "old")
    write(folder, count=1)
    with pytest.raises(DataError, match="expected the database that was opened"):
        open_lmdb(folder)
    assert len(file) == 3
    del file
    assert len(open_lmdb(folder)) == 1


def test_threads_read_one_database(tmp_path: Path) -> None:
    values = Values(open_lmdb(write(tmp_path / "db", count=50)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(values.__getitem__, [*range(50)] * 4)) == [*range(50)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_read_a_database_that_their_parent_has_open(start: str, tmp_path: Path) -> None:
    values = Values(open_lmdb(write(tmp_path / "db", count=8)))
    assert values[5] == 5
    loader = DataLoader(
        values,  # type: ignore[arg-type]
        batch_size=2,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(start),
    )
    assert [value for batch in loader for value in batch.tolist()] == [*range(8)]


def test_an_unpickled_reader_is_the_open_one(tmp_path: Path) -> None:
    file = open_lmdb(write(tmp_path / "db"))
    assert pickle.loads(pickle.dumps(file)) is file


def test_the_map_grows_with_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_files, "_FIRST_MAP", 1 << 16)
    monkeypatch.setattr(lmdb_files, "_BATCH_BYTES", 1 << 18)
    file = open_lmdb(write(tmp_path / "db", count=40, size=50_000))
    assert len(file) == 40
    assert all(bytes(file.require(f"k{n}")) == bytes([n]) * 50_000 for n in range(40))


def test_a_key_that_is_there_is_refused_however_long_ago_it_was_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (1, 100):
        monkeypatch.setattr(lmdb_files, "_BATCH_RECORDS", batch)
        with pytest.raises(DataError, match="got 'a' twice"), writing_lmdb(tmp_path / "db") as file:
            list(map(file.put, "aba", [b"1"] * 3))
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("key", ["", "x" * 600])
def test_a_key_that_lmdb_does_not_take_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a key of 1 to 511 bytes"), writing_lmdb(tmp_path / "db") as file:
        file.put(key, b"1")


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(100_000), os.urandom(9000)], ids=["empty", "text", "zeros", "random"]
)
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=f"expected an LMDB database in '{tmp_path}'"):
        open_lmdb(tmp_path)


def test_a_folder_without_a_database_is_refused_and_nothing_is_made_in_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"expected a database in .* got no data\.mdb"):
            open_lmdb(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_database_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    """Reading beyond the file's end would be a bus error, which no program survives."""
    folder = write(tmp_path / "db", count=20, size=9000)
    whole = (folder / "data.mdb").read_bytes()
    for size in [*range(0, len(whole), 4096 * 7), len(whole) - 1]:
        (folder / "data.mdb").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"expected an LMDB database|expected \d+ bytes in .*data\.mdb"):
            open_lmdb(folder)
    (folder / "data.mdb").write_bytes(whole)
    assert len(open_lmdb(folder)) == 20


def test_a_damaged_page_takes_no_other_record_with_it(tmp_path: Path) -> None:
    with writing_lmdb(tmp_path / "db") as written:
        for number in range(9):
            written.put(str(number), bytes([number + 1]) * 9000)
    file = tmp_path / "db" / DATA
    content = bytearray(file.read_bytes())
    page = content.index(bytes([5]) * 9000) // 4096 * 4096
    content[page : page + 16] = b"\xff" * 16  # the header of the pages of one record
    file.write_bytes(content)
    reader = open_lmdb(tmp_path / "db")
    before = reader.require("0")
    with pytest.raises(DataError, match=r"expected to read '4' in .*MDB_.*; copy it again"):
        reader.get("4")
    assert [bytes(reader.require(key))[:1] for key in "0123"] == [b"\x01", b"\x02", b"\x03", b"\x04"]
    assert bytes(before) == b"\x01" * 9000


def test_keys_on_a_damaged_page_are_refused_in_words(tmp_path: Path) -> None:
    with writing_lmdb(tmp_path / "db") as written:
        for number in range(900):
            written.put(f"{number:04}", bytes([1]) * 90)
    file = tmp_path / "db" / DATA
    content = bytearray(file.read_bytes())
    page = content.index(b"0500") // 4096 * 4096
    content[page : page + 16] = b"\xff" * 16
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"expected to read all keys in .*MDB_.*; copy it again"):
        list(open_lmdb(tmp_path / "db"))


def test_reading_writes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "db")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "data.mdb").chmod(0o444)
    open_lmdb(folder).require("k0")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


LIMITED = """
import resource, signal, sys
from pathlib import Path
from advvl.data.uniter.lmdb_files import writing_lmdb
from advvl.errors import OutputDirectoryError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
folder = Path(sys.argv[1])
try:
    with writing_lmdb(folder) as file:
        for number in range(100):
            file.put(str(number), bytes(100_000))
except OutputDirectoryError as error:
    assert str(folder) in str(error) and "make room" in str(error), error
    assert list(folder.parent.iterdir()) == []
    print("refused")
"""


@pytest.mark.slow
def test_a_full_disk_is_a_refusal_that_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files gives the error that a full disk gives, in the middle of a write."""
    ran = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "db"], capture_output=True, text=True)
    assert ran.stdout == "refused\n", ran.stderr


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    with pytest.raises(OutputDirectoryError, match=r"expected nothing at '.*db'"):
        write(tmp_path / "db")
    assert list((tmp_path / "db").iterdir()) == []


@pytest.mark.slow
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed = "import os, sys; from advvl.data.uniter.lmdb_files import writing_lmdb\n"
    killed += "with writing_lmdb(sys.argv[1]) as file: file.put('a', b'1'); os._exit(1)"
    subprocess.run([sys.executable, "-c", killed, tmp_path / "db"])
    assert any(path.name.endswith(".unfinished") for path in tmp_path.iterdir())
    assert not (tmp_path / "db").exists()
    write(tmp_path / "db")
    assert [path.name for path in tmp_path.iterdir()] == ["db"]


def test_one_process_at_a_time_writes_a_database(tmp_path: Path) -> None:
    with writing_lmdb(tmp_path / "db") as file:
        with pytest.raises(OutputDirectoryError, match="expected no other process to write"):
            write(tmp_path / "db")
        file.put("a", b"1")
    assert len(open_lmdb(tmp_path / "db")) == 1
