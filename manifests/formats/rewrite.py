"""Writes the files of a part again without some of its rows: those become null, every other row stays as it was.

The new file has a name of its own. Equal files and rows give equal bytes, and the same bytes that a worker writes if the
rows are forgotten before it labels them.
"""

import base64
import io
import tarfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.errors import ShardError
from manifests.formats import shards, sidecars
from manifests.formats.shards import Status
from manifests.log.actions import CorpusAdded, Forgotten, PartAdded, ShardAdded
from manifests.recipe import sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import Storage, put_same, read_same

_ALWAYS_KNOWN = {"corpus", "part", "row", "key"}


@dataclass(frozen=True, kw_only=True)
class Blanked:
    """Holds a shard without some rows; `tokens` counts those that are left in a shard of tokens."""

    data: bytes
    statuses: list[int]
    tokens: int


def without_rows(data: bytes, format: str, rows: Collection[int]) -> Blanked:
    """Returns a shard (parquet or webdataset) with these rows null and forgotten. Raises ShardError if it is no shard."""
    return _parquet(data, rows) if format == "parquet" else _tar(data, rows)


def rewrite_part(
    storage: Storage, part: PartAdded, corpus: CorpusAdded, forgotten: Forgotten, earlier: Collection[Forgotten]
) -> PartAdded:
    """Writes the samples of a part without the forgotten rows and returns its record. `earlier` rows are null already.

    Raises ShardError if the file is not the one that was committed.
    """
    table = read_table(read_same(storage, part.path, part.sha256))
    gone = set(forgotten.rows)
    lost_bytes = sum(size or 0 for row, size in enumerate(table["size_bytes"].to_pylist()) if row in gone)
    places = pa.array([None if row in gone else row for row in range(table.num_rows)], pa.int64())
    if part.pack_path is not None:
        part = _rewrite_pack(storage, part, table, gone)
        renamed = [part.pack_path if path else None for path in table["source_pack"].to_pylist()]
        at = table.schema.get_field_index("source_pack")
        table = table.set_column(at, table.schema.field(at), pa.array(renamed, pa.string()))
    for at, name in enumerate(table.column_names):
        if name not in _ALWAYS_KNOWN:
            table = table.set_column(at, table.schema.field(at), table[name].combine_chunks().take(places))
    data = shards.encode_samples(table)
    sha256 = sha256_hex(data)
    path = paths.samples(part.corpus, part.part, sha256)
    put_same(storage, path, data, sha256)
    made = replace(part, path=path, sha256=sha256, size_bytes=len(data), source_bytes=part.source_bytes - lost_bytes)
    storage.put(sidecars.path_of(made), sidecars.of_part(made, corpus, [*earlier, forgotten]))
    return made


def _rewrite_pack(storage: Storage, part: PartAdded, table: pa.Table, gone: Collection[int]) -> PartAdded:
    """Writes the packed sources of a part with zeros for the bytes of some rows, so that all others stay where they are.

    Members are named by row, so that no name tells what is gone.
    """
    path = part.pack_path or ""
    packed = bytearray(storage.read(path) if part.pack_sha256 is None else read_same(storage, path, part.pack_sha256))
    for row in gone:
        begin, size = table["source_offset"][row].as_py(), table["size_bytes"][row].as_py()
        if begin is not None:
            packed[begin : begin + size] = bytes(size)
    data = bytes(packed)
    sha256 = sha256_hex(data)
    path = paths.renamed(path, sha256)
    put_same(storage, path, data, sha256)
    return replace(part, pack_path=path, pack_sha256=sha256)


