"""Opens the catalog of a workspace: everything that is asked of a workspace is asked here, by SQL over its index.

SQL that knows the tables of the index stands in `manifests/` only; the engine selects from the views, as any script may.
"""

import contextlib
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import duckdb

from manifests.catalog import attached, content, index_checkpoint, locked_copy, reading
from manifests.catalog.index import Answer, Index
from manifests.catalog.replay import DOCUMENTS
from manifests.catalog.samples import Samples
from manifests.commands import command
from manifests.errors import ConfigError, LogError, ModmillError, QueryError, ShardError, WorkspaceError
from manifests.log import actions
from manifests.log import entries as log
from manifests.log.interrupts import heard
from manifests.modality import Form
from manifests.store.storage import Storage, cache_folder, open_storage

if TYPE_CHECKING:
    import pyarrow as pa

    from manifests.log.lease import Lease

# Rows are numbered through all parts, so that one array holds what is said of each row of the workspace.
_NUMBERED = (
    "SELECT k.corpus, k.kind AS corpus_kind, p.part, p.rows, p.keys_sha256, "
    "row_number() OVER (ORDER BY k.corpus, p.part) - 1 AS part_number, "
    "(sum(p.rows) OVER (ORDER BY k.corpus, p.part) - p.rows)::BIGINT AS first_row "
    "FROM state.part p JOIN corpora k USING (corpus) WHERE p.rows > 0"
)
# What `modmill status` shows.
STATUS = (
    "SELECT corpus, modality, form, recipe, crops, parts, parts_done AS done, parts_missing AS missing, "
    "rows, ok, failed, absent, not_selected_or_forgotten AS left_out, tokens, round(size_bytes / 1e6, 2) AS mb FROM coverage"
)
# Values of these types are other ones in Python's rows than in Arrow, or need a package more.
_BY_ARROW = re.compile(r"TIME ZONE|TIMESTAMP_|TIME_NS|INTERVAL|MAP|UUID|UNION|VARIANT|BIT|TUPLE|\[\d")

_GONE = ("No files found", "No such file", "FileNotFoundError")


