"""Writes and reads the folder of a snapshot: `_meta/snapshots/<name>/`, written once. Format 1:

    snapshot.json        {"format": 1, "workspace": id, "where": condition or null, "modalities": [names],
                          "hold_out": share, "rows": count, "held_out": count}; if asked for also "complete": true
                          (every row has every modality) and "split_by": column (its values decide who is held out)
    modalities.parquet   kind, vocabulary, length and tokenizer of each modality, by name
    parts.parquet        each part with rows selected, by (corpus, part): bitmaps of its rows, first row in the lowest bit
    shards.parquet       each shard, by (corpus, part, modality, crop)
    SHA256SUMS           of the four, as `sha256sum` writes and checks it; written last: without it there is no snapshot

An equal selection gives equal bytes, and the sha256 of SHA256SUMS is the snapshot's identity. If some of its rows are
forgotten, a snapshot gets `replaced.json` beside these files, {"replaced_by": name, "rows": count}, and the snapshot.json
of its successor says also {"replaces": name, "forgotten_rows": count}.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.errors import ConfigError, ShardError, WorkspaceError, nearest
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import Storage, read_same

FORMAT = 1
SUMS = "SHA256SUMS"
# The share of the keys that is never trained on, if the user gives none.
HOLD_OUT = 0.02
MODALITIES = pa.schema(
    [
        ("modality", pa.string()),
        ("kind", pa.string()),
        ("grain", pa.string()),
        ("vocabulary", pa.int64()),
        ("tokens", pa.int64()),
        ("tokenizer", pa.string()),
        ("tokenizer_family", pa.string()),
        ("tokenizer_digest", pa.string()),
        ("tokenizer_path", pa.string()),
    ]
)
PARTS = pa.schema(
    [
        ("corpus", pa.string()),
        ("corpus_kind", pa.string()),
        ("part", pa.int32()),
        ("rows", pa.int32()),
        ("keys_sha256", pa.string()),
        ("selected", pa.binary()),
        ("held_out", pa.binary()),
    ]
)
SHARDS = pa.schema(
    [
        ("corpus", pa.string()),
        ("part", pa.int32()),
        ("modality", pa.string()),
        ("crop", pa.int32()),
        ("fingerprint", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("size_bytes", pa.int64()),
        ("format", pa.string()),
    ]
)
_DOCUMENT = "snapshot.json"
_REPLACED = "replaced.json"
_TABLES = {"modalities": MODALITIES, "parts": PARTS, "shards": SHARDS}
_PATHS = (("shards", "path", paths.SHARD), ("modalities", "tokenizer_path", paths.TOKENIZER))
_FIELDS = {"format", "workspace", "where", "modalities", "hold_out", "rows", "held_out"}
_FILES = {_DOCUMENT, *(f"{name}.parquet" for name in _TABLES)}
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_]+\.[a-z]+)")
_RESTORE = "restore the snapshot from a copy, or make another"


@dataclass(frozen=True, kw_only=True)
class SnapshotFiles:
    """Holds what a snapshot's folder says; `tables` by name: modalities, parts, shards."""

    document: Mapping[str, Any]
    tables: Mapping[str, pa.Table]
    sha256: str


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot be the name of a snapshot."""
    if not paths.is_snapshot_name(name):
        raise ConfigError(
            f"a snapshot cannot have the name {name!r}; expected 1 to 64 of A-Z a-z 0-9 . _ - without . _ - first"
        )


def is_whole(storage: Storage, name: str) -> bool:
    """Tells whether there is a snapshot of that name, written to its end."""
    return paths.is_snapshot_name(name) and storage.exists(f"{paths.snapshot(name)}/{SUMS}")


def names(storage: Storage) -> list[str]:
    """Returns the names of the snapshots of a workspace, sorted."""
    return [name for name in storage.names(paths.SNAPSHOTS) if is_whole(storage, name)]


# -- writing ----------------------------------------------------------------------------------------------------------


def encode(document: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> dict[str, bytes]:
    """Encodes the files of a snapshot, SHA256SUMS last; what snapshot.json says of the tables is counted here."""
    counted = {
        "modalities": tables["modalities"]["modality"].to_pylist(),
        "rows": _ones(tables["parts"]["selected"]),
        "held_out": _ones(tables["parts"]["held_out"]),
    }
    files = {_DOCUMENT: canonical_json({"format": FORMAT, **counted, **document})}
    files |= {
        f"{name}.parquet": parquet.written(tables[name].combine_chunks(), row_group_size=65536) for name in _TABLES
    }
    sums = "".join(f"{sha256_hex(data)}  {name}\n" for name, data in sorted(files.items()))
    return {**files, SUMS: sums.encode()}


def _ones(bitmaps: pa.ChunkedArray) -> int:
    return sum(int(np.unpackbits(np.frombuffer(bits, np.uint8)).sum()) for bits in bitmaps.to_pylist())


def write(storage: Storage, name: str, files: Mapping[str, bytes]) -> None:
    """Writes the files in their order; completes what an interrupted writer of the same files left.

    Raises WorkspaceError if a file there has other content.
    """
    for file, data in files.items():
        path = f"{paths.snapshot(name)}/{file}"
        if not storage.put(path, data) and storage.read(path) != data:
            raise WorkspaceError(
                f"{storage.location(path)} was left by another writer that did not finish, with other content; delete "
                "that folder if no writer is at work on it, or choose another name"
            )


def check_same(storage: Storage, name: str, files: Mapping[str, bytes]) -> None:
    """Raises WorkspaceError if the snapshot of that name has other content than `files`."""
    standing = read(storage, name)
    where = storage.location(paths.snapshot(name))
    document = json.loads(files[_DOCUMENT])
    changes = [
        f"{key} {standing.document.get(key)!r} there, {value!r} here"
        for key, value in document.items()
        if standing.document.get(key) != value
    ]
    # Tables are compared, not bytes: another pyarrow may have written them.
    changes += [
        f"other {table}"
        for table, schema in _TABLES.items()
        if not standing.tables[table].equals(_table(where, files[f"{table}.parquet"], schema))
    ]
    if changes:
        raise WorkspaceError(
            f"the snapshot {name!r} of {storage.uri} stands and is frozen, and this selection is another "
            f"({'; '.join(changes)}); choose another name"
        )


def mark_replaced(storage: Storage, name: str, *, by: str, rows: int) -> None:
    """Says in a snapshot's folder that another replaces it, since `rows` of its rows were forgotten."""
    storage.put(f"{paths.snapshot(name)}/{_REPLACED}", canonical_json({"replaced_by": by, "rows": rows}))


