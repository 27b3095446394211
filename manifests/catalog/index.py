"""Keeps the DuckDB file behind a catalog: a private index of a workspace's commit log.

Each process has one of its own, in the user's cache folder: the first `index-<n>.duckdb` that no other process holds.
It replays what the log has since. If it does not fit the log, or proves torn, it is thrown away and rebuilt from the newest
checkpoint of the log.
"""

import contextlib
import fcntl
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from manifests.catalog import index_checkpoint, replay
from manifests.errors import ShardError
from manifests.log import entries as log
from manifests.log.interrupts import held_back
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage

_BATCH_ENTRIES = 500
# New entries wait until somebody asks, or until they are so many actions: a commit is durable by its entry alone.
_MOST_PENDING = 4000
_NEWEST = (1 << 63) - 1
Answer = TypeVar("Answer")


class Index:
    """Holds an index of the log, at `version` with that entry's `sha256`; in memory if the folder cannot be written.

    One thread at a time; do not fork with it open.
    """

    connection: duckdb.DuckDBPyConnection
    version: int
    sha256: str | None

    def __init__(self, storage: Storage, folder: Path, *, from_log_alone: bool = False) -> None:
        """Opens the index; with `from_log_alone` it uses no checkpoint."""
        self._storage = storage
        self._from_log_alone = from_log_alone
        self._lock, self._path = _free_file(folder)
        self._pending: list[log.Entry] = []
        self._as_of = _NEWEST
        try:
            if not self._take_up():
                self._start()
            self.refresh()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the file."""
        if hasattr(self, "connection"):
            # What waits is in the log; the next process replays it if this fails.
            with contextlib.suppress(duckdb.Error, RuntimeError):
                self._apply_pending()
            self.connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refresh(self) -> int:
        """Replays what the log has since; the version the index is at then."""
        self._mending(self._replay)
        return self.version

    def apply(self, entry: log.Entry) -> None:
        """Takes the next entry of the log; it is in `connection` when the next question is asked."""
        self._pending.append(entry)
        self.version, self.sha256 = entry.version, entry.sha256
        if sum(len(waiting.actions) for waiting in self._pending) >= _MOST_PENDING:
            self._mending(self._apply_pending)

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """Returns the answer to a question put to `connection`, which is put again if the file proves torn."""

        def put() -> Answer:
            self._apply_pending()
            return question()

        return self._mending(put)

    def look_at(self, version: int | None) -> None:
        """Sets the version that `state` and the views answer for; None is the newest, whatever comes."""
        self._as_of = _NEWEST if version is None else version
        self.connection.execute(f"SET VARIABLE as_of = {self._as_of}::BIGINT")

    def write_checkpoint(self) -> None:
        """Writes a checkpoint of the log at its newest version."""
        newest = self.sha256
        if newest is not None:
            self.ask(
                lambda: index_checkpoint.write(
                    self._storage, self.connection, version=self.version, sha256=newest, made_by=_script()[1]
                )
            )

    def _mending(self, work: Callable[[], Answer]) -> Answer:
        """Does the work; if a block of the file proves torn, does it again in a new index that is at the end of the log."""
        try:
            return work()
        except RuntimeError as error:
            # DuckDB answers Ctrl-C in the middle of a query with an error of its own.
            if "interrupted" in str(error).lower():
                raise KeyboardInterrupt from error
            raise
        except duckdb.Error as error:
            if self._path is None or not _is_torn(error, self._path):
                raise
        # Only here has the error let go of its frames, which hold the old file open.
        if not self._rebuilds():
            # The disk is full: what the file cannot take, memory can.
            self.connection.close()
            self._remove_file()
            self._path = None
            self._start()
            self._replay()
        return work()

    def _rebuilds(self) -> bool:
        """Begins a new index and brings it to the end of the log; False if its file fails again."""
        self.connection.close()
        self._pending = []
        self._start()
        try:
            self._replay()
        except duckdb.Error as error:
            if self._path is None or not _is_torn(error, self._path):
                raise
            return False
        return True

    def _take_up(self) -> bool:
        """Opens the file that an earlier process left, if it fits the log so far."""
        if self._path is None or not self._path.exists():
            return False
        connection = None
        with contextlib.suppress(duckdb.Error):  # Of another DuckDB, torn, or half made: the log has all that it had.
            connection = _connect(self._path)
            made_by = connection.execute("SELECT value FROM log.made_by").fetchall()
            newest = "SELECT version, sha256 FROM log.applied ORDER BY version DESC LIMIT 1"
            version, sha256 = next(iter(connection.execute(newest).fetchall()), (0, None))
            entry = log.read_entry(self._storage, version) if version else None
            if made_by == [(_script()[1],)] and (not version or (entry is not None and entry.sha256 == sha256)):
                self._use(connection, version, sha256)
                return True
        if connection is not None:
            connection.close()
        return False

    def _start(self) -> None:
        """Begins an empty index, in place of the file that may be there."""
        if self._path is not None:
            try:
                self._remove_file()
                return self._use(_made(self._path), 0, None)
            except (OSError, duckdb.Error):
                self._path = None  # The disk is full, or the file is another user's.
        self._use(_made(None), 0, None)

    def _remove_file(self) -> None:
        if self._path is not None:
            for stale in (self._path, self._path.with_name(self._path.name + ".wal")):
                stale.unlink(missing_ok=True)

    def _use(self, connection: duckdb.DuckDBPyConnection, version: int, sha256: str | None) -> None:
        if not self._storage.is_local:
            connection.register_filesystem(self._storage.unchanging())
        connection.execute(f"SET VARIABLE as_of = {self._as_of}::BIGINT")
        self.connection, self.version, self.sha256 = connection, version, sha256

    def _load_checkpoint(self) -> None:
        """Fills the empty index from the newest checkpoint that fits the log, if there is one."""
        found = index_checkpoint.newest(self._storage, _script()[1])
        entry = None if found is None else log.read_entry(self._storage, found.version)
        if found is None or entry is None or entry.sha256 != found.sha256:
            return
        try:
            with held_back(), transaction(self.connection):
                index_checkpoint.load(self.connection, found)
        except (duckdb.Error, ShardError):
            return  # The log has all that it had.
        self.version, self.sha256 = found.version, found.sha256

    def _apply_pending(self) -> None:
        while self._pending:
            batch = self._pending[:_BATCH_ENTRIES]
            self._apply(batch)
            del self._pending[: len(batch)]

    def _replay(self) -> None:
        self._apply_pending()
        if not self.version and not self._from_log_alone:
            self._load_checkpoint()
        batch: list[log.Entry] = []
        is_long = False
        with replay.no_collection():
            for entry in log.entries(self._storage, after=self.version, previous=self.sha256):
                batch.append(entry)
                if len(batch) == _BATCH_ENTRIES:
                    self._apply(batch)
                    batch, is_long = [], True
            if batch:
                self._apply(batch)
        if is_long and self._path is not None:
            # Look-ups are slower by half as long as much of the file is in its WAL.
            self.connection.execute("CHECKPOINT")

    def _apply(self, batch: Sequence[log.Entry]) -> None:
        """Puts entries into the index, in one transaction."""
        with held_back():
            with transaction(self.connection):
                replay.apply(self.connection, batch)
            if batch[-1].version > self.version:
                self.version, self.sha256 = batch[-1].version, batch[-1].sha256


@contextlib.contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commits what the block does, or takes it back if the block fails."""
    connection.execute("BEGIN")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(duckdb.Error):
            connection.execute("ROLLBACK")
        raise


