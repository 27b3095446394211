"""Tells which rows have tokens: of any modality, of every one, and how many rows have each.

The counts of a shard's record are enough for most shards. Statuses are read only if a shard is ok in some rows and not in
all, and if that decides.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from manifests.formats.shards import Status, read_statuses
from manifests.store.storage import Storage

if TYPE_CHECKING:
    from manifests.catalog.catalog import Catalog
    from manifests.snapshots.snapshot import Snapshot

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class NumberedRows:
    """Counts the rows of a workspace: P parts, their first rows and numbers of rows (both int64 (P,), rows over 0)."""

    firsts: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def of(self, part_number: int) -> slice:
        """Returns the place of a part's rows."""
        first = int(self.firsts[part_number])
        return slice(first, first + int(self.counts[part_number]))

    def numbered(self, numbers: pa.Table) -> np.ndarray:
        """Returns bool (total,): True at the numbers of a table's one column."""
        chosen = np.zeros(self.total, bool)
        for chunk in numbers.column(0).chunks:
            chosen[chunk.to_numpy()] = True
        return chosen

    def parts_with(self, chosen: np.ndarray) -> np.ndarray:
        """Returns bool (P,): whether any row of the part is chosen."""
        return np.logical_or.reduceat(chosen, self.firsts)


def in_any(storage: Storage, rows: NumberedRows, picked: np.ndarray, shards: pa.Table) -> np.ndarray:
    """Returns bool (total,): whether a picked row has an ok token in any of the shards.

    Only parts without a shard that is ok in every row are looked into.
    """
    part_numbers, ok = shards["part_number"].to_numpy(), shards["ok"].to_numpy()
    is_doubtful = rows.parts_with(picked)
    is_doubtful[part_numbers[ok == shards["rows"].to_numpy()]] = False
    found = np.repeat(~is_doubtful, rows.counts)
    for shard, is_ok in _read(storage, shards.filter(pa.array(is_doubtful[part_numbers] & (ok > 0))).to_pylist()):
        found[rows.of(shard["part_number"])] |= is_ok
    return found


def in_every(
    storage: Storage, rows: NumberedRows, picked: np.ndarray, shards: pa.Table, modalities: Collection[str]
) -> np.ndarray:
    """Returns bool (total,): whether a picked row has ok tokens of every modality, in each of its crops."""
    left = picked.copy()
    for modality in modalities:
        of_modality = shards.filter(pc.field("modality") == modality)
        part_numbers, ok = of_modality["part_number"].to_numpy(), of_modality["ok"].to_numpy()
        has_it = np.zeros(len(rows.counts), bool)
        has_it[part_numbers] = True
        has_it[part_numbers[ok == 0]] = False
        left &= np.repeat(has_it, rows.counts)
        is_doubtful = rows.parts_with(left)[part_numbers] & (ok < of_modality["rows"].to_numpy())
        for shard, is_ok in _read(storage, of_modality.filter(pa.array(is_doubtful)).to_pylist()):
            left[rows.of(shard["part_number"])] &= is_ok
    return left


def counts(catalog: "Catalog", snapshot: "Snapshot") -> dict[tuple[str, str], int]:
    """Returns how many rows of a snapshot have ok tokens of each corpus and modality, in each of its crops."""
    query = "SELECT path, ok, rows FROM log.shard WHERE path IN (SELECT unnest(?::VARCHAR[]))"
    known = catalog.sql(query, [[shard.path for shard in snapshot.shards]]).to_pylist()
    whole = {row["path"] for row in known if row["ok"] == row["rows"]}
    selected = {(part.corpus, part.part): part.selected for part in snapshot.parts}
    left: dict[tuple[str, int, str], np.ndarray] = {}
    to_read = []
    for shard in snapshot.shards:
        place = (shard.corpus, shard.part, shard.modality)
        left.setdefault(place, selected[shard.corpus, shard.part].copy())
        if shard.path not in whole:
            to_read.append({**vars(shard), "place": place, "rows": len(left[place])})
    for shard, is_ok in _read(snapshot.storage, to_read):
        left[shard["place"]] &= is_ok
    found: dict[tuple[str, str], int] = {}
    for (corpus, _, modality), rows in left.items():
        found[corpus, modality] = found.get((corpus, modality), 0) + int(np.count_nonzero(rows))
    return found


def _read(storage: Storage, shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], np.ndarray]]:
    """Yields each shard with bool (rows,): whether its row is ok."""
    with ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda shard: read_statuses(storage, shard["path"], shard["format"], shard["rows"]), shards)
        for shard, statuses in zip(shards, read, strict=True):
            yield shard, statuses == Status.OK
