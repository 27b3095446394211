"""Writes and reads checkpoints: the tables of an index as Parquet, so that a new reader need not replay a long log.

`_meta/checkpoints/<20-digit version>/` holds a file for each table, `checkpoint.json` and, last, SHA256SUMS; without
that it does not count. They are made again at will: the log alone is the truth. One that other code made is passed over,
since that code may not have known all that this code does.
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb

from manifests.errors import ShardError
from manifests.log import actions
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage

_SUMS = "SHA256SUMS"
_DOCUMENT = "checkpoint.json"
# So many entries are replayed at most, or a tenth of the log: what is written stays a fraction of the log.
_ENTRIES = 1000


@dataclass(frozen=True, kw_only=True)
class IndexCheckpoint:
    """Holds a checkpoint that may be loaded: the version it is of, the sha256 of that entry, and its files by table."""

    version: int
    sha256: str
    tables: Mapping[str, bytes]


def is_due(version: int, last: int) -> bool:
    """Tells whether a writer at `version` should make a checkpoint, if the newest is of version `last`."""
    return version - last >= max(_ENTRIES, version // 10)


def versions(storage: Storage) -> list[int]:
    """Returns the versions that have a checkpoint, or the beginning of one, in order."""
    return [int(name) for name in storage.names(paths.CHECKPOINTS) if name.isdecimal()]


def write(storage: Storage, connection: duckdb.DuckDBPyConnection, *, version: int, sha256: str, made_by: str) -> None:
    """Writes the tables of an index that is at `version`. Another writer's checkpoint of it stays as it is."""
    folder = paths.checkpoint(version)
    document = canonical_json({"format": 1, "version": version, "sha256": sha256, "made_by": made_by})
    sums = {_DOCUMENT: sha256_hex(document)}
    storage.put(f"{folder}/{_DOCUMENT}", document)
    with tempfile.TemporaryDirectory(prefix="modmill-checkpoint-") as scratch:
        for (table,) in connection.execute(_TABLES).fetchall():
            file = Path(scratch) / f"{table}.parquet"
            quoted = str(file).replace("'", "''")
            connection.execute(f"COPY log.{table} TO '{quoted}' (FORMAT parquet, COMPRESSION zstd)")
            data = file.read_bytes()
            if not storage.put(f"{folder}/{file.name}", data) and storage.read(f"{folder}/{file.name}") != data:
                return
            sums[file.name] = sha256_hex(data)
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    storage.put(f"{folder}/{_SUMS}", listed.encode())


def newest(storage: Storage, made_by: str) -> IndexCheckpoint | None:
    """Returns the newest whole checkpoint that code of `made_by` wrote, None if there is no such."""
    for version in reversed(versions(storage)):
        with contextlib.suppress(ShardError):
            if found := read(storage, version, made_by):
                return found
    return None


def load(connection: duckdb.DuckDBPyConnection, checkpoint: IndexCheckpoint) -> None:
    """Fills the empty tables of an index. Raises ShardError if a path in them is none of a workspace."""
    with tempfile.TemporaryDirectory(prefix="modmill-checkpoint-") as scratch:
        for table, data in checkpoint.tables.items():
            file = Path(scratch) / f"{table}.parquet"
            file.write_bytes(data)
            quoted = str(file).replace("'", "''")
            connection.execute(f"INSERT INTO log.{table} BY NAME SELECT * FROM read_parquet('{quoted}')")
    for kind, columns in actions.PATHS.items():
        for column, shape in columns:
            found = f"SELECT {'unnest(files)' if column == 'files' else column} AS path FROM log.{kind.action}"
            wrong = f"SELECT path FROM ({found}) WHERE NOT regexp_full_match(path, $1) LIMIT 1"
            for (path,) in connection.execute(wrong, [shape.pattern]).fetchall():
                paths.check(
                    path, shape, where=f"the checkpoint of version {checkpoint.version}, {kind.action}.{column}"
                )


def read(storage: Storage, version: int, made_by: str) -> IndexCheckpoint | None:
    """Returns a checkpoint; None if it is not finished, or by other code than `made_by`.

    Raises ShardError if its files are not what its SHA256SUMS says.
    """
    folder = paths.checkpoint(version)
    try:
        lines = storage.read(f"{folder}/{_SUMS}").decode().splitlines()
    except FileNotFoundError:
        return None
    try:
        document = json.loads(storage.read(f"{folder}/{_DOCUMENT}"))
        if document["made_by"] != made_by:
            return None
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        files = {name: storage.read(f"{folder}/{name}") for name in sums}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"its files cannot be read ({error})") from error
    if any(sha256_hex(data) != sums[name] for name, data in files.items()):
        raise ShardError("its files are not those that its SHA256SUMS says: altered or truncated")
    tables = {name.removesuffix(".parquet"): data for name, data in files.items() if name != _DOCUMENT}
    return IndexCheckpoint(version=version, sha256=document["sha256"], tables=tables)


_TABLES = "SELECT table_name FROM duckdb_tables() WHERE schema_name = 'log' AND table_name <> 'made_by' ORDER BY ALL"
