"""Reads and appends to the commit log: the truth about a workspace.

`_meta/format.json` says what the workspace is; `_meta/log/<20-digit version>.json` is one document a commit, created if
absent, so that two writers never share a version and nothing that was written is ever changed. Format 1:

    {"format": 1, "version": 7, "txn": "<32 hex digits>", "run": "<run>", "time": "2026-11-23T22:11:00.123456Z",
     "previous": "<sha256 of the entry before, or null>", "actions": [{"action": "shard", ...}, ...],
     "seal": "<sha256 of this document without its seal>"}

Every entry is told unaltered by the next one, and the newest by its seal (the first writers made none).
The actions and their fields are in `manifests/log/actions.py`. Unknown actions and fields are kept and passed over, so that
format 1 stays readable for ever; a workspace of a higher format is refused.
"""

import datetime
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from manifests.commands import command
from manifests.errors import LogError, WorkspaceError
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage

FORMAT = 1
# From this many new entries on, the rest is read by threads: an object store answers in tens of milliseconds.
_FEW_ENTRIES = 8
_READERS = 32
_WINDOW = 256
_SEAL = b',"seal":"'
_SEAL_BYTES = len(_SEAL) + 64 + 2


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Holds one commit, as it stands in the log; `sha256` is of its bytes."""

    version: int
    txn: str
    run: str
    time: str
    previous: str | None
    actions: tuple[dict[str, Any], ...]
    sha256: str


def now() -> str:
    """Returns the time in UTC, ISO 8601 with microseconds and Z."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def run_name(kind: str) -> str:
    """Returns a name for a run that begins now: its kind, the time in UTC, and digits that no other run has."""
    return f"{kind}-{now()[:19].replace(':', '').replace('-', '')}-{secrets.token_hex(3)}"


def create_workspace(storage: Storage, *, identity: str | None = None) -> str:
    """Makes the storage a workspace if it is not one yet, with a new id unless one is given, and returns its id.

    Raises WorkspaceError if a file stands there, and for a store that replaces what stands although it is asked not to:
    nothing would be safe there.
    """
    if storage.is_local and os.path.isfile(storage.root):
        raise WorkspaceError(f"{storage.uri} is a file, and a workspace is a folder; name another path")
    if _format(storage) is None:
        from importlib.metadata import version

        document = {
            "format": FORMAT,
            "id": identity or secrets.token_hex(16),
            "created_by": f"modmill {version('modmill')}",
            "time": now(),
        }
        data = canonical_json(document)
        storage.put(paths.FORMAT, data)
        if storage.put(paths.FORMAT, data):
            storage.remove(paths.FORMAT)
            raise WorkspaceError(
                f"{storage.uri}: this store replaces files that stand although it is asked not to (If-None-Match), so that "
                "two writers would lose each other's work; use a store with conditional writes, or a local disk"
            )
    return workspace_id(storage)


def _format(storage: Storage) -> bytes | None:
    try:
        return storage.read(paths.FORMAT)
    except FileNotFoundError:
        return None


def workspace_id(storage: Storage) -> str:
    """Returns the workspace's id. Raises WorkspaceError if it is missing, or if its format is too new."""
    try:
        document = json.loads(storage.read(paths.FORMAT))
        found, identity = document["format"], document["id"]
    except NotADirectoryError:
        raise WorkspaceError(
            f"{storage.uri} is a file; a workspace is a folder, such as a pipeline file names by `workspace:`"
        ) from None
    except FileNotFoundError:
        raise WorkspaceError(
            f"{storage.uri} is no modmill workspace (no {paths.FORMAT}); `modmill run FILE` makes one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{storage.location(paths.FORMAT)} cannot be read ({error}); restore it from a copy"
        ) from error
    if not isinstance(found, int) or found > FORMAT:
        raise WorkspaceError(
            f"{storage.uri} has format {found}, this modmill reads up to format {FORMAT}; install a newer modmill"
        )
    return identity


def read_entry(storage: Storage, version: int) -> Entry | None:
    """Returns the entry of a version, None if the log ends before it. Raises LogError for one that cannot be read."""
    data = _read(storage, version)
    return None if data is None else _parsed(storage, version, data)


def _read(storage: Storage, version: int) -> bytes | None:
    try:
        return storage.read(paths.log_entry(version))
    except FileNotFoundError:
        return None


def _parsed(storage: Storage, version: int, data: bytes) -> Entry:
    try:
        document = json.loads(data)
        if document["format"] > FORMAT:
            raise WorkspaceError(
                f"{storage.location(paths.log_entry(version))} has format {document['format']}, this modmill reads up to "
                f"format {FORMAT}; install a newer modmill"
            )
        if document["version"] != version:
            raise ValueError(f"it says version {document['version']}")
        if not all(isinstance(action, dict) for action in document["actions"]):
            raise ValueError("its actions are no objects")
        return _entry(document, data)
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(
            f"{storage.location(paths.log_entry(version))} cannot be read ({type(error).__name__}: {error}); expected one "
            "JSON document of format 1; restore it from a copy of the workspace"
        ) from error