def _free_file(folder: Path) -> tuple[int | None, Path | None]:
    """Returns the first index file that no other process holds, locked; None (an index in memory) if none can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(64):
            # The lock is a file of our own: DuckDB's lock on its file is lost when anything else opens and closes that.
            descriptor = os.open(folder / f"index-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    continue
                raise
            return descriptor, folder / f"index-{number}.duckdb"
    except OSError:
        pass
    return None, None


def _connect(path: Path | None) -> duckdb.DuckDBPyConnection:
    settings: dict[str, Any] = {
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        "python_enable_replacements": False,
    }
    if path is None:
        return duckdb.connect(":memory:", config=settings)
    return duckdb.connect(str(path), config={**settings, "storage_compatibility_version": "v1.4.0"})


def _made(path: Path | None) -> duckdb.DuckDBPyConnection:
    """Returns a connection to a new, empty index."""
    script, digest = _script()
    connection = _connect(path)
    try:
        connection.execute(f"BEGIN; {script}; CREATE TABLE log.made_by AS SELECT '{digest}' AS value; COMMIT")
    except duckdb.Error:
        connection.close()
        raise
    return connection


def made_by() -> str:
    """Returns what an index or a checkpoint is marked with: the digest of the tables and views of this code."""
    return _script()[1]


@functools.cache
def _script() -> tuple[str, str]:
    """Returns the tables and views, with the digest that tells an index of other ones."""
    folder = resources.files("manifests.catalog")
    script = "\n".join(folder.joinpath(name).read_text() for name in ("schema.sql", "views.sql", "history.sql"))
    return script, sha256_hex(script.encode())


def _is_torn(error: duckdb.Error, path: Path) -> bool:
    """Tells whether an error says that the index file itself is broken or cut, or that DuckDB gave it up."""
    given_up = (duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
    return isinstance(error, given_up) or "Corrupt database file" in str(error) or str(path) in str(error)
