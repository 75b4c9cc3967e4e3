"""`Database`: the file that jobs are in, opened by one server at a time; every fault in it is one sentence."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, PipeboostError, one_line
from pipeboost.serving.errors import StorageError
from pipeboost.serving.files import storage_errors, write_whole
from pipeboost.serving.jobs import Paths

VERSION = 1
"""Of the schema; kept in the database's `user_version`."""
BUSY_MILLISECONDS = 5000
RESERVE = 2**17
"""Bytes of a file that is there to be deleted, so that jobs can be deleted on a full disk."""
_SCHEMA = (
    """CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL,
        kind TEXT NOT NULL,
        state TEXT NOT NULL,
        ended REAL,
        expires REAL,
        idempotency TEXT NOT NULL,
        digest TEXT NOT NULL,
        job TEXT NOT NULL
    )""",
    "CREATE INDEX by_state ON jobs (state, seq)",
    "CREATE INDEX by_owner ON jobs (owner, seq)",
    "CREATE INDEX by_end ON jobs (ended) WHERE ended IS NOT NULL",
    "CREATE INDEX by_digest ON jobs (owner, digest) WHERE digest != ''",
    "CREATE UNIQUE INDEX by_idempotency ON jobs (owner, idempotency) WHERE idempotency != ''",
    f"PRAGMA user_version = {VERSION}",
)


class Database:
    """One connection, which its owner lets one thread at a time use.

    Raises:
        ConfigurationError: another server has the folder, it cannot be written to or has no room, or its database is
            corrupt or of a newer version.
        StorageError: raised by the methods, where nothing can be read or stored.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._reserve = paths.data / "reserve"
        self._lock: int | None = None
        self._connection: sqlite3.Connection | None = None
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, StorageError):
                raise ConfigurationError(str(error)) from error
            raise

    def _open(self) -> None:
        paths, jobs = self._paths, self._paths.folders
        with storage_errors(paths.data, "cannot be used as the data folder"):
            for folder in (paths.data, jobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(paths.data)
            file = paths.database
            if not (file.exists() and file.stat().st_size) and any(jobs.iterdir()):
                raise ConfigurationError(
                    f"{file} is missing or empty, but {jobs} holds files of jobs; restore it, or move {jobs} away"
                )
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        with self._errors("cannot be opened"):
            self._connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            self._execute(f"PRAGMA busy_timeout = {BUSY_MILLISECONDS}")
            self._execute("PRAGMA journal_mode = WAL")
            self._execute("PRAGMA synchronous = FULL")
            self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
            (pages,), (size,) = (self._execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
            (found,) = self._execute("PRAGMA quick_check(1)").fetchone()
        if file.stat().st_size < pages * size:  # SQLite reads zeros for what is missing of a last page
            found = f"it has {file.stat().st_size} bytes of {pages * size}"
        if found != "ok":
            raise ConfigurationError(f"{file} is corrupt: {found}; restore it, or move the data folder away")
        self._migrate()
        self.check()

    def _migrate(self) -> None:
        file = self._paths.database
        with self.changing() as execute:
            (version,) = execute("PRAGMA user_version").fetchone()
            (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version > VERSION:
                raise ConfigurationError(
                    f"{file} is of a newer pipeboost (schema {version}, known: {VERSION}); update pipeboost, "
                    "or use another data folder"
                )
            if tables and not version:
                raise ConfigurationError(f"{file} is another program's database; use another data folder")
            for statement in () if version else _SCHEMA:
                execute(statement)

    @contextlib.contextmanager
    def changing(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """Run statements that take effect together, on the disk when it ends, or not at all."""
        with self._errors("cannot be written"):
            self._execute("BEGIN IMMEDIATE")
            try:
                yield self._execute
                self._execute("COMMIT")
            except BaseException:
                with contextlib.suppress(PipeboostError, sqlite3.Error):  # already rolled back by SQLite
                    self._execute("ROLLBACK")
                raise

    def rows(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Return the rows of a query."""
        with self._errors("cannot be read"):
            try:
                return self._execute(sql, values).fetchall()
            except UnicodeEncodeError:  # no row has text with half a character, as a client can send
                return []

    def check(self) -> None:
        """Raise the StorageError that storing a small job would end in."""
        with self.changing() as execute:
            execute(f"PRAGMA user_version = {VERSION}")
        write_whole(self._reserve, bytes(RESERVE))

    def make_room(self) -> None:
        """Give up the room that was kept for a change which frees more of it; the next check takes it again."""
        with storage_errors(self._reserve, "cannot be deleted"):
            self._reserve.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and let another server have the folder."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # what cannot be tidied up now is when it is opened again
                self._connection.close()
            self._connection = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        if self._connection is None:
            raise StorageError(f"{self._paths.database} is closed")
        return self._connection.execute(sql, values)

    @contextlib.contextmanager
    def _errors(self, failure: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(f"{self._paths.database} {failure}: {one_line(error)}") from error


def _locked(folder: Path) -> int:
    """Return the open file whose lock holds the folder for as long as this process lives, however it ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigurationError(
            f"another server (process {holder}) has the data folder {folder}; stop it, or use another folder"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
