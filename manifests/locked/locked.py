"""Answers SQL from strangers: one query, in a process of its own, over a copy of the views and nothing else.

The views of a workspace read files, which is just what a stranger's SQL must not do. So all of them are copied as plain
tables of their names into a private DuckDB file, once for each version of the workspace, and the query runs over that in a
process (`child.py`) which has the file open read-only with DuckDB's access to files, extensions and settings off
and locked; which can write no file and has no environment; which ends itself at its limits of memory, processor and wall
time; and which is believed nothing but an Arrow stream of plain types, no longer than the caps below.

What a query can still do: read all that the views say (the paths of sources and shards among it), read DuckDB's settings
and with them where this user's cache folder is and which versions run here, use two cores for `timeout_s`, and take
`memory_bytes`. What it could do if DuckDB itself has a hole: what this user may do. There is no other user, container or
filter of system calls around the process; a service for the public needs one. The limit of memory is as strict as the
system's RLIMIT_AS: on macOS only DuckDB's own holds. Table macros are not there, views only.
"""

import contextlib
import hashlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import QueryError, WorkspaceError
from manifests.locked import child
from manifests.store.storage import cache_folder

if TYPE_CHECKING:
    import pyarrow as pa

    from manifests.catalog.catalog import Catalog

MAX_ROWS = 1_000_000
MAX_BYTES = 256 << 20
TIMEOUT_S = 10.0
MEMORY_BYTES = 2_000_000_000

_FOLDER = "locked"
_KEPT = 3
# What the stream may have beside the values, and how long a process may take to start or to end.
_FRAME_BYTES = 16 << 20
_START_S = 20.0
_TIME_UP = (-signal.SIGALRM, -signal.SIGXCPU)
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH")
_PROGRAM = "import sys; sys.path[:] = {path!r}; from manifests.locked.child import main; main()"


def ask(
    catalog: "Catalog", query: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
) -> "pa.Table":
    """Returns the answer of `catalog.sql(query)`, with the query locked in.

    Raises QueryError for SQL that is wrong or refused, takes more time or memory than given, or has a longer answer than
    MAX_ROWS rows or MAX_BYTES bytes; WorkspaceError if the cache folder cannot be written.
    """
    try:
        folder = cache_folder() / catalog.workspace_id / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as own:
            _link_copy(catalog, folder, Path(own) / child.DATABASE)
            code, answer, message = _run(query, own, timeout_s, memory_bytes)
    except OSError as error:
        raise WorkspaceError(
            f"a locked query needs a copy of the views, which cannot be made: {error}; free space there, or set MODMILL_CACHE"
        ) from error
    if code == 0:
        return read_answer(answer)
    raise QueryError(_reason(code, message, timeout_s, memory_bytes))


def clear(workspace_id: str) -> None:
    """Removes the copies that were made of a workspace's views: after a forget they would hold what it forgot."""
    shutil.rmtree(cache_folder() / workspace_id / _FOLDER, ignore_errors=True)


def _link_copy(catalog: "Catalog", folder: Path, target: Path) -> None:
    """Puts the copy of this version's views at `target`: a link, so that it stays whoever removes the old ones."""
    file = folder / f"{_identity(catalog)}.duckdb"
    with contextlib.suppress(FileNotFoundError):
        os.link(file, target)
        os.utime(file)
        return
    made = target.with_name("made.duckdb")
    catalog.copy_views(made)
    made.chmod(0o400)
    os.link(made, target)
    os.replace(made, file)
    by_age = sorted(folder.glob("*.duckdb"), key=lambda path: path.stat().st_mtime, reverse=True)
    for stale in by_age[_KEPT:]:
        stale.unlink(missing_ok=True)


