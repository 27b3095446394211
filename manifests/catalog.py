"""The DuckDB index of a workspace's commit log: everything that is asked of a workspace is asked here.

Each process has an index of its own, in the user's cache folder: the first `index-<n>.duckdb` that no other process
holds. It replays what the log has since; where it does not fit the log it is thrown away and made anew. With
`schema.sql` and `views.sql` this is the only SQL of modmill.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from manifests import actions, content, log
from manifests.errors import LogError, QueryError
from manifests.modality import Form
from manifests.storage import Storage, open_storage

_INDEX_VERSION = 1
_BATCH_ENTRIES = 500
_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}
_BLOBS = {"sha256", "keys_sha256", "failed_sha256"}
# What tells two live records of a kind apart; a later one ends the earlier.
_REPLACES = {
    actions.ShardAdded: ("corpus", "part", "crop", "modality", "form", "fingerprint"),
    actions.RecipeCurrent: ("corpus", "modality", "form"),
    actions.TokenizerAdded: ("name",),
}
_TABLES = {kind: "log." + name for name, kind in actions.KINDS.items()}


def cache_folder() -> Path:
    """Where private indexes live: $MODMILL_CACHE, else $XDG_CACHE_HOME/modmill, else ~/.cache/modmill."""
    if own := os.environ.get("MODMILL_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modmill"


class Catalog:
    """An index of one workspace, and the way to commit to its log.

    One thread at a time; do not fork with it open.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.workspace_id = log.workspace_id(storage)
        self._lock, self._path = _free_index(cache_folder() / self.workspace_id)
        self._connection, self.version, self._sha256 = self._open()
        self.refresh()

    @classmethod
    def open(cls, uri: str | Path) -> Self:
        """The catalog of the workspace at a folder or URI. Raises WorkspaceError where there is none."""
        return cls(open_storage(uri))

    def close(self) -> None:
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the log ------------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Replays what the log has since; the version the index is at then."""
        batch: list[log.Entry] = []
        for entry in log.entries(self.storage, after=self.version, previous=self._sha256):
            batch.append(entry)
            if len(batch) == _BATCH_ENTRIES:
                self._apply(batch)
                batch = []
        if batch:
            self._apply(batch)
        return self.version

    def commit(self, new: Sequence[actions.Action], *, run: str) -> int:
        """Commits actions to the log and the index, all or none; the version they got."""
        documents = [actions.to_json(action) for action in new]
        while True:
            entry = log.append(self.storage, documents, run=run, after=self.version, previous=self._sha256)
            if entry is not None:
                self._apply([entry])
                return entry.version
            before = self.version
            if self.refresh() == before:
                raise LogError(
                    f"{self.storage.uri}: version {before + 1} is taken and cannot be read; see `modmill verify`"
                )

    # -- questions ----------------------------------------------------------------------------------------------------

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """The answer to a query over the views, as an Arrow table. Raises QueryError with DuckDB's own message."""
        try:
            for statement in self._connection.extract_statements(query):
                if statement.type not in _READING:
                    kind = statement.type.name
                    raise QueryError(f"{kind} is refused: a workspace is only read by SQL: {statement.query.strip()}")
            for name in content.views_named(query):
                self._make_content_view(name)
            return self._arrow(query, parameters)
        except duckdb.Error as error:
            raise QueryError(str(error).strip()) from error

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        return self._arrow(query, parameters).to_pylist()

    def _arrow(self, query: str, parameters: Sequence[Any]) -> pa.Table:
        relation = self._connection.sql(query, params=list(parameters))
        return pa.table({}) if relation is None else relation.to_arrow_table()

    def corpora(self) -> list[dict[str, Any]]:
        """Rows of the view `corpora`."""
        return self._rows("SELECT * FROM corpora")

    def parts(self, corpus: str) -> list[actions.PartAdded]:
        """The parts of a corpus, in order."""
        rows = self._rows("SELECT * FROM log.part WHERE corpus = ? ORDER BY part", [corpus])
        return [_record(actions.PartAdded, row) for row in rows]

    def live_shards(self, corpus: str | None = None) -> list[actions.ShardAdded]:
        """Every live shard, of one corpus or of all, in a fixed order."""
        rows = self._rows(
            "SELECT * FROM log.shard WHERE end_version IS NULL AND (? IS NULL OR corpus = ?) "
            "ORDER BY corpus, part, modality, form, fingerprint, crop",
            [corpus, corpus],
        )
        return [_record(actions.ShardAdded, row) for row in rows]

    def current_recipes(self, corpus: str) -> dict[tuple[str, Form], actions.RecipeCurrent]:
        """The current recipe of each modality and form of a corpus."""
        rows = self._rows("SELECT * FROM log.current WHERE end_version IS NULL AND corpus = ?", [corpus])
        return {(row["modality"], row["form"]): _record(actions.RecipeCurrent, row) for row in rows}

    def known_recipes(self) -> set[str]:
        """The fingerprints in the log."""
        return {row["fingerprint"] for row in self._rows("SELECT DISTINCT fingerprint FROM log.recipe")}

    def tokenizer(self, name: str) -> actions.TokenizerAdded | None:
        """The tokenizer of that name that is in use, None where none was fitted yet."""
        rows = self._rows("SELECT * FROM log.tokenizer WHERE end_version IS NULL AND name = ?", [name])
        return _record(actions.TokenizerAdded, rows[0]) if rows else None

    def tokenizers(self) -> list[actions.TokenizerAdded]:
        """Every tokenizer in use."""
        rows = self._rows("SELECT * FROM log.tokenizer WHERE end_version IS NULL ORDER BY name")
        return [_record(actions.TokenizerAdded, row) for row in rows]

    def status(self) -> pa.Table:
        """What `modmill status` shows: corpus by modality, parts done, failed, missing."""
        return self.sql(
            "SELECT corpus, modality, form, recipe, crops, parts, parts_done AS done, parts_missing AS missing, "
            "rows, ok, failed, absent, tokens, round(size_bytes / 1e6, 2) AS mb FROM coverage"
        )

    def coverage(self) -> list[dict[str, Any]]:
        """Rows of the view `coverage`."""
        return self._rows("SELECT * FROM coverage")

    # -- the index ----------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[duckdb.DuckDBPyConnection, int, str | None]:
        """A connection to an index that fits the log so far, with its version and that entry's sha256."""
        if self._path is not None and self._path.exists():
            try:
                connection = _connect(self._path)
                found = connection.execute("SELECT value FROM log.index_version").fetchall()
                newest = "SELECT version, sha256 FROM log.applied ORDER BY version DESC LIMIT 1"
                version, sha256 = next(iter(connection.execute(newest).fetchall()), (0, None))
                entry = log.read_entry(self.storage, version) if version else None
                if found == [(_INDEX_VERSION,)] and (not version or (entry is not None and entry.sha256 == sha256)):
                    return connection, version, sha256
                connection.close()
            except duckdb.Error:
                pass  # An index of another DuckDB, torn, or half made: nothing in it is not in the log.
            _discard(self._path)
        connection = _connect(self._path)
        connection.execute("BEGIN")
        connection.execute(resources.files("manifests").joinpath("schema.sql").read_text())
        connection.execute(resources.files("manifests").joinpath("views.sql").read_text())
        connection.execute(f"CREATE TABLE log.index_version AS SELECT {_INDEX_VERSION} AS value")
        connection.execute("COMMIT")
        return connection, 0, None

    def _apply(self, batch: Sequence[log.Entry]) -> None:
        """Puts entries into the index, in one transaction."""
        rows: dict[type[actions.Action], list[dict[str, Any]]] = {}
        for entry in batch:
            for document in entry.actions:
                action = actions.from_json(document)
                if action is not None:
                    row = {"version": entry.version, "run": entry.run, **vars(action)}
                    rows.setdefault(type(action), []).append(row)
        self._connection.execute("BEGIN")
        try:
            self._insert(
                "log.applied",
                [
                    {
                        "version": entry.version,
                        "txn": entry.txn,
                        "run": entry.run,
                        "time": entry.time,
                        "sha256": entry.sha256,
                        "actions": len(entry.actions),
                    }
                    for entry in batch
                ],
                blobs=False,
            )
            for kind, records in rows.items():
                if kind in _REPLACES:
                    self._replace(kind, records)
                self._insert(_TABLES[kind], records)
            self._connection.execute("COMMIT")
        except duckdb.Error:
            self._connection.execute("ROLLBACK")
            raise
        self.version, self._sha256 = batch[-1].version, batch[-1].sha256

    def _replace(self, kind: type[actions.Action], records: list[dict[str, Any]]) -> None:
        """Ends the live records that the new ones replace, in the table and among the new ones themselves."""
        keys = _REPLACES[kind]
        newest: dict[tuple[Any, ...], dict[str, Any]] = {}
        for record in records:
            identity = tuple(record[key] for key in keys)
            if identity in newest:
                newest[identity]["end_version"] = record["version"]
            newest[identity] = record
            record["end_version"] = None
        columns = [*keys, "version"]
        types = self._types(_TABLES[kind])
        arriving = ", ".join(f"unnest(?::{types[name]}[]) AS {name}" for name in columns)
        same = " AND ".join(f"old.{key} IS NOT DISTINCT FROM replacing.{key}" for key in keys)
        self._connection.execute(
            f"UPDATE {_TABLES[kind]} old SET end_version = replacing.version FROM (SELECT {arriving}) replacing "
            f"WHERE old.end_version IS NULL AND {same}",
            [[record[name] for record in newest.values()] for name in columns],
        )

    def _insert(self, table: str, records: list[dict[str, Any]], *, blobs: bool = True) -> None:
        # Columns go in as lists, not as Arrow: making an Arrow array imports pandas where that is installed (seconds).
        types = self._types(table)
        arriving = ", ".join(f"unnest(?::{kind}[])" for kind in types.values())
        names = ", ".join(f'"{name}"' for name in types)
        self._connection.execute(
            f"INSERT INTO {table} ({names}) SELECT {arriving}",
            [[_plain(name, record.get(name), blobs) for record in records] for name in types],
        )

    def _types(self, table: str) -> dict[str, str]:
        """The columns of a table, name to type."""
        return {name: kind for name, kind, *_ in self._connection.execute(f"DESCRIBE {table}").fetchall()}

    # -- views over Parquet -------------------------------------------------------------------------------------------

    def _make_content_view(self, name: str) -> None:
        """(Re)makes one view over the Parquet files that are live now."""
        if not self.storage.is_local:
            self._connection.register_filesystem(self.storage.fs)
        files = [(self.storage.location(path), corpus, part) for path, corpus, part in self._content_files(name)]
        self._connection.execute(
            f"CREATE OR REPLACE TEMP TABLE file_of_{name} AS "
            "SELECT unnest(?::VARCHAR[]) AS filename, unnest(?::VARCHAR[]) AS corpus, unnest(?::INTEGER[]) AS part",
            [[file for file, _, _ in files], [corpus for _, corpus, _ in files], [part for _, _, part in files]],
        )
        self._connection.execute(content.view_sql(name, [file for file, _, _ in files]))

    def _content_files(self, name: str) -> list[tuple[str, str, int]]:
        if name == "samples":
            query = "SELECT path, corpus, part FROM log.part ORDER BY corpus, part"
        elif name == "failures":
            query = (
                "SELECT failed_path, corpus, part FROM shards WHERE is_current AND failed_path IS NOT NULL "
                "ORDER BY corpus, part, modality, form, crop"
            )
        else:
            modality = content.MODALITY_OF_VIEW[name]
            query = (
                "SELECT path, corpus, part FROM shards WHERE is_current AND form = 'label' AND format = 'parquet' "
                f"AND modality = '{modality}' ORDER BY corpus, part"
            )
        return self._connection.execute(query).fetchall()


def _record(kind: type[actions.AnyAction], row: dict[str, Any]) -> actions.AnyAction:
    """An action from a row of its table."""
    values = {}
    for item in fields(kind):
        value = row[item.name]
        if item.name in _BLOBS and isinstance(value, bytes):
            value = value.hex()
        elif item.name in ("config", "document", "options", "metrics") and isinstance(value, str):
            value = json.loads(value)
        values[item.name] = value
    return kind(**values)


def _plain(name: str, value: Any, blobs: bool) -> Any:
    """A value as its column holds it: hashes as bytes, documents as JSON text, times without the Z."""
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    if name == "time" and value is not None:
        return value.removesuffix("Z")
    if blobs and name in _BLOBS and value is not None:
        return bytes.fromhex(value)
    return value


def _free_index(folder: Path) -> tuple[int | None, Path | None]:
    """The first index file that no other process holds, locked; None (an index in memory) where none can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(64):
            # The lock is a file of our own: DuckDB's lock on its file is lost when anything else opens and closes that.
            descriptor = os.open(folder / f"index-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
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


def _discard(path: Path) -> None:
    for stale in (path, path.with_name(path.name + ".wal")):
        stale.unlink(missing_ok=True)
