"""Parquet files, read so that the process can end afterwards.

pyarrow decodes columns in threads of its own, and those that read from a Python file wait for the interpreter: where it is
about to end, the process hangs or aborts ("terminate called without an active exception", apache/arrow issues 50482 and
34314). Hence: no such threads, and bytes in a buffer of Arrow's.
"""

from collections.abc import Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def opened(source: bytes | IO[bytes] | str) -> pq.ParquetFile:
    """A Parquet file of these bytes, of a binary file or at a path. Raises ArrowException or OSError where it is none."""
    return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)


def read(source: bytes | IO[bytes] | str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in it, or some of its columns.

    Not pq.read_table, which imports pandas where that is installed: a second of every worker's start. Raises ArrowException
    or OSError where it is no Parquet.
    """
    return opened(source).read(None if columns is None else list(columns), use_threads=False)
