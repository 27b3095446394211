"""Lists the snapshots of a workspace, and what one snapshot holds."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manifests.catalog.catalog import Catalog
from manifests.snapshots import snapshot as snapshots
from manifests.snapshots import with_tokens
from manifests.snapshots.snapshot import Snapshot, SnapshotShard

_COLUMNS = ("snapshot", "corpus", "rows", "held_out", "modality", "with_tokens", "recipe", "crops", "shards", "mb")

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


def contents(uri: str, made: Sequence[Snapshot]) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
    """Returns what is in snapshots of the workspace at `uri` as columns and rows: a row for each modality of each corpus."""
    with Catalog.open(uri) as catalog:
        return _COLUMNS, [row for one in made for row in _rows(one, with_tokens.counts(catalog, one))]


def _rows(snapshot: Snapshot, have: Mapping[tuple[str, str], int]) -> Iterator[tuple[Any, ...]]:
    def kind(shard: SnapshotShard) -> tuple[str, str, str]:
        return shard.corpus, shard.modality, shard.fingerprint[:12]

    for (corpus, modality, recipe), found in itertools.groupby(sorted(snapshot.shards, key=kind), kind):
        shards = list(found)
        parts = [part for part in snapshot.parts if part.corpus == corpus]
        rows = sum(int(part.selected.sum()) for part in parts)
        held_out = sum(int(part.held_out.sum()) for part in parts)
        crops = {shard.crop for shard in shards if shard.crop is not None}
        mb = round(sum(shard.size_bytes for shard in shards) / 1e6, 2)
        facts = (modality, have[corpus, modality], recipe, len(crops) or None, len(shards), mb)
        yield snapshot.name, corpus, rows, held_out, *facts
