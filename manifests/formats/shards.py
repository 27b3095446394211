"""Writes and reads shards: a file for one part (and one crop), modality, form and recipe; row i is sample i.

Parquet: columns `key`, `status` and `tokens` (a list of the narrowest unsigned type that holds the vocabulary) or
`label` (text, a record, a list of records, or a vector). WebDataset: USTAR, for each row `<member>.json` with the row's
key and status and, if the row is ok, `<member>.<extension>` with the value. Equal rows give equal bytes. A row that is not
ok is null, never a gap.

Status: 0 ok, 1 failed, 2 absent at the source, 3 not selected, 4 forgotten.
"""

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import IO, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from manifests.commands import command
from manifests.errors import ShardError
from manifests.modality import Modality
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import parquet
from manifests.store.storage import Storage

_ROW_GROUP_ROWS = 1024
_SPOOL_BYTES = 64 << 20
_SAMPLE_SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("part", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.binary(32)),
    ]
)
SAMPLE_COLUMNS = tuple(_SAMPLE_SCHEMA.names)
# For bytes that are no file of their own: their first byte in a tar (the source's, or the one in the workspace that
# `source_pack` names), or why there are no bytes. Only samples files that need these columns have them.
PLACE_COLUMNS = {"source_offset": pa.int64(), "source_pack": pa.string(), "source_error": pa.string()}
RESERVED_COLUMNS = (*SAMPLE_COLUMNS, *PLACE_COLUMNS)
_FAILURE_SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("part", pa.int32()),
        ("row", pa.int32()),
        ("key", pa.string()),
        ("modality", pa.string()),
        ("form", pa.string()),
        ("crop", pa.int32()),
        ("stage", pa.string()),
        ("class", pa.string()),
        ("message", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlace:
    """Says where the bytes of a sample lie, by the columns of a samples file; `source` is None if it was forgotten."""

    source: str | None
    size_bytes: int | None = None
    source_offset: int | None = None
    source_pack: str | None = None
    source_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(SourcePlace):
    """Holds a row of a samples file; `columns` are its source columns."""

    corpus: str
    part: int
    row: int
    key: str
    sha256: bytes | None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_forgotten(self) -> bool:
        """Tells whether the row was forgotten: every other has the sha256 of its source, or an error in its place."""
        return self.sha256 is None and not self.source_error


class Status(IntEnum):
    """Tells what became of a row of a shard."""

    OK = 0
    FAILED = 1
    ABSENT = 2
    NOT_SELECTED = 3
    FORGOTTEN = 4


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """Holds a shard as read: keys and statuses of all rows, and values (None if not read; each None if its row is not ok)."""

    keys: list[str]
    statuses: list[int]
    values: list[Any] | None


def named_by(sha256: str, failed_sha256: str | None) -> str:
    """Returns the hash that a shard and its failed file are named by: the shard's own, or that of both.

    Two equal shards may have different failed files: a row may fail a second time for another reason.
    """
    return sha256 if failed_sha256 is None else sha256_hex(f"{sha256} {failed_sha256}".encode())


def keys_digest(keys: Sequence[str]) -> str:
    """Returns a sha256 of keys: two files with the same one hold the same rows in the same order."""
    return sha256_hex("\n".join(keys).encode())


def token_type(vocabulary: int) -> pa.DataType:
    """Returns the narrowest unsigned type that holds tokens 0 <= token < vocabulary."""
    return pa.from_numpy_dtype(np.min_scalar_type(vocabulary - 1))


def label_type(modality: Modality) -> pa.DataType:
    """Returns the Arrow type of the `label` column of a modality that is kept as Parquet."""
    if modality.kind == "text":
        return pa.string()
    if modality.kind == "vector":
        return pa.list_(pa.from_numpy_dtype(modality.dtype), modality.channels)
    record = pa.struct([(name, _field_type(kind)) for name, kind in modality.fields.items()])
    return pa.list_(record) if modality.many else record


def _field_type(kind: str) -> pa.DataType:
    """Returns the Arrow type of a field: `float32`, or a list of such, `list<float32>`."""
    item = pa.type_for_alias(kind.removeprefix("list<").removesuffix(">"))
    return pa.list_(item) if kind.startswith("list<") else item


def write_tokens(
    keys: Sequence[str], statuses: Sequence[int], values: Sequence[Any], vocabulary: int, facts: Mapping[str, Any]
) -> bytes:
    """Writes a Parquet shard of tokens; `values` are sequences of integers, None if the row is not ok.

    Parquet holds such lists as INT32: DELTA_BINARY_PACKED under zstd, without dictionary, takes 1.07–1.16 of the bits
    of random tokens (from 1,000 rows of 196 up), and plain readers see integers.
    """
    tokens = pa.array(values, pa.list_(token_type(vocabulary)))
    return _write_parquet(keys, statuses, "tokens", tokens, facts)


def write_labels(
    keys: Sequence[str], statuses: Sequence[int], values: Sequence[Any], modality: Modality, facts: Mapping[str, Any]
) -> bytes:
    """Writes a Parquet shard of records, text or vectors; `values` as labelers make them, None if the row is not ok."""
    return _write_parquet(keys, statuses, "label", pa.array(values, label_type(modality)), facts)


def _write_parquet(
    keys: Sequence[str], statuses: Sequence[int], column: str, values: pa.Array, facts: Mapping[str, Any]
) -> bytes:
    table = pa.table(
        {"key": pa.array(keys, pa.string()), "status": pa.array(statuses, pa.uint8()), column: values}
    ).replace_schema_metadata({"modmill": canonical_json({"format": 1, **facts})})
    return encode_table(table)


def encode_table(table: pa.Table) -> bytes:
    """Writes a Parquet shard from its columns and the facts in its metadata."""
    is_tokens = "tokens" in table.column_names
    return parquet.written(
        table,
        use_dictionary=["status"] if is_tokens else True,
        column_encoding={"tokens.list.element": "DELTA_BINARY_PACKED"} if is_tokens else None,
        row_group_size=_ROW_GROUP_ROWS,
    )


class TarWriter:
    """Writes a WebDataset shard row by row, in the part's order."""

    def __init__(self, extension: str) -> None:
        self._extension = extension
        # Both stay open for as long as rows arrive; `finish` hands the file over.
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, key: str, status: int, value: bytes | None) -> None:
        """Adds a row; `value` is the encoded member, None if the row is not ok."""
        name = member_name(key)
        members = {f"{name}.json": canonical_json({"key": key, "status": int(status)})}
        if value is not None:
            members[f"{name}.{self._extension}"] = value
        for member, data in sorted(members.items()):
            add_member(self._tar, member, data)

    def so_far(self) -> bytes:
        """Returns a whole tar of the rows that were added until now; more may follow."""
        self._file.seek(0)
        data = self._file.read(self._tar.offset)
        self._file.seek(self._tar.offset)
        return data + bytes(2 * tarfile.BLOCKSIZE)

    def finish(self) -> IO[bytes]:
        """Returns the whole shard as a stream at its start; closing the stream frees the shard."""
        self._tar.close()
        self._file.seek(0)
        return self._file


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file without time or owner, so that equal files give equal tars."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def member_name(key: str) -> str:
    """Returns a key as a name in a tar: itself if it is short and plain, else percent-encoded, or its hash if too long.

    WebDataset splits names at the first dot and USTAR holds 100 bytes.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key):
        return key
    encoded = quote(key, safe="").replace(".", "%2E").replace("~", "%7E")
    return encoded if len(encoded) <= 80 else "sha256-" + sha256_hex(key.encode())


def read_rows(format: str, file: bytes | IO[bytes], *, values: bool = True) -> ShardRows:
    """Reads a shard of either format, parquet or webdataset; see `read_parquet` and `read_tar`."""
    if format == "parquet":
        return read_parquet(file, values=values)
    return read_tar(io.BytesIO(file) if isinstance(file, bytes) else file, values=values)


def read_statuses(storage: Storage, path: str, format: str, rows: int) -> np.ndarray:
    """Returns what became of each row of a shard: uint8 (rows,). Raises ShardError if it is gone or has other rows."""
    where, hint = storage.location(path), f"see `{command('verify', storage.uri)}`"
    try:
        with storage.open(path) as file:
            if format == "parquet":
                statuses = parquet.read(file, ["status"])["status"].to_numpy()
            else:
                statuses = np.array(read_tar(file, values=False).statuses, np.uint8)
    except (OSError, KeyError, pa.ArrowException, ShardError) as error:
        raise ShardError(f"{where} cannot be read ({error}); {hint}") from error
    if len(statuses) != rows:
        raise ShardError(f"{where} has {len(statuses)} rows, the log says {rows}; {hint}")
    return statuses


def read_parquet(file: bytes | IO[bytes] | str, *, values: bool = True, whole: bool = False) -> ShardRows:
    """Reads a Parquet shard of either form; `whole` decodes its values even if they are not asked for.

    Raises ShardError if it is no such shard.
    """
    try:
        opened = parquet.opened(file)
        column = "tokens" if "tokens" in opened.schema_arrow.names else "label"
        table = opened.read(["key", "status", column] if values or whole else ["key", "status"], use_threads=False)
        return ShardRows(
            keys=table["key"].to_pylist(),
            statuses=table["status"].to_pylist(),
            values=table[column].to_pylist() if values else None,
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ShardError(f"no Parquet shard: {error}") from error


def read_tar(file: IO[bytes], *, values: bool = True) -> ShardRows:
    """Reads a WebDataset shard; values are the members' bytes. Raises ShardError if it is no such shard.

    Accepts plain files only and streams them: nothing is extracted.
    """
    keys: list[str] = []
    statuses: list[int] = []
    found: list[Any] = []
    rows: dict[str, set[str]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for stem, extension, data in _members(tar):
                if stem not in rows:
                    rows[stem] = set()
                    keys.append("")
                    statuses.append(-1)
                    found.append(None)
                elif stem != next(reversed(rows)) or extension in rows[stem] or len(rows[stem]) == 2:
                    raise ShardError(f"row {stem!r} stands twice in the tar, or has more than one value")
                rows[stem].add(extension)
                if extension == "json":
                    document = json.loads(data)
                    keys[-1], statuses[-1] = document["key"], document["status"]
                elif values:
                    found[-1] = data
            _check_end(tar, file)
    except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise ShardError(f"no WebDataset shard: {error}") from error
    if -1 in statuses:
        raise ShardError(f"row {statuses.index(-1)} of the tar has no .json member")
    return ShardRows(keys=keys, statuses=statuses, values=found if values else None)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    for info in tar:
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ShardError(f"member {info.name!r} of the tar is no plain file")
        stem, _, extension = info.name.partition(".")
        stream = tar.extractfile(info)
        data = b"" if stream is None else stream.read()
        if len(data) != info.size:
            raise ShardError(f"member {info.name!r} of the tar is cut short")
        yield stem, extension, data


def _check_end(tar: tarfile.TarFile, file: IO[bytes]) -> None:
    """Raises ShardError if no end mark follows: tarfile takes a missing or broken header for the end."""
    file.seek(tar.offset)
    tail = file.read(tarfile.RECORDSIZE)
    if len(tail) < 2 * tarfile.BLOCKSIZE or any(tail):
        raise ShardError(f"the tar is cut short or broken at byte {tar.offset}")


def write_failures(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Writes the failed file of a shard: a row for each failed row, with the columns of the view `failures`."""
    return parquet.written(pa.Table.from_pylist(list(records), _FAILURE_SCHEMA))


