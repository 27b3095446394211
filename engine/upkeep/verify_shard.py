"""Checks whether one file of a workspace is what the log says of it: its bytes, its sidecar and its rows."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import ShardError
from manifests.formats import shards
from manifests.formats.shards import ShardRows, Status
from manifests.log.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.recipe import canonical_json, sha256_hex, sha256_of_stream
from manifests.store import parquet
from manifests.store.storage import Storage


@dataclass(frozen=True, kw_only=True)
class CheckedPart:
    """Holds what shards of a part are compared with: its keys in order, and the rows that were forgotten."""

    keys: Sequence[str]
    forgotten: Collection[int] = field(default_factory=frozenset)


@dataclass(frozen=True, kw_only=True)
class ReadShard:
    """Holds a shard that is what the log says; `values` is its column of tokens or labels, None for a tar."""

    shard: ShardAdded
    rows: ShardRows
    values: pa.Array | None


def check_part(storage: Storage, part: PartAdded, forgotten: Collection[int]) -> CheckedPart:
    """Returns the rows of a part. Raises ShardError with the first thing that is wrong."""
    data = read_logged(storage, part.path, part.sha256, part.size_bytes)
    table = parquet.read(data, ["corpus", "part", "row", "key", "sha256"])
    keys = table["key"].to_pylist()
    if len(keys) != part.rows or shards.keys_digest(keys) != part.keys_sha256:
        raise ShardError(f"{len(keys)} rows, the log says {part.rows}; or other keys than the log says")
    if len(set(keys)) != len(keys):
        raise ShardError("a key stands in two rows")
    wrong = [name for name in ("corpus", "part") if set(table[name].to_pylist()) - {getattr(part, name)}]
    if wrong or table["row"].to_pylist() != list(range(len(keys))):
        raise ShardError(f"its column {(*wrong, 'row')[0]} is not that of part {part.part} of {part.corpus}")
    if {row for row, sha256 in enumerate(table["sha256"].to_pylist()) if sha256 is None} != set(forgotten):
        raise ShardError(f"its rows without a source are not the {len(forgotten)} that the log says were forgotten")
    if part.pack_path is not None:
        _check_pack(storage, part.pack_path, part.pack_sha256)
    return CheckedPart(keys=keys, forgotten=forgotten)


def _check_pack(storage: Storage, path: str, sha256: str | None) -> None:
    """Raises ShardError if the sources that were packed with a part are gone or altered."""
    try:
        with storage.open(path) as stream:
            found = sha256_of_stream(stream)
    except FileNotFoundError:
        raise ShardError(f"its packed sources, {path}, are gone; restore the file from a copy") from None
    if sha256 not in (None, found):
        raise ShardError(f"its packed sources, {path}, have sha256 {found[:12]}, the log says {str(sha256)[:12]}")


def check_tokenizer(storage: Storage, known: TokenizerAdded) -> None:
    """Raises ShardError if a tokenizer's files are not the committed ones."""
    files = {name: sha256_hex(storage.read(f"{known.path}/{name}")) for name in storage.names(known.path)}
    if sha256_hex(canonical_json(files)) != known.digest:
        raise ShardError("its files are not those that were committed, or are gone")


def check_shard(storage: Storage, shard: ShardAdded, part: CheckedPart | None) -> ReadShard:
    """Returns the shard, read. Raises ShardError with the first thing that is wrong; `part` is None if it could not be read."""
    data = read_logged(storage, shard.path, shard.sha256, shard.size_bytes)
    _check_failed_file(storage, shard)
    found = _read(data, shard)
    rows, statuses = found.rows, found.rows.statuses
    if part is not None and rows.keys != list(part.keys):
        raise ShardError("its rows are not the rows of its part, in the part's order")
    if shards.keys_digest(rows.keys) != shard.keys_sha256:
        raise ShardError("it holds other keys than the log says")
    counts = (shard.ok, shard.failed, shard.absent, shard.not_selected, shard.forgotten)
    if len(rows.keys) != shard.rows or counts != tuple(statuses.count(status) for status in Status):
        raise ShardError(f"its rows by status are not the {counts} of the log")
    if sum(counts) != shard.rows:
        raise ShardError(f"ok + failed + absent + not selected + forgotten is {sum(counts)}, its rows are {shard.rows}")
    gone = {row for row, status in enumerate(statuses) if status == Status.FORGOTTEN}
    if part is not None and gone != set(part.forgotten):
        raise ShardError(f"{len(gone)} of its rows are marked forgotten, the log says {len(part.forgotten)} or others")
    return found


def _check_failed_file(storage: Storage, shard: ShardAdded) -> None:
    if shard.failed_path is not None and shard.failed_sha256 is not None:
        try:
            data = read_logged(storage, shard.failed_path, shard.failed_sha256)
        except ShardError as error:
            raise ShardError(f"its failed file {shard.failed_path}: {error}") from error
        failed = parquet.read(data, []).num_rows
        if failed != shard.failed:
            raise ShardError(f"its failed file has {failed} rows, the log says {shard.failed}")
    elif shard.failed:
        raise ShardError(f"{shard.failed} rows failed, but there is no failed file")


def _read(data: bytes, shard: ShardAdded) -> ReadShard:
    """Returns a shard; the tokens of Parquet are checked column-wise."""
    found = shards.read_rows(shard.format, data, values=shard.format != "parquet")
    values = _column(data, shard) if shard.format == "parquet" else None
    has_value = [row is not None for row in found.values or []] if values is None else values.is_valid().to_pylist()
    if has_value != [status == Status.OK for status in found.statuses]:
        raise ShardError("a row that is ok has no value, or one that is not has one")
    if values is not None and shard.form == "token":
        flat = values.flatten()
        if shard.tokens is not None and len(flat) != shard.tokens:
            raise ShardError(f"it holds {len(flat)} tokens, the log says {shard.tokens}")
        largest = pc.call_function("max", [flat]).as_py()
        if largest is not None and shard.vocabulary is not None and largest >= shard.vocabulary:
            raise ShardError(f"it holds the token {largest}, its vocabulary has {shard.vocabulary}")
    return ReadShard(shard=shard, rows=found, values=values)


def _column(data: bytes, shard: ShardAdded) -> pa.Array:
    column = "tokens" if shard.form == "token" else "label"
    try:
        return parquet.read(data, [column])[column].combine_chunks()
    except (pa.ArrowException, KeyError) as error:
        raise ShardError(f"its column {column} cannot be read: {error}") from error


def read_logged(storage: Storage, path: str, sha256: str, size_bytes: int | None = None) -> bytes:
    """Reads a file. Raises ShardError if it is gone, or has another sha256 or size than the log says."""
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise ShardError("the file is gone") from None
    found = sha256_hex(data)
    if found != sha256:
        raise ShardError(f"its sha256 is {found[:12]}, the log says {sha256[:12]}: altered or truncated")
    if size_bytes is not None and len(data) != size_bytes:
        raise ShardError(f"it has {len(data)} bytes, the log says {size_bytes}")
    return data
