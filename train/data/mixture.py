"""Decides which row comes when, by arithmetic on (seed, slot) and without a state.

A run fills slots 0, 1, 2, ... `Mixture` says which source fills a slot and which draw of that source it is; `RowOrder`
says which row a draw is. Nothing depends on batches, workers or ranks, so another grouping of the slots sees the same rows.

In every epoch the parts of a source are sorted by a hash of (seed, epoch, corpus, part), and the rows of each 64 parts in
that order by a hash of (seed, epoch, corpus, part, row): the rows at hand come from few files, and snapshots that hold
the same rows have them in the same order, whatever their modalities.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int64

from manifests.errors import ConfigError, nearest
from manifests.snapshots.snapshot import Snapshot, SnapshotPart
from train.data import hashing

WINDOW_SLOTS = 4096
WINDOW_PARTS = 64
_SHUFFLE = hashing.name_hash("order of rows")
_CROP = hashing.name_hash("first crop")


@dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """Holds a source of a mixture: the rows of a snapshot, of some of its corpora or of all (None), and its weight."""

    snapshot: Snapshot
    corpora: tuple[str, ...] | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Identifies B rows: their source, the place of their part in the source's `snapshot.parts`, and the rest as in `Batch`."""

    sources: Int64[np.ndarray, "B"]
    places: Int64[np.ndarray, "B"]
    rows: Int64[np.ndarray, "B"]
    crops: Int64[np.ndarray, "B"]
    epochs: Int64[np.ndarray, "B"]
    keys: Int64[np.ndarray, "B"]

    def take(self, index: Int64[np.ndarray, "C"] | slice) -> "Picks":
        """Returns some of the rows."""
        return Picks(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def join(picks: Sequence[Picks]) -> Picks:
    """Concatenates picks."""
    return Picks(
        **{field.name: np.concatenate([getattr(some, field.name) for some in picks]) for field in fields(Picks)}
    )


class Mixture:
    """Assigns slots to sources: every window of 4,096 slots has the same number of each source, in an order of its own.

    counts  slots of each source in a window: its share by largest remainder, at least one
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self.counts = _shares(weights)
        self._seed = hashing.name_hash("mixture", seed)
        self._sources = np.repeat(np.arange(len(weights)), self.counts)
        self._nths = np.concatenate([np.arange(count) for count in self.counts])
        self._window = lru_cache(maxsize=4)(self._shuffled)

    def draws(self, slots: Int64[np.ndarray, "B"]) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """Returns the source that fills each slot, and how many slots that source filled before."""
        windows, within = np.divmod(slots, WINDOW_SLOTS)
        sources, draws = np.empty_like(slots), np.empty_like(slots)
        for window in np.unique(windows).tolist():
            here = windows == window
            window_sources, nths = self._window(window)
            sources[here] = window_sources[within[here]]
            draws[here] = nths[within[here]] + window * self.counts[sources[here]]
        return sources, draws

    def _shuffled(self, window: int) -> tuple[Int64[np.ndarray, "4096"], Int64[np.ndarray, "4096"]]:
        keys = hashing.combine(hashing.combine(self._seed, window), np.arange(WINDOW_SLOTS))
        sources = self._sources[np.argsort(keys, kind="stable")]
        nths = np.empty_like(sources)
        nths[np.argsort(sources, kind="stable")] = self._nths
        return sources, nths


class RowOrder:
    """Orders one source's rows, epoch after epoch: those to train on, or those held out.

    rows    the number of these rows
    places  the places of their parts in `snapshot.parts`
    """

    def __init__(
        self, entry: MixtureEntry, source: int, *, seed: int | str, held_out: bool, without: Collection[int] = ()
    ) -> None:
        """Takes the place of the entry in its mixture, `source`, and leaves out the parts at the places `without`."""
        self._source, self._held_out = source, held_out
        self._parts = entry.snapshot.parts
        self._seed = hashing.name_hash("rows", seed)
        corpora = _corpora(entry)
        self._counts = np.array([np.count_nonzero(self._chosen(part)) for part in self._parts], dtype=np.int64)
        self._counts[[part.corpus not in corpora for part in self._parts]] = 0
        self._counts[list(without)] = 0
        self.places = np.flatnonzero(self._counts)
        self.rows = int(self._counts.sum())
        hashes = {corpus: hashing.name_hash("corpus", corpus) for corpus in {part.corpus for part in self._parts}}
        self._corpus = np.array([hashes[part.corpus] for part in self._parts], dtype=np.int64)
        self._part = np.array([part.part for part in self._parts], dtype=np.int64)
        self._crops, self._crop_counts = _crop_numbers(entry.snapshot)
        self._epoch = lru_cache(maxsize=4)(self._part_order)
        self._window = lru_cache(maxsize=4)(self._row_order)

    def picks(self, draws: Int64[np.ndarray, "B"]) -> Picks:
        """Returns the rows that are these draws of the source; its first draw is 0."""
        epochs, positions = np.divmod(draws, max(self.rows, 1))
        places, rows, keys = np.empty_like(draws), np.empty_like(draws), np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            _, starts = self._epoch(epoch)
            windows = np.searchsorted(starts, positions, side="right") - 1
            windows[epochs != epoch] = -1
            for window in np.unique(windows[windows >= 0]).tolist():
                here = windows == window
                within = positions[here] - starts[window]
                for filled, values in zip((places, rows, keys), self._window(epoch, window), strict=True):
                    filled[here] = values[within]
        first = hashing.below(self._row_keys(_CROP, places, rows), self._crop_counts[places])
        crops = self._crops[places, (first + epochs) % self._crop_counts[places]]
        return Picks(
            sources=np.full_like(draws, self._source), places=places, rows=rows, crops=crops, epochs=epochs, keys=keys
        )

    def first_picks(self, most: int) -> Picks:
        """Returns the first rows of epoch 0, at most `most`, each with its part's first crop."""
        picks = self.picks(np.arange(min(most, self.rows)))
        return replace(picks, crops=self._crops[picks.places, 0])

    def _chosen(self, part: SnapshotPart) -> Bool[np.ndarray, "R"]:
        return part.selected & (part.held_out == self._held_out)

    def _part_order(self, epoch: int) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "W"]]:
        """Returns the places of the parts in the epoch's order, and the position at which each window of parts begins."""
        order = self.places[np.argsort(self._part_keys(epoch, self.places), kind="stable")]
        ends = np.cumsum(self._counts[order])
        return order, np.concatenate([[0], ends[WINDOW_PARTS - 1 : -1 : WINDOW_PARTS]])

    def _row_order(self, epoch: int, window: int) -> tuple[Int64[np.ndarray, "R"], ...]:
        """Returns places, rows and keys of a window of parts, in the epoch's order."""
        order, _ = self._epoch(epoch)
        held = order[window * WINDOW_PARTS : (window + 1) * WINDOW_PARTS]
        places = np.repeat(held, self._counts[held])
        rows = np.concatenate([np.flatnonzero(self._chosen(self._parts[place])) for place in held])
        keys = self._row_keys(epoch, places, rows)
        # Sorted by a hash of the keys, not by the keys: masks are drawn with those, and must not correlate with the order.
        shuffled = np.argsort(hashing.combine(keys, _SHUFFLE), kind="stable")
        return places[shuffled], rows[shuffled], keys[shuffled]

    def _row_keys(
        self, epoch: int, places: Int64[np.ndarray, "B"], rows: Int64[np.ndarray, "B"]
    ) -> Int64[np.ndarray, "B"]:
        return hashing.combine(self._part_keys(epoch, places), rows)

    def _part_keys(self, epoch: int, places: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        keys = hashing.combine(hashing.combine(self._seed, epoch), self._corpus[places])
        return hashing.combine(keys, self._part[places])


def _shares(weights: Sequence[float]) -> Int64[np.ndarray, "S"]:
    """Returns the slots of each source in a window. Raises ConfigError for a weight that is not positive and finite."""
    for weight in weights:
        if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"the weight of a source is {weight!r}, expected a number over 0; drop what has no weight"
            )
    if not 0 < len(weights) <= WINDOW_SLOTS:
        raise ConfigError(f"a mixture of {len(weights)} sources, expected 1 to {WINDOW_SLOTS}")
    total = math.fsum(weights)
    exact = np.array([weight / total * WINDOW_SLOTS for weight in weights])
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    # Sources so small that they got more than their share take the difference from the largest.
    while shares.sum() > WINDOW_SLOTS:
        shares[np.argmax(shares)] -= 1
    remainders = np.argsort(-(exact - shares), kind="stable")
    shares[remainders[: WINDOW_SLOTS - int(shares.sum())]] += 1
    return shares


def _corpora(entry: MixtureEntry) -> set[str]:
    known = {part.corpus for part in entry.snapshot.parts}
    for corpus in entry.corpora or ():
        if corpus not in known:
            raise ConfigError(f"{entry.snapshot.uri} has no corpus {corpus!r}; {nearest(corpus, known)}")
    return known if entry.corpora is None else set(entry.corpora)


def _crop_numbers(snapshot: Snapshot) -> tuple[Int64[np.ndarray, "P C"], Int64[np.ndarray, "P"]]:
    """Returns the crop numbers that each part has in any modality, and how many; crop 0 if it has no crops."""
    numbers: dict[tuple[str, int], set[int]] = {(part.corpus, part.part): set() for part in snapshot.parts}
    for shard in snapshot.shards:
        if shard.crop is not None:
            numbers[shard.corpus, shard.part].add(shard.crop)
    found = [sorted(crops) or [0] for crops in numbers.values()]
    counts = np.array([len(crops) for crops in found], dtype=np.int64)
    table = np.zeros((len(found), max(counts, default=1)), dtype=np.int64)
    for place, crops in enumerate(found):
        table[place, : len(crops)] = crops
    return table, counts
