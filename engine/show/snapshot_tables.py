"""Lists the snapshots of a workspace, and what one snapshot holds."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from engine.show import tables
from manifests.catalog.catalog import Catalog
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots.snapshot import Snapshot

_LISTED = ("snapshot", "rows", "held_out", "modalities", "where", "sha256", "made", "files", "used_by", "replaced_by")


_COLUMNS = ("snapshot", "corpus", "rows", "held_out", "modality", "recipe", "crops", "shards", "mb")


def listing(uri: str) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Returns the snapshots of the workspace at `uri`, in short, as columns and rows; the view `snapshots` has the rest."""
    with Catalog.open(uri) as catalog:
        rows = catalog.snapshots().to_pylist()
        there = set(snapshots.names(catalog.storage))
        uses = catalog.sql("SELECT snapshot, run FROM snapshot_uses ORDER BY started_at").to_pylist()
    lines = [
        {
            "snapshot": row["snapshot"],
            "rows": row["rows"],
            "held_out": row["held_out"],
            "modalities": len(row["modalities"]),
            "where": row["where"],
            "sha256": row["sha256"][:12],
            "made": f"{row['time']:%Y-%m-%d %H:%M}",
            "files": "there" if row["snapshot"] in there else "gone",
            "used_by": ", ".join(use["run"] for use in uses if use["snapshot"] == row["snapshot"]) or None,
            "replaced_by": row["replaced_by"],
        }
        for row in rows
    ]
    return _LISTED, [tuple(line.values()) for line in lines]


def contents(made: Sequence[Snapshot]) -> pa.Table:
    """Returns what is in snapshots: a row for each modality of each corpus."""
    return tables.rows_table([line for snapshot in made for line in _lines(snapshot)], _COLUMNS)


def _lines(snapshot: Snapshot) -> list[dict[str, Any]]:
    rows: Counter[str] = Counter()
    held_out: Counter[str] = Counter()
    for part in snapshot.parts:
        rows[part.corpus] += int(part.selected.sum())
        held_out[part.corpus] += int(part.held_out.sum())
    shards: Counter[tuple[str, str, str]] = Counter()
    size_bytes: Counter[tuple[str, str, str]] = Counter()
    crops: dict[tuple[str, str, str], set[int]] = {}
    for shard in snapshot.shards:
        group = (shard.corpus, shard.modality, shard.fingerprint[:12])
        shards[group] += 1
        size_bytes[group] += shard.size_bytes
        crops.setdefault(group, set()).update([] if shard.crop is None else [shard.crop])
    return [
        {
            "snapshot": snapshot.name,
            "corpus": group[0],
            "rows": rows[group[0]],
            "held_out": held_out[group[0]],
            "modality": group[1],
            "recipe": group[2],
            "crops": len(crops[group]) or None,
            "shards": shards[group],
            "mb": round(size_bytes[group] / 1e6, 2),
        }
        for group in sorted(shards)
    ]