def write_samples(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> bytes:
    """Writes the samples file of a part: the fixed columns, then the source columns as `columns` types them."""
    schema = pa.schema([*_SAMPLE_SCHEMA, *columns])
    return encode_samples(pa.Table.from_pylist([dict(row) for row in rows], schema))


def encode_samples(table: pa.Table) -> bytes:
    """Writes a samples file from its columns.

    A filter over all samples reads thousands of such files, so they are made to be read quickly: LZ4, and no dictionary
    if values hardly repeat, take half the time of zstd, for 5 % more bytes. Columns with nulls always have a dictionary:
    without one, DuckDB 2.0 finds `x IS NULL` true of the one text that a column of nulls may hold.
    """
    with_dictionary: list[str] = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count or pa.types.is_nested(column.type) or 2 * len(column.unique()) <= len(column):
            with_dictionary += _leaves(name, column.type)
    return parquet.written(table, compression="lz4", use_dictionary=with_dictionary, row_group_size=16384)


def _leaves(name: str, kind: pa.DataType) -> list[str]:
    """Returns what Parquet calls the columns that a column of Arrow becomes."""
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{name}.{field.name}", field.type)]
    if pa.types.is_map(kind):
        return [
            *_leaves(f"{name}.key_value.key", kind.key_type),
            *_leaves(f"{name}.key_value.value", kind.item_type),
        ]
    return _leaves(f"{name}.list.element", kind.value_type) if pa.types.is_nested(kind) else [name]


def read_samples(data: bytes) -> list[Sample]:
    """Reads the rows of a samples file. Raises ShardError if it is no samples file."""
    try:
        table = parquet.read(data)
    except pa.ArrowException as error:
        raise ShardError(f"no samples file: {error}") from error
    if missing := [name for name in SAMPLE_COLUMNS if name not in table.column_names]:
        raise ShardError(f"no samples file: the columns {', '.join(missing)} are missing")
    fixed = [name for name in RESERVED_COLUMNS if name in table.column_names]
    rows = []
    for row in table.to_pylist():
        known = {name: row.pop(name) for name in fixed}
        rows.append(Sample(**known, columns=row))
    return rows