def rewrite_shard(storage: Storage, shard: ShardAdded, recipe: Mapping[str, Any], rows: Collection[int]) -> ShardAdded:
    """Writes a shard without these rows, its failed file and its sidecar; returns its record.

    Raises ShardError if a file is not the one that was committed.
    """
    blanked = without_rows(read_same(storage, shard.path, shard.sha256), shard.format, rows)
    failures = _failures_left(storage, shard, rows)
    failed_sha256 = None if failures is None else sha256_hex(failures)
    path, sha256 = put_shard(storage, shard.path, blanked, failed_sha256)
    count = blanked.statuses.count
    failed_path = None
    if failures is not None and failed_sha256 is not None:
        failed_path = paths.failed(path)
        put_same(storage, failed_path, failures, failed_sha256)
    made = replace(
        shard,
        path=path,
        sha256=sha256,
        size_bytes=len(blanked.data),
        ok=count(Status.OK),
        failed=count(Status.FAILED),
        absent=count(Status.ABSENT),
        not_selected=count(Status.NOT_SELECTED),
        forgotten=count(Status.FORGOTTEN),
        failed_path=failed_path,
        failed_sha256=failed_sha256,
        tokens=None if shard.tokens is None else blanked.tokens,
    )
    storage.put(sidecars.path_of(made), sidecars.of_shard(made, recipe))
    return made


def put_shard(storage: Storage, old_path: str, blanked: Blanked, failed_sha256: str | None = None) -> tuple[str, str]:
    """Puts a shard beside the one that it is made from and returns its path and sha256."""
    sha256 = sha256_hex(blanked.data)
    path = paths.renamed(old_path, shards.named_by(sha256, failed_sha256))
    put_same(storage, path, blanked.data, sha256)
    return path, sha256


def files_of(path: str) -> list[str]:
    """Returns the paths of a shard or samples file and of what may stand beside it: its failed file and its sidecar."""
    return [path, paths.failed(path), paths.sidecar(path)]


def _failures_left(storage: Storage, shard: ShardAdded, rows: Collection[int]) -> bytes | None:
    """Returns the failed file without these rows; None if no row is left in it."""
    if shard.failed_path is None or shard.failed_sha256 is None:
        return None
    records = read_table(read_same(storage, shard.failed_path, shard.failed_sha256)).to_pylist()
    left = [record for record in records if record["row"] not in rows]
    return shards.write_failures(left) if left else None


def _parquet(data: bytes, rows: Collection[int]) -> Blanked:
    table = read_table(data)
    try:
        column = next(name for name in table.column_names if name in ("tokens", "label"))
        statuses = np.array(table["status"].to_numpy(), np.uint8)
        values = table[column].combine_chunks()
    except (StopIteration, KeyError, pa.ArrowException) as error:
        raise ShardError(f"no Parquet shard: its columns are {', '.join(table.column_names)}") from error
    statuses[list(rows)] = Status.FORGOTTEN
    places = pa.array([None if row in rows else row for row in range(table.num_rows)], pa.int64())
    values = values.take(places)
    made = table.set_column(1, table.schema.field("status"), pa.array(statuses))
    made = made.set_column(2, table.schema.field(column), values)
    return Blanked(
        data=shards.encode_table(made),
        statuses=statuses.tolist(),
        tokens=len(values.flatten()) if column == "tokens" else 0,
    )


def _tar(data: bytes, rows: Collection[int]) -> Blanked:
    found = shards.read_rows("webdataset", data)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        endings = {name.partition(".")[2] for name in tar.getnames()} - {"json"}
    extension = endings.pop() if endings else "npy"
    values = [None if row in rows else value for row, value in enumerate(found.values or [])]
    statuses = [Status.FORGOTTEN if row in rows else status for row, status in enumerate(found.statuses)]
    writer = shards.TarWriter(extension)
    for key, status, value in zip(found.keys, statuses, values, strict=True):
        writer.add(key, status, value)
    with writer.finish() as file:
        made = file.read()
    lengths = [len(np.load(io.BytesIO(value))) for value in values if value is not None and extension == "npy"]
    return Blanked(data=made, statuses=[int(status) for status in statuses], tokens=sum(lengths))


def read_table(data: bytes) -> pa.Table:
    """Reads a Parquet file with the very types that it was written from: read plainly, list items have other names."""
    try:
        file = parquet.opened(data)
        written = (file.metadata.metadata or {}).get(b"ARROW:schema")
        table = file.read(use_threads=False)
        return table if written is None else table.cast(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written))))
    except (pa.ArrowException, ValueError) as error:
        raise ShardError(f"no Parquet file: {error}") from error
