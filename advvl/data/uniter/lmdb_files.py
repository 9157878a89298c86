"""LMDB databases: each open once per process for all its readers; written in a folder of another name, then renamed.

lmdb opens a path only once per process, and a forked child counts as the same process: all readers of a path share one
environment, and a child keeps using the one that it inherited. A pickled reader, as for a spawned worker, opens the
path when it is unpickled.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

from advvl.checks import path_of, shown
from advvl.errors import DataError, OutputDirectoryError, missing_extra
from advvl.files import file_creation_mask, only_writer, writing_to

try:
    import lmdb
except ImportError as error:
    raise missing_extra("lmdb", "uniter") from error

DATA: Final = "data.mdb"
_FIRST_MAP: Final = 1 << 24  # bytes; doubled as often as needed
_BATCH_BYTES: Final = 1 << 24
_BATCH_RECORDS: Final = 1000
_UNFINISHED: Final = ".unfinished"

_open: WeakValueDictionary[str, LmdbFile] = WeakValueDictionary()
_opening = threading.Lock()


class LmdbFile:
    """A database open for reading, made by `open_lmdb` and closed when its last reader is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = _identity(folder)
        try:
            self._environment = lmdb.open(
                str(folder), readonly=True, create=False, lock=False, max_readers=1, max_spare_txns=4
            )
            pages = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
        except lmdb.Error as error:
            raise DataError(
                f"expected an LMDB database in {str(folder)!r}, got {error}; check the path, or copy it again"
            ) from error
        size = (folder / DATA).stat().st_size
        if size < pages:  # reading a missing page would end the process
            raise DataError(
                f"expected {pages} bytes in {str(folder / DATA)!r}, got {size}; it was cut short: copy it again"
            )
        self._threads = threading.local()
        self._ended: list[Any] = []

    def get(self, key: str) -> memoryview | None:
        """Return the record of that key, None if there is none; the view is valid as long as the reader exists."""
        try:
            view: memoryview | None = self._transaction.get(key.encode(errors="surrogatepass"))
        except lmdb.BadValsizeError:  # an empty key, or one longer than any that a database can hold
            return None
        except lmdb.Error as error:
            raise self._damaged(shown(key), error) from error
        return view

    def require(self, key: str) -> memoryview:
        """Return the record of that key.

        Raises:
            DataError: there is none.
        """
        view = self.get(key)
        if view is None:
            raise DataError(f"expected a record {shown(key)} in {str(self.folder)!r}, got none; is it another split's?")
        return view

    def __iter__(self) -> Iterator[str]:
        """All keys, in their order in the database, that of their bytes.

        Raises:
            DataError: a damaged file.
        """
        try:
            with self._transaction.cursor() as cursor:
                for key in cursor.iternext(values=False):
                    yield bytes(key).decode(errors="replace")
        except lmdb.Error as error:
            raise self._damaged("all keys", error) from error

    def __len__(self) -> int:
        return int(self._environment.stat()["entries"])

    @property
    def _transaction(self) -> Any:
        """This thread's view of the database; a single one, because the database is never written."""
        if not hasattr(self._threads, "transaction"):
            self._threads.transaction = self._environment.begin(buffers=True)
        return self._threads.transaction

    def _damaged(self, what: str, error: Exception) -> DataError:
        """An error of reading, after which other records can be read; views of those read before stay good."""
        self._ended.append(self._transaction)  # it is of no more use, and its views are
        vars(self._threads).pop("transaction", None)
        return DataError(f"expected to read {what} in {str(self.folder)!r}, got {error}; copy it again")

    def __reduce__(self) -> tuple[Any, ...]:
        return open_lmdb, (self.folder,)


