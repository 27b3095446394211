"""Reads what the files of a workspace tell without its log: parts, shards and tokenizers by their sidecars, each checked.

Every reader raises ShardError if a file cannot be taken, with what is wrong first; `recover.py` beside this file makes
the log of what they find.
"""

import contextlib
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from manifests.errors import ModmillError, ShardError
from manifests.formats import sidecars
from manifests.formats import snapshots as snapshot_files
from manifests.log.actions import (
    CorpusAdded,
    Forgotten,
    PartAdded,
    SamplesDropped,
    ShardAdded,
    SnapshotAdded,
    SourcesChanged,
    TokenizerAdded,
)
from manifests.recipe import canonical_json, sha256_hex
from manifests.snapshots import snapshot
from manifests.store import parquet, paths
from manifests.store.storage import Storage, StoredFile, read_same

# The files of a folder by name, without hidden ones.
Folder = Mapping[str, StoredFile]
_AGAIN = "delete it, the next run makes it again"


@dataclass(frozen=True, kw_only=True)
class FoundPart:
    """Holds a part of a whole samples file: its record, that of its corpus, and what was forgotten of it."""

    file: StoredFile
    part: PartAdded
    corpus: CorpusAdded
    forgets: tuple[Forgotten, ...]

    @property
    def forgotten(self) -> set[int]:
        """Returns the rows that were forgotten."""
        return {row for action in self.forgets for row in action.rows}


@dataclass(frozen=True, kw_only=True)
class FoundShard:
    """Holds a shard as its sidecar tells it; its bytes are not looked at yet."""

    file: StoredFile
    shard: ShardAdded
    recipe: Mapping[str, Any]

    @property
    def place(self) -> tuple[Any, ...]:
        """Returns the shard's place: of the shards of one place one is live."""
        shard = self.shard
        return shard.part, shard.crop, shard.modality, shard.form, shard.fingerprint

    @property
    def rank(self) -> tuple[Any, ...]:
        """Returns the order in which the shards of one place are tried."""
        shard = self.shard
        return -shard.forgotten, shard.failed, shard.not_selected, -self.file.modified.timestamp(), shard.path


def list_folders(storage: Storage, path: str) -> dict[str, dict[str, StoredFile]]:
    """Returns the folders below one that hold files, by path."""
    found: dict[str, dict[str, StoredFile]] = {}
    for file in storage.walk(path):
        folder, name = posixpath.split(file.path)
        if not name.startswith("."):
            found.setdefault(folder, {})[name] = file
    return found


def named(folder: Folder, start: str, end: str) -> list[StoredFile]:
    """Returns the files whose names begin with `start` and end with `end`."""
    return [file for name, file in folder.items() if name.startswith(start) and name.endswith(end)]


def read_part(storage: Storage, corpus: str, file: StoredFile) -> FoundPart:
    """Returns a part as the sidecar of its samples file tells it."""
    found = _sidecar(storage, file.path)
    part = found.of
    if not isinstance(part, PartAdded) or found.corpus is None or (part.path, part.corpus) != (file.path, corpus):
        raise ShardError("its sidecar is of another file")
    read_same(storage, part.path, part.sha256, remedy="restore it from a copy")
    return FoundPart(file=file, part=part, corpus=found.corpus, forgets=found.forgotten)


def read_changes(storage: Storage, corpus: str, folder: Folder) -> list[SourcesChanged]:
    """Returns the newest list of sources that an ingest found gone or altered, if there is one."""
    files = sorted(named(folder, "changes-", ".parquet"), key=lambda file: (file.modified, file.path))
    if not files:
        return []
    with storage.open(files[-1].path) as stream:
        changes = parquet.read(stream, ["change"])["change"].to_pylist()
    vanished, changed = changes.count("vanished"), changes.count("changed")
    return [SourcesChanged(corpus=corpus, path=files[-1].path, vanished=vanished, changed=changed)]


def read_dropped(storage: Storage, corpus: str, folder: Folder) -> list[SamplesDropped]:
    """Returns all lists of samples that ingests left out."""
    found = []
    for file in named(folder, "dropped-", ".parquet"):
        with storage.open(file.path) as stream:
            reasons = parquet.read(stream, ["reason"])["reason"].to_pylist()
        counts = dict(sorted(Counter(reasons).items()))
        found.append(SamplesDropped(corpus=corpus, path=file.path, rows=len(reasons), counts=counts))
    return found


def read_shard(storage: Storage, folder: Folder, file: StoredFile, parts: Mapping[int, FoundPart]) -> FoundShard:
    """Returns a shard as the sidecar `file` tells it, of one of these parts."""
    found = sidecars.read(storage, file.path)
    shard, recipe = found.of, found.recipe
    if not isinstance(shard, ShardAdded) or recipe is None or sidecars.path_of(shard) != file.path:
        raise ShardError("the sidecar is of another file, or without a recipe")
    if sha256_hex(canonical_json(dict(recipe))) != shard.fingerprint:
        raise ShardError("the recipe in its sidecar does not have its fingerprint")
    standing = folder.get(posixpath.basename(shard.path))
    if standing is None:
        raise ShardError("its sidecar stands, the file is gone")
    if standing.size_bytes != shard.size_bytes:
        raise ShardError(f"it has {standing.size_bytes} bytes, its sidecar says {shard.size_bytes}; {_AGAIN}")
    part = parts.get(shard.part)
    if part is None or (part.part.keys_sha256, part.part.rows) != (shard.keys_sha256, shard.rows):
        raise ShardError("its part was not found, or has other rows")
    if shard.forgotten < len(part.forgotten):
        raise ShardError("it holds rows that were forgotten since")
    return FoundShard(file=standing, shard=shard, recipe=recipe)


def checked_shard(storage: Storage, found: FoundShard) -> FoundShard:
    """Returns the shard after reading it and its failed file whole."""
    shard = found.shard
    read_same(storage, shard.path, shard.sha256, remedy=_AGAIN)
    if shard.failed_path is not None and shard.failed_sha256 is not None:
        read_same(storage, shard.failed_path, shard.failed_sha256, remedy=_AGAIN)
    return found


def read_tokenizer(storage: Storage, path: str, files: Iterable[str]) -> TokenizerAdded:
    """Returns the tokenizer in the folder `path` as its sidecar tells it."""
    known = _sidecar(storage, path).of
    if not isinstance(known, TokenizerAdded) or known.path != path:
        raise ShardError("its sidecar is of another file")
    sums = {name: sha256_hex(storage.read(f"{path}/{name}")) for name in files}
    if sha256_hex(canonical_json(sums)) != known.digest:
        raise ShardError("its files are not those that its name says: altered, or some are gone")
    return known


def read_snapshot(storage: Storage, name: str) -> SnapshotAdded:
    """Returns a snapshot as its folder tells it."""
    replaces = snapshot_files.read(storage, name).document.get("replaces")
    return snapshot.record_of(snapshot.read(storage, name, even_replaced=True), replaces=replaces)


def workspace_id(storage: Storage) -> str | None:
    """Returns the id that the workspace had, if its snapshots agree on it."""
    found = set()
    for name in snapshot_files.names(storage):
        with contextlib.suppress(ModmillError):
            found.add(snapshot_files.read(storage, name).document["workspace"])
    return found.pop() if len(found) == 1 else None


def _sidecar(storage: Storage, path: str) -> sidecars.Sidecar:
    try:
        return sidecars.read(storage, paths.sidecar(path))
    except FileNotFoundError:
        raise ShardError("it has no sidecar") from None