class Catalog:
    """Answers questions about one workspace from its index, and commits to its log.

    With `as_of` (a version, or a time in ISO 8601, UTC) everything is as it was then: state, views, samples. With `lease`
    commits are refused once another writer has taken over, and long logs get checkpoints. One thread at a time; a process
    that is forked with it open is refused.
    """

    def __init__(self, storage: Storage, *, as_of: int | str | None = None, lease: "Lease | None" = None) -> None:
        self.storage = storage
        self.workspace_id = log.workspace_id(storage)
        self._lease = lease
        self._process = os.getpid()
        self._index = Index(storage, cache_folder() / self.workspace_id)
        # Later ones are of a log that was lost, and rebuilt shorter.
        stood = [] if lease is None else index_checkpoint.versions(storage)
        self._checkpointed = max((version for version in stood if version <= self._index.version), default=0)
        if as_of is not None:
            self._index.look_at(self._version_of(as_of))
        # The content views at hand, and the state of the index that they are of.
        self._content: set[str] = set()
        self._samples: Samples | None = None
        self._attached: list[attached.Attached] = []
        self._content_of: tuple[duckdb.DuckDBPyConnection, int] | None = None

    @classmethod
    def open(cls, uri: str | Path, *, as_of: int | str | None = None) -> Self:
        """Opens the catalog of the workspace at a folder or URI.

        Raises WorkspaceError if there is none, ConfigError if it has no such version or time, LogError if its log
        is lost.
        """
        catalog = cls(open_storage(uri), as_of=as_of)
        try:
            log.check_there(catalog.storage, catalog.version)
        except LogError:
            catalog.close()
            raise
        return catalog

    @property
    def version(self) -> int:
        """Returns the newest version of the log that the index holds."""
        return self._index.version

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the log ------------------------------------------------------------------------------------------------------

    def refresh(self) -> int:
        """Replays what was appended to the log since; returns the version that the index then has."""
        return self._index.refresh()

    def commit(self, new: Sequence[actions.Action], *, run: str) -> int:
        """Commits actions to the log, all or none; returns their version.

        They are safe when it returns; the index takes them up when it is asked. Raises WorkspaceError if another
        writer took the lease over.
        """
        self._check_process()
        documents = [actions.to_json(action) for action in new]
        for action in new:  # What is in the log stays there.
            actions.check_paths(type(action), vars(action), where=f"the new {action.action}")
        while True:
            if self._lease is not None:
                self._lease.check()
            before = self.version
            entry = log.append(self.storage, documents, run=run, after=before, previous=self._index.sha256)
            if entry is not None:
                self._index.apply(entry)
                if self._lease is not None and index_checkpoint.is_due(self.version, self._checkpointed):
                    # The commit stands, whatever becomes of this: the disk may be full.
                    with contextlib.suppress(OSError, ModmillError, duckdb.Error):
                        self._index.write_checkpoint()
                    self._checkpointed = self.version
                return entry.version
            if self.refresh() == before:
                raise LogError(
                    f"{self.storage.uri}: version {before + 1} is taken and cannot be read; see `modmill verify`"
                )

    def _check_process(self) -> None:
        # A forked child would write through the parent's file, unseen by it.
        if os.getpid() != self._process:
            raise WorkspaceError(
                f"this catalog of {self.storage.uri} was opened by process {self._process} and is used in {os.getpid()}, which "
                "was forked from it; open the workspace in each process, or start processes by spawn"
            )

    def _version_of(self, as_of: int | str) -> int:
        """Returns the version that an --as-of means: the newest at or before a time."""
        text = str(as_of).strip()
        newest = self._index.version
        if text.isdecimal():
            if not 1 <= int(text) <= newest:
                raise ConfigError(
                    f"version {text}: {self.storage.uri} has versions 1 to {newest}; see the view timeline"
                )
            return int(text)
        try:
            time = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(
                f"as of {text!r}: expected a version, or a time such as 2026-11-24 or 2026-11-24T09:30:00 (UTC)"
            ) from None
        if time.tzinfo is not None:
            time = time.astimezone(datetime.UTC).replace(tzinfo=None)
        found = self._rows(
            "SELECT max(version) AS version, (SELECT min(time) FROM log.applied) AS first "
            "FROM log.applied WHERE time <= ?",
            [time],
        )[0]
        if found["version"] is None:
            raise ConfigError(f"as of {text}: {self.storage.uri} began at {found['first']} UTC, later than that")
        return found["version"]

    # -- questions ----------------------------------------------------------------------------------------------------

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> "pa.Table":
        """Returns the answer to one query over the views, as an Arrow table. Raises QueryError with DuckDB's own message."""
        return self._asked(query, parameters, lambda ask: ask().to_arrow_table())

    def fetch(self, query: str, parameters: Sequence[Any] = ()) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Returns the answer of `sql` as column names and rows, without Arrow if its types allow: that imports in a third."""
        # A person waits for these: the thread that hears Ctrl-C costs a millisecond.
        return self._asked(
            query, parameters, lambda ask: heard(lambda: _plain_rows(ask()), self._index.connection.interrupt)
        )

    def attach(
        self, table: Any, *, on: Sequence[str] = attached.DEFAULT_ON, name: str | None = None
    ) -> attached.Attached:
        """Puts a table of the user's own beside the samples: its columns are columns of `samples` from here on.

        `table` is a Parquet, CSV or JSON file or a table of pyarrow, pandas or polars, with one row a sample at most; it
        is there by its own name too (of a file, the stem). Raises ConfigError, see `attached.load`.
        """

        def put() -> attached.Attached:
            connection = self._index.connection
            self._drop_old_content()
            self._make_content(["samples"])
            new = attached.load(connection, table, on, name, content.all_views(connection))
            try:
                attached.join(connection, [*self._attached, new])
            except ConfigError:
                connection.execute(f"DROP TABLE {new.name}")
                raise
            self._attached.append(new)
            return new

        return self._made(put)

    @property
    def attached(self) -> Sequence[attached.Attached]:
        """Returns the tables that are attached, in order."""
        return self._attached

    def copy_views(self, path: Path) -> None:
        """Writes what each view answers, and each attached table, as a plain table into a new DuckDB file.

        Raises QueryError if a view cannot be read.
        """

        def copy() -> None:
            self._drop_old_content()
            self._make_content([*content.all_views(self._index.connection)])
            locked_copy.copy_views(self._index.connection, path, [table.name for table in self._attached])

        self._made(copy)

    def _made(self, make: Callable[[], Answer]) -> Answer:
        """Returns what something makes of the views. Raises QueryError if one cannot be read."""
        self._check_process()
        try:
            return self._index.ask(make)
        except duckdb.Error as error:
            raise QueryError(f"{_said(error)}; see `{command('verify', self.storage.uri)}`") from error

    def _asked(self, query: str, parameters: Sequence[Any], take: Callable[[Any], Answer]) -> Answer:
        self._check_process()
        try:
            reading.check(self._index.connection, query)
            return self._index.ask(lambda: self._answer(query, parameters, take))
        except duckdb.Error as error:
            said = _said(error)
            if not any(words in said for words in _GONE):
                raise QueryError(said) from error
            raise QueryError(
                f"a file that the log names is gone: {said}; `modmill forget --collect` deletes what was forgotten, and what "
                f"is live no more for longer than its retention; else see `{command('verify', self.storage.uri)}`"
            ) from error

    def _answer(self, query: str, parameters: Sequence[Any], take: Callable[[Any], Answer]) -> Answer:
        self._drop_old_content()
        try:
            return self._read(query, parameters, take)
        except duckdb.CatalogException:
            # Content views cost a look at every file, so they are made when a query proves to need them.
            named = content.views_named(self._index.connection, query)
            missing = [name for name in named if name not in self._content]
            if not missing:
                raise
        self._make_content(missing)
        return self._read(query, parameters, take)

    def _drop_old_content(self) -> None:
        connection = self._index.connection
        if (connection, self.version) == self._content_of:
            return
        for name in self._content:
            connection.execute(f'DROP VIEW IF EXISTS "{name}"')
        is_new = self._content_of is None or self._content_of[0] is not connection
        self._content, self._samples, self._content_of = set(), None, (connection, self.version)
        if is_new and self._attached:
            # A new file of the index: what was attached is attached again.
            Samples(connection, self.storage)
            for table in self._attached:
                attached.load(connection, table.source, table.on, table.name, content.all_views(connection))

    def _make_content(self, names: Sequence[str]) -> None:
        """Makes those of the content views that are not there, for any query."""
        connection = self._index.connection
        if self._samples is not None:
            self._samples.widen()
        for name in names:
            if name in self._content:
                continue
            if name == "samples":
                self._samples = Samples(connection, self.storage)
                attached.join(connection, self._attached)
            else:
                content.make_view(connection, self.storage, name)
            self._content.add(name)

    def _read(self, query: str, parameters: Sequence[Any], take: Callable[[Any], Answer]) -> Answer:
        connection = self._index.connection
        if self._samples is not None:
            self._samples.fit(query, parameters)
        connection.execute("BEGIN TRANSACTION READ ONLY")
        try:
            return take(lambda: connection.sql(query, params=list(parameters)))
        finally:
            with contextlib.suppress(duckdb.Error):
                connection.execute("ROLLBACK")

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        self._check_process()
        columns, rows = self._index.ask(lambda: _plain_rows(self._index.connection.sql(query, params=list(parameters))))
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def records(
        self, kind: type[actions.AnyAction], query: str, parameters: Sequence[Any] = ()
    ) -> list[actions.AnyAction]:
        """Returns the records of a kind of action that a query selects from its table."""
        return [as_action(kind, row) for row in self._rows(query, parameters)]

    def corpora(self) -> list[dict[str, Any]]:
        """Returns the rows of the view `corpora`."""
        return self._rows("SELECT * FROM corpora")

    def parts(self, corpus: str) -> list[actions.PartAdded]:
        """Returns the parts of a corpus, in order."""
        return self.records(actions.PartAdded, "SELECT * FROM state.part WHERE corpus = ? ORDER BY part", [corpus])

    def live_shards(
        self, corpus: str | None = None, first_part: int = 0, last_part: int = 2**31 - 1
    ) -> list[actions.ShardAdded]:
        """Returns the live shards in a fixed order: of one corpus or of all, of parts from `first_part` to `last_part`."""
        # JSON text is read twice as fast as a map.
        return self.records(
            actions.ShardAdded,
            "SELECT * REPLACE (to_json(metrics)::VARCHAR AS metrics) FROM state.shard WHERE ($1 IS NULL OR corpus = $1) "
            "AND part BETWEEN $2 AND $3 ORDER BY corpus, part, modality, form, fingerprint, crop",
            [corpus, first_part, last_part],
        )

    def current_recipes(self, corpus: str) -> dict[tuple[str, Form], actions.RecipeCurrent]:
        """Returns the current recipe of each modality and form of a corpus."""
        found = self.records(actions.RecipeCurrent, "SELECT * FROM state.current WHERE corpus = ?", [corpus])
        return {(current.modality, current.form): current for current in found}

    def recipes(self) -> dict[str, Mapping[str, Any]]:
        """Returns what each fingerprint in the log is the hash of."""
        rows = self._rows("SELECT fingerprint, document::VARCHAR AS document FROM state.recipe")
        return {row["fingerprint"]: json.loads(row["document"]) for row in rows}

    def tokenizer(self, name: str) -> actions.TokenizerAdded | None:
        """Returns the tokenizer of that name that is in use, None if none was fitted yet."""
        found = self.records(actions.TokenizerAdded, "SELECT * FROM state.tokenizer WHERE name = ?", [name])
        return found[0] if found else None

    def tokenizers(self) -> list[actions.TokenizerAdded]:
        """Returns every tokenizer in use."""
        return self.records(actions.TokenizerAdded, "SELECT * FROM state.tokenizer ORDER BY name")

    # -- what snapshots are made of -----------------------------------------------------------------------------------

    def numbered_parts(self) -> "pa.Table":
        """Returns every part, in the order of (corpus, part): its number in that order, and how many rows stand before it.

        Columns: corpus, corpus_kind, part, rows, keys_sha256, part_number, first_row.
        """
        return self.sql(f"SELECT * REPLACE (lower(hex(keys_sha256)) AS keys_sha256) FROM ({_NUMBERED}) ORDER BY 6")

    def select_rows(self, condition: str) -> "pa.Table":
        """Returns the rows of `samples` that a condition picks: one column, the row's number through all parts.

        Any view may stand in its subqueries. Raises QueryError that quotes it.
        """
        try:
            # Both ways, or a parenthesis of the condition could end ours and add rows that are none.
            reading.check(self._index.connection, f"SELECT 1 WHERE {condition}\n")
            return self.sql(
                f"SELECT p.first_row + s.row AS number FROM (SELECT corpus, part, row FROM samples WHERE ({condition}\n)) s "
                f"JOIN ({_NUMBERED}) p USING (corpus, part)"
            )
        except (duckdb.Error, QueryError) as error:
            if isinstance(error.__cause__, duckdb.IOException):
                raise ShardError(f"{error}; see `{command('verify', self.storage.uri)}`") from error
            reason = str(error).partition("\n\nLINE ")[0].strip()
            raise QueryError(
                f"the condition {condition!r} is refused: {reason}; expected SQL over the columns of `samples`, such as "
                "corpus = 'photos' or key IN (SELECT key FROM boxes WHERE class = 'cat')"
            ) from error

    def token_recipes(self) -> list[dict[str, Any]]:
        """Returns the recipes of tokens that live shards have, current or not, with the crops asked of each and its tokenizer.

        Rows of corpus, modality, fingerprint, crops, is_current, tokenizer, digest, family, vocabulary, path. The fields
        of the tokenizer are None if the log knows none of its name and digest.
        """
        return self._rows(
            "SELECT c.corpus, c.modality, c.fingerprint, c.crops, state.is_live(c.version, c.end_version) AS is_current, "
            "t.name AS tokenizer, t.digest, t.family, t.vocabulary, t.path "
            "FROM (SELECT * FROM log.current WHERE form = 'token' AND version <= getvariable('as_of') QUALIFY "
            "row_number() OVER (PARTITION BY corpus, modality, fingerprint ORDER BY version DESC) = 1) c "
            "JOIN state.recipe r USING (fingerprint) "
            "LEFT JOIN (SELECT name, digest, any_value(family) AS family, any_value(vocabulary) AS vocabulary, "
            "any_value(path) AS path FROM log.tokenizer WHERE version <= getvariable('as_of') GROUP BY name, digest) t "
            "ON t.name = (r.document ->> '$.parameters.tokenizer') AND t.digest = (r.document ->> '$.weights') "
            "WHERE (c.corpus, c.modality, c.fingerprint) IN (SELECT DISTINCT (corpus, modality, fingerprint) "
            "FROM state.shard WHERE form = 'token') "
            "ORDER BY c.corpus, c.modality, c.fingerprint"
        )

    def token_shards(self, recipes: Sequence[Mapping[str, Any]]) -> "pa.Table":
        """Returns the live shards of rows of `token_recipes`, with crops below the recipe's number of them, in a fixed order.

        Columns: those of a shard's record, and the part_number of its part.
        """
        names = {"corpus": "VARCHAR", "modality": "VARCHAR", "fingerprint": "VARCHAR", "crops": "INTEGER"}
        chosen = ", ".join(f"unnest(?::{kind}[]) AS {name}" for name, kind in names.items())
        return self.sql(
            "SELECT s.corpus, s.part, s.modality, s.crop, s.fingerprint, s.path, lower(hex(s.sha256)) AS sha256, "
            "s.size_bytes, s.format, s.rows, s.ok, s.tokens, lower(hex(s.keys_sha256)) AS keys_sha256, p.part_number "
            f"FROM state.shard s JOIN (SELECT {chosen}) c USING (corpus, modality, fingerprint) "
            f"JOIN ({_NUMBERED}) p USING (corpus, part) "
            "WHERE s.form = 'token' AND coalesce(s.crop, 0) < coalesce(c.crops, 1) "
            "ORDER BY s.corpus, s.part, s.modality, s.crop",
            [[recipe[name] for recipe in recipes] for name in names],
        )

    def snapshots(self) -> "pa.Table":
        """Returns the rows of the view `snapshots`."""
        return self.sql("SELECT * FROM snapshots")

    def status(self) -> "pa.Table":
        """Returns what `modmill status` shows: corpus by modality, parts done, failed, missing."""
        return self.sql(STATUS)

    def coverage(self) -> list[dict[str, Any]]:
        """Returns the rows of the view `coverage`."""
        return self._rows("SELECT * FROM coverage")


def _said(error: duckdb.Error) -> str:
    """Returns what DuckDB says; of an error that an object store's client raised in it, not the trace."""
    said = str(error).strip()
    return said.partition("\n\nLINE ")[0].splitlines()[-1] if said.startswith("Traceback ") else said


def _plain_rows(relation: Any) -> tuple[list[str], list[tuple[Any, ...]]]:
    if any(_BY_ARROW.search(str(kind)) for kind in relation.types):
        table = relation.to_arrow_table()
        return table.column_names, list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return relation.columns, relation.fetchall()


def as_action(kind: type[actions.AnyAction], row: dict[str, Any]) -> actions.AnyAction:
    """Returns an action from a row of its table."""
    values = {}
    for name in _names(kind):
        value = row[name]
        if isinstance(value, bytes):
            value = value.hex()
        elif name in DOCUMENTS:
            # A map of figures arrives as a dict or, through Arrow, as pairs.
            value = json.loads(value) if isinstance(value, str) else dict(value)
        values[name] = value
    return kind(**values)


@functools.cache
def _names(kind: type[actions.Action]) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))