def open_lmdb(folder: str | os.PathLike[str]) -> LmdbFile:
    """Open a database for reading, or return the reader of it that is open.

    Raises:
        DataError: a folder without one, a file of another format or cut short, one that was replaced while it was open.
    """
    folder = path_of(folder)
    real = os.path.realpath(folder)
    with _opening:
        found = _open.get(real)
        if found is None:
            found = _open[real] = LmdbFile(folder)
        elif found.identity != _identity(folder):
            raise DataError(f"expected the database that was opened in {str(folder)!r}, got another; open it elsewhere")
    return found


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = (folder / DATA).stat()
    except OSError as error:
        raise DataError(
            f"expected a database in {str(folder)!r}, got no {DATA}: {error.strerror}; check the path"
        ) from error
    return found.st_dev, found.st_ino


class LmdbWriter:
    """A new database, to which records are added; made by `writing_lmdb`."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.temporary = folder, temporary
        self._size = _FIRST_MAP
        self._environment = lmdb.open(str(temporary), map_size=self._size, sync=False, metasync=False)
        self._pending: dict[bytes, bytes] = {}
        self._bytes = 0

    def put(self, key: str, value: bytes) -> None:
        """Add a record.

        Raises:
            DataError: a key that the database has, that is empty, or is longer than LMDB takes.
            OutputDirectoryError: the file system refuses.
        """
        name = key.encode(errors="surrogatepass")
        longest = self._environment.max_key_size()
        if not 0 < len(name) <= longest or name != key.encode(errors="replace"):
            raise DataError(
                f"expected a key of 1 to {longest} bytes in {str(self.folder)!r}, got {shown(key)}; rename it"
            )
        if name in self._pending or self._has(name):
            raise DataError(f"expected every key once in {str(self.folder)!r}, got {key!r} twice; leave one out")
        self._pending[name] = value
        self._bytes += len(value)
        if self._bytes >= _BATCH_BYTES or len(self._pending) >= _BATCH_RECORDS:
            self._flush()

    def add_file(self, name: str, content: bytes) -> None:
        """Write a file beside the database's own."""
        with open(self.temporary / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self, *, whole: bool) -> None:
        """Close the database; if it is to be `whole`, once all records are on the disk."""
        if whole:
            self._flush()
            self._environment.sync(True)
        self._environment.close()

    def _has(self, name: bytes) -> bool:
        with self._environment.begin() as transaction:
            return transaction.get(name) is not None

    def _flush(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for name, value in self._pending.items():
                        transaction.put(name, value)
                break
            except lmdb.MapFullError:
                self._size *= 2
                self._environment.set_mapsize(self._size)
        self._pending, self._bytes = {}, 0


@contextmanager
def writing_lmdb(folder: str | os.PathLike[str]) -> Iterator[LmdbWriter]:
    """Write a new database in `folder`, which appears once the block has ended without an error.

    Missing parents are made. Leftovers of a killed writer of the same folder are removed.

    Raises:
        OutputDirectoryError: there is something at `folder`; another process writes it; the file system refuses.
    """
    folder = path_of(folder)
    prefix = f".advvl-{folder.name}-"
    with only_writer(folder), _writing(folder):
        refuse_existing(folder)
        for leftover in folder.parent.glob(f"{glob.escape(prefix)}*{_UNFINISHED}"):
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=_UNFINISHED))
        try:
            writer = LmdbWriter(folder, temporary)
            try:
                yield writer
            except BaseException:
                writer.close(whole=False)
                raise
            writer.close(whole=True)
            os.chmod(temporary, 0o777 & ~file_creation_mask())
            refuse_existing(folder)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn errors of the file system and of LMDB into an OutputDirectoryError."""
    try:
        with writing_to(folder):
            yield
    except lmdb.Error as error:
        raise OutputDirectoryError(
            f"expected to write {str(folder)!r}, got {error}; make room, or choose another place"
        ) from error


def refuse_existing(path: Path) -> None:
    """Raise OutputDirectoryError where there is something at `path`."""
    if os.path.lexists(path):
        raise OutputDirectoryError(f"expected nothing at {str(path)!r}, got something; remove it, or write elsewhere")
