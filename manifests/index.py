"""The DuckDB file behind a catalog: a private index of a workspace's commit log.

Each process has one of its own, in the user's cache folder: the first `index-<n>.duckdb` that no other process holds.
It replays what the log has since; where it does not fit the log, or proves torn, it is thrown away and made anew.
"""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from manifests import actions, log
from manifests.interrupts import held_back
from manifests.recipe import sha256_hex
from manifests.storage import Storage

BLOBS = {"sha256", "keys_sha256", "failed_sha256"}
_BATCH_ENTRIES = 500
# What tells two live records of a kind apart; a later one ends the earlier.
_REPLACES = {
    actions.ShardAdded: ("corpus", "part", "crop", "modality", "form", "fingerprint"),
    actions.RecipeCurrent: ("corpus", "modality", "form"),
    actions.TokenizerAdded: ("name",),
}
_TABLES = {kind: "log." + name for name, kind in actions.KINDS.items()}
Answer = TypeVar("Answer")


class Index:
    """An index of the log, at `version` with that entry's `sha256`; in memory where the folder cannot be written.

    One thread at a time; do not fork with it open.
    """

    connection: duckdb.DuckDBPyConnection
    version: int
    sha256: str | None

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._lock, self._path = _free_file(folder)
        self._columns: dict[str, dict[str, str]] = {}
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
            self.connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refresh(self) -> int:
        """Replays what the log has since; the version the index is at then."""
        self._mending(self._replay)
        return self.version

    def apply(self, entry: log.Entry) -> None:
        """Puts the next entry of the log into the index."""
        self._mending(lambda: self._apply([entry]))

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """The answer to a question put to `connection`, which is put again where the file proves torn."""
        answers: list[Answer] = []
        self._mending(lambda: answers.append(question()))
        return answers[0] if answers else question()

    def _mending(self, work: Callable[[], None]) -> None:
        """Does the work; where a block of the file proves torn, brings a new index to the end of the log instead."""
        try:
            work()
            return
        except RuntimeError as error:
            # DuckDB answers Ctrl-C in the middle of a query with an error of its own.
            if "interrupted" in str(error).lower():
                raise KeyboardInterrupt from error
            raise
        except duckdb.Error as error:
            if self._path is None or not _is_torn(error, self._path):
                raise
        # Only here has the error let go of its frames, which hold the old file open.
        self.connection.close()
        self._start()
        self._replay()

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
                for stale in (self._path, self._path.with_name(self._path.name + ".wal")):
                    stale.unlink(missing_ok=True)
                return self._use(_made(self._path), 0, None)
            except (OSError, duckdb.Error):
                self._path = None  # The disk is full, or the file is another user's.
        self._use(_made(None), 0, None)

    def _use(self, connection: duckdb.DuckDBPyConnection, version: int, sha256: str | None) -> None:
        if not self._storage.is_local:
            connection.register_filesystem(self._storage.fs)
        self.connection, self.version, self.sha256 = connection, version, sha256

    def _replay(self) -> None:
        batch: list[log.Entry] = []
        for entry in log.entries(self._storage, after=self.version, previous=self.sha256):
            batch.append(entry)
            if len(batch) == _BATCH_ENTRIES:
                self._apply(batch)
                batch = []
        if batch:
            self._apply(batch)

    def _apply(self, batch: Sequence[log.Entry]) -> None:
        """Puts entries into the index, in one transaction."""
        rows: dict[type[actions.Action], list[dict[str, Any]]] = {}
        for entry in batch:
            for document in entry.actions:
                action = actions.from_json(document)
                if action is not None:
                    row = {"version": entry.version, "run": entry.run, **vars(action)}
                    rows.setdefault(type(action), []).append(row)
        with held_back():
            self.connection.execute("BEGIN")
            try:
                self._insert(
                    "log.applied",
                    [{**vars(entry), "actions": len(entry.actions)} for entry in batch],
                    blobs=False,
                )
                for kind, records in rows.items():
                    if kind in _REPLACES:
                        self._replace(kind, records)
                    self._insert(_TABLES[kind], records)
                self.connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(duckdb.Error):
                    self.connection.execute("ROLLBACK")
                raise
            self.version, self.sha256 = batch[-1].version, batch[-1].sha256

    def _replace(self, kind: type[actions.Action], records: list[dict[str, Any]]) -> None:
        """Ends the live records that the new ones replace, in the table and among the new ones themselves."""
        keys = _REPLACES[kind]
        first: dict[tuple[Any, ...], dict[str, Any]] = {}
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        for record in records:
            identity = tuple(record[key] for key in keys)
            if identity in newest:
                newest[identity]["end_version"] = record["version"]
            first.setdefault(identity, record)
            newest[identity] = record
            record["end_version"] = None
        columns = [*keys, "version"]
        types = self._types(_TABLES[kind])
        arriving = ", ".join(f"unnest(?::{types[name]}[]) AS {name}" for name in columns)
        same = " AND ".join(f"old.{key} IS NOT DISTINCT FROM replacing.{key}" for key in keys)
        self.connection.execute(
            f"UPDATE {_TABLES[kind]} old SET end_version = replacing.version FROM (SELECT {arriving}) replacing "
            f"WHERE old.end_version IS NULL AND {same}",
            [[record[name] for record in first.values()] for name in columns],
        )

    def _insert(self, table: str, records: list[dict[str, Any]], *, blobs: bool = True) -> None:
        # Columns go in as lists, not as Arrow: making an Arrow array imports pandas where that is installed (seconds).
        types = self._types(table)
        arriving = ", ".join(f"unnest(?::{kind}[])" for kind in types.values())
        names = ", ".join(f'"{name}"' for name in types)
        self.connection.execute(
            f"INSERT INTO {table} ({names}) SELECT {arriving}",
            [[_plain(name, record.get(name), blobs) for record in records] for name in types],
        )

    def _types(self, table: str) -> dict[str, str]:
        """The columns of a table, name to type."""
        if table not in self._columns:
            described = self.connection.execute(f"DESCRIBE {table}").fetchall()
            self._columns[table] = {name: kind for name, kind, *_ in described}
        return self._columns[table]


def _plain(name: str, value: Any, blobs: bool) -> Any:
    """A value as its column holds it: hashes as bytes, documents as JSON text, times without the Z."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    if name == "time" and value is not None:
        return value.removesuffix("Z")
    if blobs and name in BLOBS and value is not None:
        return bytes.fromhex(value)
    return value


def _free_file(folder: Path) -> tuple[int | None, Path | None]:
    """The first index file that no other process holds, locked; None (an index in memory) where none can be written."""
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
    """A connection to a new, empty index."""
    script, digest = _script()
    connection = _connect(path)
    try:
        connection.execute(f"BEGIN; {script}; CREATE TABLE log.made_by AS SELECT '{digest}' AS value; COMMIT")
    except duckdb.Error:
        connection.close()
        raise
    return connection


@functools.cache
def _script() -> tuple[str, str]:
    """The tables and views, with the digest that tells an index of other ones."""
    folder = resources.files("manifests")
    script = "\n".join(folder.joinpath(name).read_text() for name in ("schema.sql", "views.sql"))
    return script, sha256_hex(script.encode())


def _is_torn(error: duckdb.Error, path: Path) -> bool:
    """Whether an error says that the index file itself is broken or cut, or that DuckDB gave it up."""
    given_up = (duckdb.FatalException, duckdb.InternalException, duckdb.SerializationException)
    return isinstance(error, given_up) or "Corrupt database file" in str(error) or str(path) in str(error)
