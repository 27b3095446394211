"""Writes and reads Parquet files, and reads them so that the process can end afterwards.

pyarrow decodes columns in threads of its own, and those that read from a Python file wait for the interpreter. If it is
about to end, the process hangs or aborts ("terminate called without an active exception", apache/arrow issues 50482 and
34314). Hence: no such threads, and bytes in a buffer of Arrow's.
"""

import io
from collections.abc import Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq


def written(table: pa.Table, *, compression: str = "zstd", **options: Any) -> bytes:
    """Returns a table as a Parquet file; `options` are those of pyarrow's `write_table`."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, **options)
    return sink.getvalue()


def opened(source: bytes | IO[bytes] | str) -> pq.ParquetFile:
    """Opens a Parquet file: its bytes, a binary file or a path. Raises ArrowException or OSError if it is no Parquet."""
    return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)


def read(source: bytes | IO[bytes] | str, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the table in a Parquet file, or some of its columns. Raises ArrowException or OSError if it is no Parquet.

    It does not call pq.read_table, which imports pandas if that is installed: a second of every worker's start.
    """
    return opened(source).read(None if columns is None else list(columns), use_threads=False)
