"""Makes successors of snapshots whose files hold rows that were forgotten since: the same selection without those rows.

Which snapshots need one is told by the log and their folders alone, so that what a crash left over is done later.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from manifests.catalog.catalog import Catalog
from manifests.errors import WorkspaceError
from manifests.formats import rewrite
from manifests.formats import snapshots as snapshot_files
from manifests.formats.snapshots import MODALITIES, PARTS, SHARDS
from manifests.queries import retention
from manifests.queries.retention import Rewritten
from manifests.recipe import sha256_hex
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store import paths
from manifests.store.storage import read_same

_MOST_TRIED = 1000
_LONGEST_NAME = 64


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """Names a snapshot, the one that replaces it, and how many of its selected rows were forgotten."""

    snapshot: str
    successor: str
    rows: int


def standing(catalog: Catalog) -> list[Snapshot]:
    """Returns the snapshots that nothing replaces, whether the log has them or not. Raises what `snapshot.read` raises."""
    replaced = {row["snapshot"] for row in catalog.snapshots().to_pylist() if row["replaced_by"]}
    return [snapshot for snapshot in every(catalog) if snapshot.name not in replaced]


def newest_name(catalog: Catalog, name: str) -> str:
    """Returns the name of the snapshot that is there in place of one: of itself, or of its last successor."""
    replaced_by = {row["snapshot"]: row["replaced_by"] for row in catalog.snapshots().to_pylist()}
    while replaced_by.get(name):
        name = replaced_by[name]
    return name


def every(catalog: Catalog) -> list[Snapshot]:
    """Returns all snapshots that stand, the replaced ones too. Raises what `snapshot.read` raises."""
    names = snapshot_files.names(catalog.storage)
    return [snapshots.read(catalog.storage, name, even_replaced=True) for name in names]


def renew(catalog: Catalog, *, run: str) -> list[Renewed]:
    """Makes the successor of every snapshot that names a file with forgotten rows; those that were made just now.

    Raises ShardError if a snapshot or a shard of one is not as it was made.
    """
    held = {path for action in retention.forgotten(catalog) for path in action.files}
    rows = retention.forgotten_rows(catalog)
    found = retention.rewritten(catalog)
    made = []
    for snapshot in standing(catalog):
        if any(shard.path in held for shard in snapshot.shards):
            made.append(_renew_one(catalog, snapshot, rows, held, found, run=run))
    _mark_replaced(catalog)
    return made


def _renew_one(
    catalog: Catalog,
    snapshot: Snapshot,
    rows: Mapping[tuple[str, int], Collection[int]],
    held: Collection[str],
    found: Mapping[str, Rewritten],
    *,
    run: str,
) -> Renewed:
    parts = [_part(part, rows.get((part.corpus, part.part), ())) for part in snapshot.parts]
    parts = [part for part in parts if part.selected.any()]
    kept = {(part.corpus, part.part) for part in parts}
    shards = [
        _shard(catalog, shard, rows, held, found) for shard in snapshot.shards if (shard.corpus, shard.part) in kept
    ]
    made = replace(snapshot, parts=tuple(parts), shards=tuple(shards))
    gone = snapshot.rows - made.rows
    document = {
        "workspace": catalog.workspace_id,
        "where": made.where,
        "hold_out": made.hold_out,
        **snapshots.chosen_by(made.complete, made.split_by),
        "replaces": snapshot.name,
        "forgotten_rows": gone,
    }
    tables = {
        "modalities": pa.Table.from_pylist([vars(modality) for modality in made.modalities], MODALITIES),
        "parts": pa.Table.from_pylist([_packed(part) for part in parts], PARTS),
        "shards": pa.Table.from_pylist([vars(shard) for shard in shards], SHARDS),
    }
    files = snapshot_files.encode(document, tables)
    # The log must know it first: the successor says whom it replaces.
    snapshots.record(catalog, snapshot.name, run=run)
    name = _written(catalog, snapshot.name, files)
    sha256 = sha256_hex(files[snapshot_files.SUMS])
    added = snapshots.record_of(replace(made, name=name, sha256=sha256), replaces=snapshot.name)
    catalog.commit([added], run=run)
    return Renewed(snapshot=snapshot.name, successor=name, rows=gone)


def _part(part: SnapshotPart, rows: Collection[int]) -> SnapshotPart:
    left = np.ones(part.rows, bool)
    left[list(rows)] = False
    return replace(part, selected=part.selected & left, held_out=part.held_out & left)


def _packed(part: SnapshotPart) -> dict[str, object]:
    bits = {name: np.packbits(getattr(part, name), bitorder="little").tobytes() for name in ("selected", "held_out")}
    return {**vars(part), **bits}


def _shard(
    catalog: Catalog,
    shard: SnapshotShard,
    rows: Mapping[tuple[str, int], Collection[int]],
    held: Collection[str],
    found: Mapping[str, Rewritten],
) -> SnapshotShard:
    """Returns the shard without what was forgotten: as it was rewritten for the log, else for this snapshot alone."""
    storage, path, new = catalog.storage, shard.path, None
    while path in held and path in found:
        new = found[path]
        path = new.path
    if path not in held:
        return shard if new is None else replace(shard, path=path, sha256=new.sha256, size_bytes=new.size_bytes)
    # It was replaced or retired before: no live shard has its rows, and the log needs no record of it.
    data = read_same(storage, shard.path, shard.sha256)
    blanked = rewrite.without_rows(data, shard.format, rows[shard.corpus, shard.part])
    path, sha256 = rewrite.put_shard(storage, shard.path, blanked)
    return replace(shard, path=path, sha256=sha256, size_bytes=len(blanked.data))


def _written(catalog: Catalog, replaced: str, files: Mapping[str, bytes]) -> str:
    """Writes the successor under the first free name; one of equal content that a crash left is taken up."""
    known = {row["snapshot"]: row for row in catalog.snapshots().to_pylist()}
    first = replaced
    while first in known and known[first]["replaces"]:
        first = known[first]["replaces"]
    storage = catalog.storage
    for number in range(2, _MOST_TRIED):
        name = f"{first[: _LONGEST_NAME - len(f'-{number}')]}-{number}"
        if name in known:
            continue
        if snapshot_files.is_whole(storage, name):
            if storage.read(f"{paths.snapshot(name)}/{snapshot_files.SUMS}") == files[snapshot_files.SUMS]:
                return name
            continue
        try:
            snapshot_files.write(storage, name, files)
        except WorkspaceError:
            continue  # Another one was begun there and not finished.
        return name
    raise WorkspaceError(f"{storage.uri}: {first}-2 to {first}-{_MOST_TRIED - 1} are all taken; rename the snapshot")


def _mark_replaced(catalog: Catalog) -> None:
    """Says in the folder of each replaced snapshot what replaces it, for readers that have no index of the log."""
    there = set(snapshot_files.names(catalog.storage))
    for row in catalog.snapshots().to_pylist():
        if {row["snapshot"], row["replaces"]} <= there:
            document = snapshot_files.read(catalog.storage, row["snapshot"]).document
            snapshot_files.mark_replaced(
                catalog.storage, row["replaces"], by=row["snapshot"], rows=document.get("forgotten_rows", 0)
            )