def _entry(document: Mapping[str, Any], data: bytes) -> Entry:
    """Returns the entry that a document of the log is; `data` are its bytes."""
    plain = {name: document[name] for name in ("version", "txn", "run", "time", "previous")}
    return Entry(**plain, actions=tuple(document["actions"]), sha256=sha256_hex(data))


def entries(storage: Storage, *, after: int = 0, previous: str | None = None) -> Iterator[Entry]:
    """Yields the entries after a version, in order, checked against the chain of hashes.

    `previous` is the sha256 of entry `after`. Raises LogError if an entry does not continue it, or is missing
    before the next.
    """
    version = after
    documents = _documents(storage, after)
    data = next(documents, None)
    while data is not None:
        version += 1
        entry = _parsed(storage, version, data)
        following = next(documents, None)
        if following is None and not _is_as_sealed(data):
            raise LogError(
                f"{storage.location(paths.log_entry(version))} is not what its seal says: it was altered; restore it from a "
                "copy"
            )
        if entry.previous != previous:
            raise LogError(
                f"{storage.location(paths.log_entry(version))} follows an entry of sha256 {str(entry.previous)[:12]}, but "
                f"entry {version - 1} has {str(previous)[:12]}: one of the two was altered; restore it from a copy"
            )
        previous = entry.sha256
        yield entry
        data = following
    # Entries are made in order: if a later one stands, the next stood before it, if not when we looked just now. Who
    # reads from the start looks at all names, since what is missed here is missed for good.
    if after:
        # Read, not asked for: of a name that is not there, an object store is asked whether it is a folder too.
        later = version + 2 if _read(storage, version + 2) is not None else 0
    else:
        later = _newest_name(storage)
    if later > version + 1:
        _check_stands(storage, version + 1, later)


def check_there(storage: Storage, version: int) -> None:
    """Raises LogError if a log that ends at `version` is empty, but the workspace is not: it was lost."""
    if not version and storage.names(paths.DATA):
        raise LogError(
            f"{storage.uri} has data, but its log is lost ({paths.LOG} holds no entry); restore that folder from a copy, or "
            f"let `{command('verify', storage.uri, '--recover')}` rebuild it from what stands beside the files"
        )


def check_dense(storage: Storage, version: int) -> None:
    """Raises LogError if an entry up to `version` is missing, which an index made before does not notice."""
    check_there(storage, version)
    there = _versions(storage)
    missing = next((number for number in range(1, version + 1) if number not in there), None)
    if missing is not None:
        _check_stands(storage, missing, version)


def _check_stands(storage: Storage, version: int, later: int) -> None:
    """Raises LogError if an entry is missing. Of a folder that is being written a listing may show less than there is."""
    if _read(storage, version) is None:
        raise LogError(
            f"{storage.location(paths.log_entry(version))} is missing, but entry {later} stands; restore it from a copy of "
            "the workspace"
        )


def _documents(storage: Storage, after: int) -> Iterator[bytes]:
    """Yields the bytes of the entries after a version, in order, until one is not there; many are read side by side."""
    version = after
    while (data := _read(storage, version + 1)) is not None:
        version += 1
        yield data
        if version - after != _FEW_ENTRIES:
            continue
        newest = _newest_name(storage)
        with ThreadPoolExecutor(_READERS) as pool:
            while version < newest:
                window = range(version + 1, min(version + _WINDOW, newest) + 1)
                for data in pool.map(lambda number: _read(storage, number), window):
                    if data is None:
                        return
                    version += 1
                    yield data


def _sealed(document: bytes) -> bytes:
    """Returns the bytes of a JSON object with the sha256 of them as its last member."""
    return document[:-1] + _SEAL + sha256_hex(document).encode() + b'"}'


def _is_as_sealed(data: bytes) -> bool:
    """Tells whether the bytes of an entry are those that were sealed, or have no seal."""
    document, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return not seal.startswith(_SEAL) or _sealed(document + b"}") == data


def _newest_name(storage: Storage) -> int:
    """Returns the newest version that a listing shows; of what is written meanwhile it may show one and not the one before."""
    return max(_versions(storage), default=0)


def _versions(storage: Storage) -> set[int]:
    return {int(name[:20]) for name in storage.names(paths.LOG) if name[:20].isdecimal()}


def append(
    storage: Storage, actions: Sequence[Mapping[str, Any]], *, run: str, after: int, previous: str | None
) -> Entry | None:
    """Commits the actions as version `after` + 1; None if another writer took that version first."""
    document = {
        "format": FORMAT,
        "version": after + 1,
        "txn": secrets.token_hex(16),
        "run": run,
        "time": now(),
        "previous": previous,
        "actions": [dict(action) for action in actions],
    }
    data = _sealed(canonical_json(document))
    if not storage.put(paths.log_entry(after + 1), data):
        # An object store says "taken" of our own entry too, if its first answer got lost and the request went again.
        standing = read_entry(storage, after + 1)
        if standing is None or standing.txn != document["txn"]:
            return None
    return _entry(document, data)