def check_not_replaced(storage: Storage, name: str) -> None:
    """Raises WorkspaceError with the successor's name if a snapshot was replaced."""
    try:
        document = json.loads(storage.read(f"{paths.snapshot(name)}/{_REPLACED}"))
        successor, rows = document["replaced_by"], document["rows"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{storage.location(paths.snapshot(name))}/{_REPLACED} cannot be read ({error}); {_RESTORE}"
        ) from error
    raise WorkspaceError(
        f"snapshot {name!r} of {storage.uri} was replaced by {successor!r} after {rows:,} rows were forgotten; "
        f"use {successor!r}"
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def read(storage: Storage, name: str) -> SnapshotFiles:
    """Reads the files of a snapshot and checks them against its SHA256SUMS.

    Raises WorkspaceError if there is no such snapshot or its format is newer, ShardError if it was altered.
    """
    if not is_whole(storage, name):
        is_begun = paths.is_snapshot_name(name) and bool(storage.names(paths.snapshot(name)))
        unfinished = " (one was begun and not finished)" if is_begun else ""
        raise WorkspaceError(f"{storage.uri} has no snapshot {name!r}{unfinished}; {nearest(name, names(storage))}")
    where = storage.location(paths.snapshot(name))
    sums = storage.read(f"{paths.snapshot(name)}/{SUMS}")
    listed = _listed(f"{where}/{SUMS}", sums)
    files = {
        file: read_same(storage, f"{paths.snapshot(name)}/{file}", sha256, remedy=_RESTORE)
        for file, sha256 in listed.items()
    }
    # The format is checked first: a newer one may have other files.
    document = _document(f"{where}/{_DOCUMENT}", files.get(_DOCUMENT, b""))
    wrong = sorted(set(files) ^ _FILES)
    if wrong:
        problem = "lists, but no snapshot has" if wrong[0] in files else "does not list"
        raise ShardError(f"{where}/{wrong[0]} is a file that {SUMS} {problem}; {_RESTORE}")
    tables = {
        table: _table(f"{where}/{table}.parquet", files[f"{table}.parquet"], schema)
        for table, schema in _TABLES.items()
    }
    for table, column, shape in _PATHS:
        for path in tables[table][column].unique().to_pylist():
            paths.check(path, shape, where=f"{where}/{table}.parquet")
    return SnapshotFiles(document=document, tables=tables, sha256=sha256_hex(sums))


def _listed(where: str, sums: bytes) -> dict[str, str]:
    """Returns the sha256 of each file that SHA256SUMS lists."""
    listed: dict[str, str] = {}
    for line in sums.decode(errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if not match or match[2] in listed:
            raise ShardError(
                f"{where}: the line {line[:80]!r} is not as sha256sum writes it, or stands twice; {_RESTORE}"
            )
        listed[match[2]] = match[1]
    return listed


def _document(where: str, data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
        found = document["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{where} is no snapshot's document ({error}); {_RESTORE}") from error
    if not isinstance(found, int) or found > FORMAT:
        raise WorkspaceError(f"{where} has format {found}, this modmill reads up to {FORMAT}; install a newer modmill")
    if missing := sorted(_FIELDS - set(document)):
        raise ShardError(f"{where} has no field {missing[0]!r}; {_RESTORE}")
    return document


def _table(where: str, data: bytes, schema: pa.Schema) -> pa.Table:
    try:
        table = parquet.read(data)
    except pa.ArrowException as error:
        raise ShardError(f"{where} is no Parquet ({error}); {_RESTORE}") from error
    if not table.schema.equals(schema):
        raise ShardError(
            f"{where} has the columns {table.schema.names}, expected {schema.names}, typed as format {FORMAT} says; {_RESTORE}"
        )
    return table
