"""Picks the rows that a run is to label by a condition over `samples` (`modmill run --where`)."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from manifests.catalog.catalog import Catalog
from manifests.commands import command
from manifests.errors import ConfigError
from manifests.formats import shards
from manifests.log.actions import ShardAdded
from manifests.queries import retention
from manifests.store.storage import Storage


class PickedRows:
    """Holds the picked rows, by corpus and part: a bitmap (`numpy.packbits`, one bit a row), or None if all are picked.

    Parts without a picked row are not in it. Forgotten rows are never picked, and do not count.
    """

    def __init__(self, where: str, rows: Mapping[str, Mapping[int, bytes | None]], shares: Mapping[str, float]) -> None:
        self.where = where
        self._rows = rows
        self._shares = shares

    def parts(self, corpus: str) -> Collection[int]:
        """Returns the parts of a corpus that have a picked row."""
        return self._rows.get(corpus, {}).keys()

    def share(self, corpus: str) -> float:
        """Returns the share of the rows of those parts that is picked, from 0 to 1."""
        return self._shares.get(corpus, 0.0)

    def bits(self, corpus: str, part: int) -> bytes | None:
        """Returns the bitmap of a part that has a picked row."""
        return self._rows[corpus][part]


def pick(catalog: Catalog, where: str, corpora: Collection[str]) -> PickedRows:
    """Returns the rows of some corpora that a condition picks. Raises ConfigError if it picks none, or QueryError."""
    table = catalog.numbered_parts()
    firsts, counts = table["first_row"].to_numpy(), table["rows"].to_numpy()
    names, numbers = table["corpus"].to_pylist(), table["part"].to_pylist()
    total = int(counts.sum())
    chosen = np.zeros(total, bool)
    for chunk in catalog.select_rows(where).column(0).chunks:
        chosen[chunk.to_numpy()] = True
    place = {(corpus, part): index for index, (corpus, part) in enumerate(zip(names, numbers, strict=True))}
    there = np.ones(total, bool)
    for of_part, gone in retention.forgotten_rows(catalog).items():
        if of_part in place:
            there[firsts[place[of_part]] + list(gone)] = False
    chosen &= there
    rows: dict[str, dict[int, bytes | None]] = {}
    picked: Counter[str] = Counter()
    among: Counter[str] = Counter()
    for (corpus, part), index in place.items():
        span = slice(int(firsts[index]), int(firsts[index] + counts[index]))
        if corpus in corpora and chosen[span].any():
            is_all = bool((chosen[span] == there[span]).all())
            picked[corpus] += int(chosen[span].sum())
            among[corpus] += int(counts[index])
            rows.setdefault(corpus, {})[part] = None if is_all else np.packbits(chosen[span]).tobytes()
    if not rows:
        raise ConfigError(
            f"--where {where!r} picks no row of {', '.join(sorted(corpora))}; the workspace has {total:,} samples, see "
            f"`{command('sql', catalog.storage.uri, 'FROM samples')}`"
        )
    return PickedRows(where, rows, {corpus: picked[corpus] / among[corpus] for corpus in rows})


def unpacked(bits: bytes, rows: int) -> np.ndarray:
    """Returns the rows of a bitmap: bool (rows,)."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=rows).astype(bool)


def has_row(storage: Storage, shard: ShardAdded, bits: bytes, statuses: Sequence[int]) -> bool:
    """Reads a shard and tells whether a picked row has one of these statuses. Raises ShardError if it cannot be read."""
    found = shards.read_statuses(storage, shard.path, shard.format, shard.rows)
    return bool((np.isin(found, list(statuses)) & unpacked(bits, shard.rows)).any())
