"""The catalog of a workspace: everything that is asked of a workspace is asked here, by SQL over its index.

With `index.py`, `content.py`, `lookup.py`, `schema.sql` and `views.sql` this is the only SQL of modmill.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from manifests import actions, content, log
from manifests.errors import LogError, QueryError
from manifests.index import BLOBS, Index
from manifests.modality import Form
from manifests.storage import Storage, open_storage

_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN, duckdb.StatementType.MULTI}
_EXPLAIN = re.compile(r"\s*explain\b(\s*analyze\b)?(\s*\([^)]*\))?", re.IGNORECASE)


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
        self._index = Index(storage, cache_folder() / self.workspace_id)
        # The content views at hand, and the state of the index that they are of.
        self._content: set[str] = set()
        self._content_of: tuple[duckdb.DuckDBPyConnection, int] | None = None

    @classmethod
    def open(cls, uri: str | Path) -> Self:
        """The catalog of the workspace at a folder or URI. Raises WorkspaceError where there is none."""
        return cls(open_storage(uri))

    @property
    def version(self) -> int:
        """The newest version of the log that the index holds."""
        return self._index.version

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the log ------------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Replays what the log has since; the version the index is at then."""
        return self._index.refresh()

    def commit(self, new: Sequence[actions.Action], *, run: str) -> int:
        """Commits actions to the log and the index, all or none; the version they got."""
        documents = [actions.to_json(action) for action in new]
        while True:
            before = self.version
            entry = log.append(self.storage, documents, run=run, after=before, previous=self._index.sha256)
            if entry is not None:
                self._index.apply(entry)
                return entry.version
            if self.refresh() == before:
                raise LogError(
                    f"{self.storage.uri}: version {before + 1} is taken and cannot be read; see `modmill verify`"
                )

    # -- questions ----------------------------------------------------------------------------------------------------

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """The answer to one query over the views, as an Arrow table. Raises QueryError with DuckDB's own message."""
        try:
            self._check_reading(query)
            return self._index.ask(lambda: self._answer(query, parameters))
        except duckdb.Error as error:
            raise QueryError(str(error).strip()) from error

    def _check_reading(self, query: str) -> None:
        """Raises QueryError for what is not one statement that reads; its transaction, being read-only, does the rest."""
        statements = self._index.connection.extract_statements(query)
        if len(statements) != 1:
            raise QueryError(f"one query is expected, these are {len(statements)}: {query.strip()!r}")
        kind = statements[0].type
        if kind not in _READING:
            raise QueryError(f"{kind.name} is refused, a workspace is only read by SQL: {query.strip()}")
        if kind == duckdb.StatementType.EXPLAIN:
            # EXPLAIN ANALYZE does what it explains.
            self._check_reading(_EXPLAIN.sub("", query, count=1))
        # DuckDB lets a SELECT write files: WITH written AS (COPY ... TO ...).
        spelled = query.encode()  # Tokens start at bytes.
        for start, token in duckdb.tokenize(query):
            if token == duckdb.token_type.keyword and re.match(rb"copy\b", spelled[start:], re.IGNORECASE):
                raise QueryError(f'COPY is refused, a workspace is only read by SQL; a name is written "copy": {query}')

    def _answer(self, query: str, parameters: Sequence[Any]) -> pa.Table:
        connection = self._index.connection
        if (connection, self.version) != self._content_of:
            for name in self._content:
                connection.execute(f"DROP VIEW IF EXISTS {name}")
            self._content, self._content_of = set(), (connection, self.version)
        try:
            return self._read(query, parameters)
        except duckdb.CatalogException:
            # Content views cost a look at every file, so they are made when a query proves to need them.
            missing = [name for name in content.views_named(query) if name not in self._content]
            if not missing:
                raise
        for name in missing:
            content.make_view(connection, self.storage, name)
            self._content.add(name)
        return self._read(query, parameters)

    def _read(self, query: str, parameters: Sequence[Any]) -> pa.Table:
        connection = self._index.connection
        connection.execute("BEGIN TRANSACTION READ ONLY")
        try:
            return connection.sql(query, params=list(parameters)).to_arrow_table()
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.execute("ROLLBACK")

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """The rows of one of our own queries."""
        table = self._index.ask(lambda: self._index.connection.sql(query, params=list(parameters)).to_arrow_table())
        return table.to_pylist()

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


def _record(kind: type[actions.AnyAction], row: dict[str, Any]) -> actions.AnyAction:
    """An action from a row of its table."""
    values = {}
    for item in fields(kind):
        value = row[item.name]
        if item.name in BLOBS and isinstance(value, bytes):
            value = value.hex()
        elif item.name in ("config", "document", "options", "metrics") and isinstance(value, str):
            value = json.loads(value)
        values[item.name] = value
    return kind(**values)
