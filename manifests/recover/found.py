"""Reads what the files of a workspace tell without its log: parts, shards and tokenizers by their sidecars, each checked.

Every reader raises ShardError if a file cannot be taken, with what is wrong first; `recover.py` beside this file makes
the log of what they find.
"""

import contextlib
import json
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from manifests.errors import ModmillError, ShardError
from manifests.formats import dropped_lists, sidecars
from manifests.formats import snapshots as snapshot_files
from manifests.formats.shards import keys_digest, read_samples
from manifests.log.actions import (
    Forgotten,
    PartAdded,
    SamplesDropped,
    ShardAdded,
    SnapshotAdded,
    SourcesChanged,
    TokenizerAdded,
)
from manifests.queries.retention import NO_BYTES
from manifests.recipe import canonical_json, sha256_hex
from manifests.snapshots import snapshot
from manifests.store import parquet, paths
from manifests.store.storage import Storage, StoredFile

# The files of a folder by name, without hidden ones.
Folder = Mapping[str, StoredFile]
_AGAIN = "delete it, the next run makes it again"


@dataclass(frozen=True, kw_only=True)
class FoundPart:
    """Holds a part of a whole samples file: its record, what was forgotten of it, and its corpus if a sidecar tells it."""

    file: StoredFile
    part: PartAdded
    sidecar: sidecars.Sidecar

    @property
    def forgotten(self) -> set[int]:
        """Returns the rows that were forgotten."""
        return {row for action in self.sidecar.forgotten for row in action.rows}


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


def read_part(storage: Storage, corpus: str, folder: Folder, file: StoredFile) -> FoundPart:
    """Returns a part as the sidecar of its samples file, or else the file itself, tells it."""
    data = storage.read(file.path)
    sidecar = paths.sidecar(file.path)
    if posixpath.basename(sidecar) in folder:
        found = sidecars.read(storage, sidecar)
    else:
        found = _part_alone(corpus, file.path, data)
    part = found.of
    if not isinstance(part, PartAdded) or (part.path, part.corpus) != (file.path, corpus):
        raise ShardError("its sidecar is of another file")
    _check(data, part.sha256, part.size_bytes)
    return FoundPart(file=file, part=part, sidecar=found)


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
    """Returns all lists of samples that ingests left out, each after the one that it replaces."""
    found: dict[str, SamplesDropped] = {}
    for file in named(folder, "dropped-", ".parquet"):
        with storage.open(file.path) as stream:
            found[file.path] = dropped_lists.record(corpus, file.path, parquet.read(stream))

    def replaced_before(path: str | None) -> int:
        return 1 + replaced_before(found[path].replaces) if path in found else 0

    return sorted(found.values(), key=lambda record: replaced_before(record.path))


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
    for path, sha256, size_bytes in (
        (shard.path, shard.sha256, shard.size_bytes),
        (shard.failed_path, shard.failed_sha256, None),
    ):
        if path is not None and sha256 is not None:
            try:
                _check(storage.read(path), sha256, size_bytes)
            except FileNotFoundError:
                raise ShardError(f"{posixpath.basename(path)} is gone") from None
    return found


def read_tokenizer(
    storage: Storage, path: str, files: Iterable[str], vocabularies: Mapping[str, int]
) -> TokenizerAdded:
    """Returns the tokenizer in the folder `path` as its sidecar tells it, or else its config.json.

    `vocabularies` are those of tokens that were found, by the digest of their tokenizer.
    """
    sums = {name: sha256_hex(storage.read(f"{path}/{name}")) for name in files}
    digest = sha256_hex(canonical_json(sums))
    fields = paths.TOKENIZER.parse(path)
    if fields is None or not digest.startswith(fields["digest12"]):
        raise ShardError("its files are not those that its name says: altered, or some are gone")
    try:
        known = sidecars.read(storage, paths.sidecar(path)).of
        if isinstance(known, TokenizerAdded) and (known.path, known.digest) == (path, digest):
            return known
    except FileNotFoundError:
        pass
    if digest not in vocabularies:
        raise ShardError("it has no sidecar and made no tokens that are here: nothing tells its vocabulary")
    try:
        config = json.loads(storage.read(f"{path}/config.json"))
        family, version, rows = config["family"], config["version"], config.get("fit", {}).get("rows", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"its config.json cannot be read ({type(error).__name__}: {error})") from error
    return TokenizerAdded(
        name=fields["tokenizer"],
        digest=digest,
        path=path,
        family=family,
        family_version=version,
        vocabulary=vocabularies[digest],
        options={},
        rows=rows,
        metrics={},
    )


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


def _part_alone(corpus: str, path: str, data: bytes) -> sidecars.Sidecar:
    """Returns what a samples file tells of its part without a sidecar; its name holds the start of its sha256."""
    sha256 = sha256_hex(data)
    fields = paths.SAMPLES.parse(path)
    if fields is None or fields["sha8"] != sha256[:8]:
        raise ShardError(f"its sha256 is {sha256[:12]}, which is not in its name: altered or truncated")
    rows = read_samples(data)
    keys = [row.key for row in rows]
    part = PartAdded(
        corpus=corpus,
        part=rows[0].part,
        rows=len(rows),
        path=path,
        sha256=sha256,
        size_bytes=len(data),
        keys_sha256=keys_digest(keys),
        source_bytes=sum(row.size_bytes or 0 for row in rows),
        key_min=min(keys),
        key_max=max(keys),
        pack_path=next((row.source_pack for row in rows if row.source_pack), None),
    )
    # Whose source is null was forgotten; the hashes of the sources, which bar them from coming back, stood in the log.
    gone = [row for row in rows if row.sha256 is None]
    if not gone:
        return sidecars.Sidecar(of=part)
    forgotten = Forgotten(
        corpus=corpus,
        part=part.part,
        rows=[row.row for row in gone],
        keys=[row.key for row in gone],
        sources_sha256=[NO_BYTES] * len(gone),
        files=[],
    )
    return sidecars.Sidecar(of=part, forgotten=(forgotten,))


def _check(data: bytes, sha256: str, size_bytes: int | None) -> None:
    if size_bytes not in (None, len(data)) or sha256_hex(data) != sha256:
        raise ShardError(f"its sha256 is {sha256_hex(data)[:12]}, its sidecar says {sha256[:12]}: altered or truncated")
