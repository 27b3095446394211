"""Turns entries of the log into rows of an index."""

import contextlib
import gc
import itertools
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import duckdb

from manifests.log import actions
from manifests.log import entries as log

# The fields that are documents of their own; the index holds them as JSON text.
DOCUMENTS = {"config", "document", "options", "metrics", "versions", "counts"}
# What tells two live records of a kind apart; a later one ends the earlier.
_REPLACES = {
    actions.ShardAdded: ("corpus", "part", "crop", "modality", "form", "fingerprint"),
    actions.RecipeCurrent: ("corpus", "modality", "form"),
    actions.TokenizerAdded: ("name",),
    actions.PartAdded: ("corpus", "part"),
}
_RETIRE = (
    "UPDATE log.shard s SET end_version = r.version FROM log.shards_retired r WHERE r.version >= ? "
    "AND s.version < r.version AND (s.end_version IS NULL OR s.end_version > r.version) AND s.corpus = r.corpus "
    "AND s.modality = r.modality AND s.form = r.form AND s.fingerprint = r.fingerprint"
)
# Figures by name: half the size of JSON text in the index, and read twenty times faster.
_MAP = "MAP(VARCHAR, DOUBLE)"
# From so many rows on, the seconds that an import of pandas may take (pyarrow's arrays do it) are worth it.
_MANY_ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class _Records:
    """Holds actions of one kind, with the version and the run of the entry of each."""

    documents: list[Mapping[str, Any]] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


def apply(connection: duckdb.DuckDBPyConnection, batch: Sequence[log.Entry]) -> None:
    """Puts entries into the tables, in the transaction that is open. Raises LogError for an action without its fields."""
    applied = [vars(entry) | {"actions": len(entry.actions)} for entry in batch]
    _insert(connection, "applied", {name: [entry[name] for entry in applied] for name in applied[0]})
    grouped = _grouped(batch)
    since = batch[0].version
    for kind, records in grouped.items():
        _insert(connection, kind.action, _columns(kind, records))
        if kind in _REPLACES:
            _replace(connection, kind, since)
    if actions.ShardsRetired in grouped:
        connection.execute(_RETIRE, [since])


def _grouped(batch: Iterable[log.Entry]) -> dict[type[actions.Action], _Records]:
    grouped: dict[type[actions.Action], _Records] = {}
    for entry in batch:
        where = f"version {entry.version} of the log"
        for document in entry.actions:
            kind, values = actions.read(document)
            if kind is None:
                continue
            actions.check_paths(kind, values, where=where)
            records = grouped.get(kind)
            if records is None:
                records = grouped[kind] = _Records()
            records.documents.append(values)
            records.versions.append(entry.version)
            records.runs.append(entry.run)
    return grouped


def _columns(kind: type[actions.Action], records: _Records) -> dict[str, Sequence[Any]]:
    """Returns the columns of a kind's table, by name."""
    names = [item.name for item in fields(kind)]
    values = zip(*map(operator.itemgetter(*names), records.documents), strict=True)
    columns: dict[str, Sequence[Any]] = {"run": records.runs, **dict(zip(names, values, strict=True))}
    columns["version"] = records.versions
    if kind in _REPLACES:
        columns["end_version"] = _ended([columns[key] for key in _REPLACES[kind]], records.versions)
    return columns


def _ended(keys: Sequence[Sequence[Any]], versions: Sequence[int]) -> list[int | None]:
    """Returns the version at which a later record of the same keys replaces each, None if none of these does."""
    identities = list(zip(*keys, strict=True))
    ended: list[int | None] = [None] * len(versions)
    if len(set(identities)) < len(identities):
        newest: dict[Any, int] = {}
        for place, identity in enumerate(identities):
            if identity in newest:
                ended[newest[identity]] = versions[place]
            newest[identity] = place
    return ended


def _replace(connection: duckdb.DuckDBPyConnection, kind: type[actions.Action], since: int) -> None:
    """Ends the records that those from version `since` on replace, but for those that are new themselves."""
    table = f"log.{kind.action}"
    keys = ", ".join(_REPLACES[kind])
    same = " AND ".join(f"old.{key} IS NOT DISTINCT FROM new.{key}" for key in _REPLACES[kind])
    connection.execute(
        f"UPDATE {table} old SET end_version = new.version "
        f"FROM (SELECT {keys}, min(version) AS version FROM {table} WHERE version >= $1 GROUP BY {keys}) new "
        f"WHERE old.version < $1 AND old.end_version IS NULL AND {same}",
        [since],
    )


def _insert(connection: duckdb.DuckDBPyConnection, table: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Puts columns into a table; hashes arrive as hex digits, and what the table has no column for is passed over."""
    types = {name: kind for name, kind, *_ in connection.execute(f"DESCRIBE log.{table}").fetchall()}
    selected = ", ".join(f'unhex("{name}")' if kind == "BLOB" else f'"{name}"::{kind}' for name, kind in types.items())
    if len(columns["version"]) >= _MANY_ROWS:
        import pyarrow as pa

        arriving = pa.table(
            {
                name: _map_array(columns[name]) if kind == _MAP else pa.array(_plain(name, columns[name]))
                for name, kind in types.items()
            }
        )
        connection.from_arrow(arriving).project(selected).insert_into(f"log.{table}")
        return
    # As lists, not as Arrow: making an Arrow array imports pandas if that is installed (seconds).
    sent = {name: {"BLOB": "VARCHAR", _MAP: "JSON"}.get(kind, kind) for name, kind in types.items()}
    unnested = ", ".join(f'unnest(?::{kind}[]) AS "{name}"' for name, kind in sent.items())
    given = [_plain(name, columns[name]) for name in types]
    connection.execute(f"INSERT INTO log.{table} SELECT {selected} FROM (SELECT {unnested})", given)


def _map_array(values: Sequence[Mapping[str, float]]) -> Any:
    """Returns maps of numbers as an Arrow array, each in the order of its keys, as JSON text has them."""
    import pyarrow as pa

    pairs = [sorted(value.items()) for value in values]
    offsets = pa.array(itertools.accumulate(map(len, pairs), initial=0), pa.int32())
    names = pa.array([name for each in pairs for name, _ in each], pa.string())
    numbers = pa.array([float(number) for each in pairs for _, number in each], pa.float64())
    return pa.MapArray.from_arrays(offsets, names, numbers)


def _plain(name: str, values: Sequence[Any]) -> list[Any]:
    if name in DOCUMENTS:
        return [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in values]
    if name == "time":
        return [value.removesuffix("Z") for value in values]
    return list(values)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Stops the garbage collector: a replay makes millions of values and no circles, and looks for them take a third of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
