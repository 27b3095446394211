"""Runs a stranger's query for `locked.py` in a process: a copy of the views, no other file, little memory, little time.

It takes its request as JSON from standard input and gives an Arrow stream to standard output, or ends with one of the
codes below and a message on standard error. It puts its limits on itself before it looks at the query.
"""

import json
import math
import os
import resource
import signal
import sys
from typing import Any

import duckdb

from manifests.catalog import reading
from manifests.errors import QueryError

REFUSED, WRONG, OUT_OF_MEMORY, TOO_LARGE = 10, 11, 12, 13
# In the folder that the process starts in; taken away once it is open.
DATABASE = "workspace.duckdb"

_THREADS = 2
_BATCH_ROWS = 10_000
# What pyarrow maps when it is imported, which is once the query proves to be one.
_ARROW_BYTES = 300 << 20
_SETTINGS = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_unsigned_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,
    "threads": _THREADS,
    "temp_directory": "",
    "max_temp_directory_size": "0B",
}


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    try:
        connection = _open(request["memory_bytes"])
        _limit(request["memory_bytes"], request["timeout_s"])
        _answer(connection, request)
    except Exception as error:  # Of DuckDB, of Arrow, of this program: a trace would tell where that stands.
        _end(_code(error), str(error))
    _end(0, "")


def _open(memory_bytes: int) -> duckdb.DuckDBPyConnection:
    # DuckDB's own limit comes first, since it ends a query with a message; what it does not count meets the other.
    settings: dict[str, Any] = {**_SETTINGS, "memory_limit": f"{memory_bytes * 4 // 5 // 1000}KB"}
    connection = duckdb.connect(DATABASE, read_only=True, config=settings)
    connection.execute("SET lock_configuration = true")
    os.unlink(DATABASE)
    return connection


def _limit(memory_bytes: int, timeout_s: float) -> None:
    limits = {
        resource.RLIMIT_AS: _address_space_bytes() + memory_bytes + _ARROW_BYTES,
        resource.RLIMIT_CPU: math.ceil(timeout_s * _THREADS) + 10,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    # Nothing handles the alarm: it ends the process, whatever that is at.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)


def _address_space_bytes() -> int:
    """Returns the bytes that the process has mapped already, most of them libraries."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 4 << 30  # No Linux.


def _answer(connection: duckdb.DuckDBPyConnection, request: dict[str, Any]) -> None:
    reading.check(connection, request["query"])
    relation = connection.sql(request["query"])
    import pyarrow as pa

    reader = relation.to_arrow_reader(_BATCH_ROWS)
    rows = size_bytes = 0
    with os.fdopen(1, "wb") as pipe:
        with pa.ipc.new_stream(pipe, reader.schema) as stream:
            for batch in reader:
                rows += batch.num_rows
                size_bytes += batch.nbytes
                if rows > request["max_rows"] or size_bytes > request["max_bytes"]:
                    _end(TOO_LARGE, "")
                stream.write_batch(batch)


def _code(error: Exception) -> int:
    message = str(error)
    # DuckDB's limit, and the limit of the process as DuckDB and Arrow tell of it.
    if isinstance(error, MemoryError) or "Out of Memory" in message or "bad_alloc" in message:
        return OUT_OF_MEMORY
    if isinstance(error, QueryError | duckdb.PermissionException) or "configuration has been locked" in message:
        return REFUSED
    return WRONG


def _end(code: int, message: str) -> None:
    """Ends the process at once; what DuckDB holds needs no tidying."""
    os.write(2, message.encode(errors="replace")[:16_000])
    os._exit(code)
