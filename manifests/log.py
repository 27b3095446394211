"""The commit log: the truth about a workspace.

`_meta/format.json` says what the workspace is; `_meta/log/<20-digit version>.json` is one document a commit, created if
absent, so that two writers never share a version and nothing that was written is ever changed. Format 1:

    {"format": 1, "version": 7, "txn": "<32 hex digits>", "run": "<run>", "time": "2026-11-23T22:11:00.123456Z",
     "previous": "<sha256 of the entry before, or null>", "actions": [{"action": "shard", ...}, ...]}

The actions and their fields are in `manifests/actions.py`. Unknown actions and fields are kept and passed over, so that
format 1 stays readable for ever; a workspace of a higher format is refused.
"""

import datetime
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import LogError, WorkspaceError
from manifests.recipe import canonical_json, sha256_hex
from manifests.storage import Storage

FORMAT = 1
FORMAT_PATH = "_meta/format.json"
LOG_FOLDER = "_meta/log"
# From so many new entries on, the rest is read by threads: an object store answers in tens of milliseconds.
_FEW_ENTRIES = 8
_READERS = 32
_WINDOW = 256
LEASE_PATH = "_meta/lease.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One commit, as it stands in the log; `sha256` is of its bytes."""

    version: int
    txn: str
    run: str
    time: str
    previous: str | None
    actions: tuple[dict[str, Any], ...]
    sha256: str


def now() -> str:
    """The time in UTC, ISO 8601 with microseconds and Z."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def create_workspace(storage: Storage) -> str:
    """Makes the storage a workspace where it is none yet; its id either way."""
    if not storage.exists(FORMAT_PATH):
        from importlib.metadata import version

        document = {
            "format": FORMAT,
            "id": secrets.token_hex(16),
            "created_by": f"modmill {version('modmill')}",
            "time": now(),
        }
        storage.put(FORMAT_PATH, canonical_json(document))
    return workspace_id(storage)


def workspace_id(storage: Storage) -> str:
    """The workspace's id. Raises WorkspaceError where there is none, or where its format is newer than this code's."""
    try:
        document = json.loads(storage.read(FORMAT_PATH))
        found, identity = document["format"], document["id"]
    except FileNotFoundError:
        raise WorkspaceError(
            f"{storage.uri} is no modmill workspace (no {FORMAT_PATH}); `modmill run FILE` makes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{storage.location(FORMAT_PATH)} cannot be read ({error}); restore it from a copy"
        ) from error
    if not isinstance(found, int) or found > FORMAT:
        raise WorkspaceError(
            f"{storage.uri} has format {found}, this modmill reads up to format {FORMAT}; install a newer modmill"
        )
    return identity


def entry_path(version: int) -> str:
    return f"{LOG_FOLDER}/{version:020d}.json"


def read_entry(storage: Storage, version: int) -> Entry | None:
    """The entry of a version, None where the log ends before it. Raises LogError for one that cannot be read."""
    data = _read(storage, version)
    return None if data is None else _parsed(storage, version, data)


def _read(storage: Storage, version: int) -> bytes | None:
    try:
        return storage.read(entry_path(version))
    except FileNotFoundError:
        return None


def _parsed(storage: Storage, version: int, data: bytes) -> Entry:
    try:
        document = json.loads(data)
        if document["format"] > FORMAT:
            raise WorkspaceError(
                f"{storage.location(entry_path(version))} has format {document['format']}, this modmill reads up to "
                f"format {FORMAT}; install a newer modmill"
            )
        if document["version"] != version:
            raise ValueError(f"it says version {document['version']}")
        if not all(isinstance(action, dict) for action in document["actions"]):
            raise ValueError("its actions are no objects")
        return Entry(
            version=version,
            txn=document["txn"],
            run=document["run"],
            time=document["time"],
            previous=document["previous"],
            actions=tuple(document["actions"]),
            sha256=sha256_hex(data),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(
            f"{storage.location(entry_path(version))} cannot be read ({type(error).__name__}: {error}); expected one "
            "JSON document of format 1; restore it from a copy of the workspace"
        ) from error


def entries(storage: Storage, *, after: int = 0, previous: str | None = None) -> Iterator[Entry]:
    """The entries after a version, in order, checked against the chain of hashes.

    `previous` is the sha256 of entry `after`. Raises LogError where an entry does not continue it, or is missing
    before the next.
    """
    version = after
    for data in _documents(storage, after):
        version += 1
        entry = _parsed(storage, version, data)
        if entry.previous != previous:
            raise LogError(
                f"{storage.location(entry_path(version))} follows an entry of sha256 {str(entry.previous)[:12]}, but "
                f"entry {version - 1} has {str(previous)[:12]}: one of the two was altered; restore it from a copy"
            )
        previous = entry.sha256
        yield entry
    # Entries are made in order: where the next but one stands, the next stood before it, if not when we looked just now.
    if storage.exists(entry_path(version + 2)) and _read(storage, version + 1) is None:
        raise LogError(
            f"{storage.location(entry_path(version + 1))} is missing, but entry {version + 2} stands; restore it from a "
            "copy of the workspace"
        )


def _documents(storage: Storage, after: int) -> Iterator[bytes]:
    """The bytes of the entries after a version, in order, until one is not there; many of them are read side by side."""
    version = after
    while (data := _read(storage, version + 1)) is not None:
        version += 1
        yield data
        if version - after != _FEW_ENTRIES:
            continue
        newest = max((int(name[:20]) for name in storage.names(LOG_FOLDER) if name[:20].isdecimal()), default=0)
        with ThreadPoolExecutor(_READERS) as pool:
            while version < newest:
                window = range(version + 1, min(version + _WINDOW, newest) + 1)
                for data in pool.map(lambda number: _read(storage, number), window):
                    if data is None:
                        return
                    version += 1
                    yield data


def append(
    storage: Storage, actions: Sequence[Mapping[str, Any]], *, run: str, after: int, previous: str | None
) -> Entry | None:
    """Commits the actions as version `after` + 1; None where another writer took that version first."""
    document = {
        "format": FORMAT,
        "version": after + 1,
        "txn": secrets.token_hex(16),
        "run": run,
        "time": now(),
        "previous": previous,
        "actions": [dict(action) for action in actions],
    }
    data = canonical_json(document)
    if not storage.put(entry_path(after + 1), data):
        # An object store says "taken" of our own entry too, where its first answer got lost and the request went again.
        standing = read_entry(storage, after + 1)
        if standing is None or standing.txn != document["txn"]:
            return None
    return Entry(
        version=after + 1,
        txn=document["txn"],
        run=run,
        time=document["time"],
        previous=previous,
        actions=tuple(document["actions"]),
        sha256=sha256_hex(data),
    )


@contextmanager
def writer_lease(storage: Storage, run: str) -> Iterator[None]:
    """Holds the workspace as its one writer. Raises WorkspaceError naming the holder where there is one.

    On a local disk this is a flock on the lease file, which the kernel drops with the process. Elsewhere put-if-absent
    of log entries alone keeps two writers from losing or doubling anything.
    """
    if not storage.is_local:
        yield
        return
    path = Path(storage.full(LEASE_PATH))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceError(f"{storage.uri} is being written by {_holder(path)}; wait for it or stop it") from None
        document = {"run": run, "host": socket.gethostname(), "pid": os.getpid(), "since": now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, canonical_json(document), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        lease = json.loads(path.read_text())
        return f"run {lease['run']} on {lease['host']} (pid {lease['pid']}, since {lease['since']})"
    except (ValueError, KeyError, OSError):
        return "another process"
