"""Lists the snapshots of a workspace, and what one snapshot holds."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from engine.show import tables
from manifests.catalog.catalog import Catalog
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots.snapshot import Snapshot

_COLUMNS = ("snapshot", "corpus", "rows", "held_out", "modality", "recipe", "crops", "shards", "mb")

_LISTING = """
SELECT s.snapshot, s.rows, s.held_out, len(s.modalities) AS modalities, s."where", left(s.sha256, 12) AS sha256,
  strftime(s.time, '%Y-%m-%d %H:%M') AS made, if(list_contains(?, s.snapshot), 'there', 'gone') AS files,
  (SELECT string_agg(u.run, ', ' ORDER BY u.started_at) FROM snapshot_uses u WHERE u.snapshot = s.snapshot) AS used_by,
  s.replaced_by
FROM snapshots s ORDER BY s.version
"""


def listing(uri: str) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Returns the snapshots of the workspace at `uri`, in short, as columns and rows; the view `snapshots` has the rest."""
    with Catalog.open(uri) as catalog:
        return catalog.fetch(_LISTING, [snapshots.names(catalog.storage)])


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
