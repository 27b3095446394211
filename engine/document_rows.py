"""Single rows of JSONL and Parquet files, by number from 0; in JSONL a row is a line."""

import bisect
import os
from array import array
from collections.abc import Mapping
from functools import lru_cache
from typing import IO, Any, Protocol

from engine.listing import open_file, suffix
from engine.values import parsed, plain
from manifests.errors import SourceError

LINES = (".jsonl", ".ndjson", ".json-lines")


class Rows(Protocol):
    """The rows of one open file."""

    def row(self, number: int) -> dict[str, Any]:
        """The fields of a row. Raises SourceError where it is no row of fields."""
        ...

    def close(self) -> None: ...


def open_rows(root: str, path: str) -> Rows:
    """The rows of a file below a source's root; to be closed. Raises SourceError where it cannot be opened."""
    stream = open_file(root, path)
    return _Lines(root, path, stream) if suffix(path) in LINES else _ParquetRows(path, stream)


def fields_of(line: bytes, source: str) -> dict[str, Any]:
    """The fields of a line of JSONL, called `source` in messages. Raises SourceError where it is no JSON object."""
    try:
        fields = parsed(line)
    except ValueError as error:
        raise SourceError(f"{source} is no JSON: {error}; mend the line") from error
    if not isinstance(fields, dict):
        raise SourceError(f"{source} is a JSON {type(fields).__name__}, expected an object")
    return fields


class _Lines:
    """Rows of a JSONL file, found by the offsets of its lines."""

    def __init__(self, root: str, path: str, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._offsets = _line_offsets(root, path, _identity(stream))

    def close(self) -> None:
        self._stream.close()

    def row(self, number: int) -> dict[str, Any]:
        source = f"{self._path}#{number}"
        if number + 1 >= len(self._offsets):
            raise SourceError(f"{source} is gone: the file has {len(self._offsets) - 1} lines now")
        self._stream.seek(self._offsets[number])
        return fields_of(self._stream.read(self._offsets[number + 1] - self._offsets[number]), source)


# A worker reads a few thousand lines of the file at a time, for every part again.
@lru_cache(maxsize=16)
def _line_offsets(root: str, path: str, identity: tuple[int, int]) -> array:
    """Where each line of a file begins, and where the last one ends; `identity` changes where the file does."""
    offsets = array("Q", [0])
    with open_file(root, path) as stream:
        for line in stream:
            offsets.append(offsets[-1] + len(line))
    return offsets


def _identity(stream: IO[bytes]) -> tuple[int, int]:
    """Size and time of change (ns; 0 where the store is not local) of an open file."""
    try:
        status = os.fstat(stream.fileno())
    except (AttributeError, OSError):
        return stream.seek(0, os.SEEK_END), 0
    return status.st_size, status.st_mtime_ns


class _ParquetRows:
    """Rows of a Parquet file; the row group in use stays in memory."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            self._file = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} is no valid Parquet file: {error}") from error
        metadata = self._file.metadata
        self._ends = [0]
        for group in range(metadata.num_row_groups):
            self._ends.append(self._ends[-1] + metadata.row_group(group).num_rows)
        self._group: tuple[int, Any] | None = None

    def close(self) -> None:
        self._file.close()

    def row(self, number: int) -> dict[str, Any]:
        import pyarrow as pa

        if number >= self._ends[-1]:
            raise SourceError(f"{self._path}#{number} is gone: the file has {self._ends[-1]} rows now")
        group = bisect.bisect_right(self._ends, number) - 1
        try:
            if self._group is None or self._group[0] != group:
                self._group = (group, self._file.read_row_group(group, use_threads=False))
            fields: Mapping[str, Any] = self._group[1].slice(number - self._ends[group], 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SourceError(f"{self._path}#{number} cannot be read: {error}") from error
        return plain(fields)