def _identity(catalog: "Catalog") -> str:
    """Names what the views say: by the newest entry of the log that is looked at, the code, and the tables attached."""
    newest = catalog.fetch("SELECT version, sha256 FROM state.applied ORDER BY version DESC LIMIT 1")
    code = [
        path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.*")) if path.suffix in (".py", ".sql")
    ]
    # A table that was given in Python, not as a file, has nothing to know it by.
    attached = [(table.name, table.on, table.sha256 or secrets.token_hex(8)) for table in catalog.attached]
    return hashlib.sha256(repr((newest, code, attached)).encode()).hexdigest()[:16]


def _run(query: str, folder: str, timeout_s: float, memory_bytes: int) -> tuple[int, bytes, str]:
    """Returns the exit code of the process that ran the query, what it answered, and what it said."""
    request = {
        "query": query,
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
        "max_rows": MAX_ROWS,
        "max_bytes": MAX_BYTES,
    }
    program = _PROGRAM.format(path=[os.path.abspath(entry) for entry in sys.path])
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # The rest keeps what libraries reserve of the address space small, so that its limit is one of memory.
    environment |= {
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    with tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", program],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
    with process:
        try:
            # The process ends itself; this is for one that was made not to.
            until = time.monotonic() + timeout_s + _START_S
            answer, message = _read(process, until)
            return process.wait(max(until - time.monotonic(), 0)), answer, message.decode(errors="replace")
        except (subprocess.TimeoutExpired, TimeoutError):
            return -signal.SIGALRM, b"", ""
        except OverflowError:
            return child.TOO_LARGE, b"", ""
        finally:
            process.kill()


def _read(process: "subprocess.Popen[bytes]", until: float) -> tuple[bytes, bytes]:
    """Reads all of standard output and standard error. Raises TimeoutError, and OverflowError at more than the caps."""
    assert process.stdout is not None
    assert process.stderr is not None
    room = {process.stdout.fileno(): MAX_BYTES + _FRAME_BYTES, process.stderr.fileno(): 1 << 16}
    pieces: dict[int, list[bytes]] = {descriptor: [] for descriptor in room}
    with selectors.DefaultSelector() as selector:
        for descriptor in room:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(until - time.monotonic())
            if time.monotonic() > until:
                raise TimeoutError
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 20)
                if not piece:
                    selector.unregister(key.fd)
                room[key.fd] -= len(piece)
                if room[key.fd] < 0:
                    raise OverflowError
                pieces[key.fd].append(piece)
    answer, message = (b"".join(found) for found in pieces.values())
    return answer, message


def _reason(code: int, message: str, timeout_s: float, memory_bytes: int) -> str:
    if code == child.WRONG:
        return message
    if code == child.REFUSED:
        return f"refused: {message}"
    if code == child.TOO_LARGE:
        return f"refused: the answer is over {MAX_ROWS:,} rows or {MAX_BYTES >> 20} MiB; ask for less, as with LIMIT"
    if code in _TIME_UP:
        return f"stopped after {timeout_s:g} s; ask for less, or give more with --timeout"
    size = f"{memory_bytes / 1e9:g} GB"
    if code == child.OUT_OF_MEMORY:
        return f"stopped: it took more than {size} of memory; ask for less, or give more with --memory"
    return f"stopped: its process ended by {code}, as if it takes more than {size} of memory; {message}".rstrip("; ")


def read_answer(answer: bytes) -> "pa.Table":
    """Returns the table of an Arrow stream that is not trusted. Raises QueryError for types that are not plain."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(answer).read_all()
        table.validate(full=True)
    except pa.ArrowException as error:
        raise QueryError(f"refused: the answer is no whole Arrow stream: {error}") from error
    for field in table.schema:
        if not _is_plain(field):
            raise QueryError(f"refused: the column {field.name!r} is of the type {field.type}; cast it to VARCHAR")
    return table


def _is_plain(field: "pa.Field") -> bool:
    import pyarrow as pa

    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or (field.metadata and b"ARROW:extension:name" in field.metadata):
        return False
    if pa.types.is_dictionary(kind):
        return pa.types.is_string(kind.value_type)
    if pa.types.is_union(kind):
        return False
    return all(_is_plain(kind.field(place)) for place in range(kind.num_fields))
