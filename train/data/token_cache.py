"""Keeps token shards as arrays on a local disk, mapped into memory.

A workspace keeps Parquet, since every program reads it, but training would wait for its unpacking. So a shard is
unpacked once, into `<cache>/tokens/<sha256 of the shard>.arrow` (Arrow IPC, uncompressed: about the bytes of its tokens),
and from then on its pages are those of the operating system's file cache, shared by all processes. `<cache>` is
$MODMILL_CACHE, else $XDG_CACHE_HOME/modmill, else ~/.cache/modmill. Only `modmill forget` deletes from the folder, but
anybody may at any time: a missing file is made again.

A file there holds the columns `tokens` (a large list, empty if the row has no tokens) and `present` (uint8), and the
digest of the rows' keys in the metadata of its schema; behind them, as its last 32 bytes, the sha256 of all that stands
before. Who opens a file compares that: one that was altered is made again.
"""

import hashlib
import os
import secrets
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from manifests.errors import ConfigError, ShardError
from manifests.formats.shards import Status, keys_digest
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store import parquet
from manifests.store.storage import cache_folder, read_same

_FORMAT = b"2"
_SEAL_BYTES = 32
_TYPES = (pa.uint8(), pa.uint16(), pa.uint32())


@dataclass(frozen=True, kw_only=True)
class TokenColumn:
    """Holds the tokens of a shard's R rows: row r has `values[offsets[r]:offsets[r + 1]]`, empty if the row is not ok.

    `values` (uint8, uint16 or uint32) and `offsets` are views of a mapped file and cannot be written.
    """

    values: np.ndarray
    offsets: Int64[np.ndarray, "R+1"]
    present: Bool[np.ndarray, "R"]


def open_column(snapshot: Snapshot, shard: SnapshotShard) -> TokenColumn:
    """Returns the tokens of a shard of the snapshot. Several threads and processes may open the same one at once.

    Raises ShardError if the shard is missing, its bytes are not those of the snapshot, it is no Parquet shard of tokens, or
    its rows are not the part's; ConfigError if the cache cannot be written.
    """
    path = _path_of(shard.sha256)
    batch = _map(path)
    if batch is None:
        _write(path, _unpack(snapshot, shard))
        batch = _map(path)
    if batch is None:
        raise ConfigError(
            f"{path}: what was written there cannot be read back; set MODMILL_CACHE to a folder on another disk"
        )
    found, expected = batch.schema.metadata[b"keys_sha256"].decode(), _part(snapshot, shard).keys_sha256
    if found != expected:
        raise ShardError(
            f"{_location(snapshot, shard)}: its keys have sha256 {found[:12]}, those of part {shard.part} of "
            f"{shard.corpus!r} {expected[:12]}: the shard is not of these rows; run `modmill verify`"
        )
    return _column(batch)


def forget_shards(shards_sha256: Iterable[str]) -> int:
    """Removes the unpacked tokens of shards from this user's cache and returns how many there were."""
    removed = 0
    for sha256 in shards_sha256:
        try:
            _path_of(sha256).unlink()
            removed += 1
        except FileNotFoundError:
            continue
    return removed


def _path_of(shard_sha256: str) -> Path:
    return cache_folder() / "tokens" / f"{shard_sha256}.arrow"


def _part(snapshot: Snapshot, shard: SnapshotShard) -> SnapshotPart:
    identity = (shard.corpus, shard.part)
    return snapshot.parts[bisect_left(snapshot.parts, identity, key=lambda part: (part.corpus, part.part))]


def _map(path: Path) -> pa.RecordBatch | None:
    """Returns what a cache file holds, or None if there is no whole file."""
    try:
        # Closed at once: the mapping lives as long as its arrays, and thousands of open files would be over the limit.
        with pa.memory_map(str(path)) as file:
            sealed = file.read_buffer()
        content, seal = sealed[:-_SEAL_BYTES], sealed[-_SEAL_BYTES:]
        if hashlib.sha256(content).digest() != seal.to_pybytes():
            return None
        batch = pa.ipc.open_file(content).get_batch(0)
    except (OSError, pa.ArrowInvalid):
        return None
    return batch if (batch.schema.metadata or {}).get(b"format") == _FORMAT else None


def _column(batch: pa.RecordBatch) -> TokenColumn:
    tokens, present = batch["tokens"], batch["present"]
    return TokenColumn(
        values=tokens.values.to_numpy(), offsets=tokens.offsets.to_numpy(), present=present.to_numpy().astype(bool)
    )


def _unpack(snapshot: Snapshot, shard: SnapshotShard) -> pa.RecordBatch:
    """Unpacks a Parquet shard into the table that the cache holds, checked against the snapshot."""
    where = _location(snapshot, shard)
    if shard.format != "parquet":
        raise ShardError(f"{where}: token shards are trained on from Parquet, this one is {shard.format!r}")
    remedy = f"snapshot {snapshot.name!r} needs it; run `modmill verify`"
    data = read_same(snapshot.storage, shard.path, shard.sha256, remedy=remedy)
    try:
        table = parquet.read(data, ["key", "status", "tokens"])
        tokens = table["tokens"].combine_chunks()
    except (pa.ArrowException, KeyError) as error:
        raise ShardError(f"{where}: no shard of tokens ({error}); expected columns key, status, tokens") from error
    if not pa.types.is_list(tokens.type) or tokens.type.value_type not in _TYPES or tokens.flatten().null_count:
        raise ShardError(f"{where}: tokens are {tokens.type}, expected lists of uint8, uint16 or uint32 without nulls")
    present = table["status"].to_numpy() == Status.OK
    if (present != tokens.is_valid().to_numpy(zero_copy_only=False)).any():
        raise ShardError(f"{where}: a row is ok and has no tokens, or is not ok and has some; run `modmill verify`")
    lengths = tokens.value_lengths().fill_null(0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), tokens.flatten())
    facts = {"format": _FORMAT, "keys_sha256": keys_digest(table["key"].to_pylist())}
    return pa.record_batch({"tokens": column, "present": present.astype(np.uint8)}, metadata=facts)


def _write(path: Path, batch: pa.RecordBatch) -> None:
    """Writes the whole file or nothing. Several processes may do so at once: the bytes are the same, the last one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            content = sink.getvalue()
            with open(temporary, "xb") as file:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: the cache of token shards cannot be written ({error}); free space there, or set MODMILL_CACHE "
            "to a folder on a disk with room for the tokens"
        ) from error


def _location(snapshot: Snapshot, shard: SnapshotShard) -> str:
    return snapshot.storage.location(shard.path)
