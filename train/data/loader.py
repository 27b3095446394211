"""Loads batches from snapshots, in an order that is computed, not stored.

Step t has the slots [t * batch, (t + 1) * batch) of the mixture, whatever the number of threads and however far ahead they
work, so a run is resumed exactly by one number. Tokens come from the cache of `token_cache.py`.
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from manifests.errors import ConfigError, ModmillError
from train.data.batch import Batch
from train.data.gather import Reader, cut
from train.data.mixture import Mixture, MixtureEntry, RowOrder, join
from train.data.vocabulary import Vocabulary

# A block of some thousand rows visits each file once for many batches, which are cut from it.
_BLOCK_ROWS = 4096
_SELECT = "make a snapshot with another --where, or a smaller --hold-out"
_HOLD_OUT = "make a snapshot that holds some out: `modmill snapshot WORKSPACE NAME --hold-out 0.02`"


class Loader:
    """Loads batches of a mixture of snapshots: by step (`batch_at`), or one after the other from its position (iteration).

    batch     rows of a batch
    held_out  load the rows that the snapshots hold out, instead of those to train on
    workers   threads that work ahead; 0 makes batches when they are asked for
    prefetch  blocks of up to 4,096 rows that they make ahead

    Only one thread at a time may use it. It is a context manager; `close` ends its threads.
    """

    def __init__(
        self,
        entries: Sequence[MixtureEntry],
        *,
        vocabulary: Vocabulary,
        seed: int,
        batch: int,
        held_out: bool = False,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        """Raises ConfigError if a source has no such row, or other tokenizers than the vocabulary."""
        for name, value, least in (("batch", batch, 1), ("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise ConfigError(f"the loader's {name} is {value}, expected {least} or more")
        self.batch = batch
        self._entries = tuple(entries)
        self._seed = seed
        self._workers, self._prefetch = workers, prefetch
        self._slot = 0
        self._mixture = Mixture([entry.weight for entry in entries], seed=seed)
        self._orders = [RowOrder(entry, at, seed=seed, held_out=held_out) for at, entry in enumerate(entries)]
        for entry, order in zip(entries, self._orders, strict=True):
            if not order.rows:
                which, advice = ("held out", _HOLD_OUT) if held_out else ("to train on", _SELECT)
                corpora = "" if entry.corpora is None else f" in {', '.join(entry.corpora)}"
                raise ConfigError(f"{entry.snapshot.uri} has no rows {which}{corpora}; {advice}")
        self._reader = Reader([entry.snapshot for entry in entries], vocabulary)
        self._running: Generator[Batch, None, None] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        """Returns the number of rows of each source: one epoch of it."""
        return tuple(order.rows for order in self._orders)

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a step, the same at every call. Raises ShardError if one of its shards cannot be used."""
        return self._slots(step * self.batch, self.batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches without end from the loader's position. Another iteration, `load_state` and `close` end this one."""
        self.close()
        self._running = self._batches()
        return self._running

    def held_out_batches(self, rows: int) -> Iterator[Batch]:
        """Returns at most `rows` of all sources' held-out rows, each once, for validation. The last batch may be smaller.

        Order, crops (the first) and keys are the same in every run, whatever its seed; the sources are interleaved in
        proportion to their rows. A row that two entries have of one snapshot comes from the first.
        Raises ConfigError if no row is held out.
        """
        orders: list[RowOrder] = []
        taken: dict[str, set[int]] = {}
        for source, entry in enumerate(self._entries):
            places = taken.setdefault(entry.snapshot.sha256, set())
            orders.append(RowOrder(entry, source, seed="held out", held_out=True, without=places))
            places.update(orders[-1].places.tolist())
        picks = [order.first_picks(rows) for order in orders]
        shares = [
            (np.arange(len(some.rows)) + 0.5) / max(order.rows, 1) for some, order in zip(picks, orders, strict=True)
        ]
        chosen = join(picks).take(np.argsort(np.concatenate(shares), kind="stable")[:rows])
        if not any(order.rows for order in orders):
            names = ", ".join(dict.fromkeys(entry.snapshot.uri for entry in self._entries))
            raise ConfigError(f"{names}: no row is held out to validate with; {_HOLD_OUT}")
        starts = range(0, len(chosen.rows), self.batch)
        return (self._reader.read(start, chosen.take(slice(start, start + self.batch))) for start in starts)

    def state(self) -> dict[str, Any]:
        """Returns the position of the iteration as plain JSON values; `slot` is the first of the next batch."""
        return {"batch": self.batch, "slot": self._slot, **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was taken; with another batch size the same slots are grouped differently.

        Raises ConfigError if it is of other snapshots, corpora, weights or seed: the order would be a different one.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ConfigError(
                    f"the loader's state has {name} {state.get(name)!r}, this run has {own!r}: it cannot go on exactly where "
                    "that one stopped; give it the same snapshots, weights and seed, or start a new run"
                )
        slot = state.get("slot")
        if not isinstance(slot, int) or slot < 0:
            raise ConfigError(f"the loader's state has slot {slot!r}, expected a number from 0 on")
        self.close()
        self._slot = slot

    def close(self) -> None:
        """Ends the iteration and its threads; the loader stays usable."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "snapshots": [entry.snapshot.sha256 for entry in self._entries],
            "corpora": [None if entry.corpora is None else sorted(entry.corpora) for entry in self._entries],
            "weights": [float(entry.weight) for entry in self._entries],
        }

    def _batches(self) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self._workers, "modmill-loader") if self._workers else None
        try:
            for slots, block in self._made(pool):
                for slot in slots:
                    at = slot - slots.start
                    batch = self._slots(slot, self.batch) if block is None else cut(block, at, at + self.batch)
                    self._slot = slot + self.batch
                    yield batch
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _made(self, pool: ThreadPoolExecutor | None) -> Iterator[tuple[range, Batch | None]]:
        """Yields the blocks in order, made here or ahead of time."""
        if pool is None:
            yield from map(self._block, self._blocks())
            return
        ahead: deque[Future[tuple[range, Batch | None]]] = deque()
        for slots in self._blocks():
            ahead.append(pool.submit(self._block, slots))
            if len(ahead) > self._prefetch:
                yield ahead.popleft().result()

    def _blocks(self) -> Iterator[range]:
        """Yields the first slots of the batches of each block: small blocks first, for a quick start."""
        slot, steps = self._slot, 1
        while True:
            yield range(slot, slot + steps * self.batch, self.batch)
            slot += steps * self.batch
            steps = max(1, min(2 * steps, _BLOCK_ROWS // self.batch))

    def _block(self, slots: range) -> tuple[range, Batch | None]:
        """Returns a block, or None if it cannot be made: its batches are then made one by one, and the bad one raises."""
        try:
            return slots, self._slots(slots.start, len(slots) * self.batch)
        except ModmillError:
            return slots, None

    def _slots(self, slot: int, count: int) -> Batch:
        sources, draws = self._mixture.draws(np.arange(slot, slot + count, dtype=np.int64))
        picks = join([order.picks(draws[sources == source]) for source, order in enumerate(self._orders)])
        back = np.empty_like(sources)
        back[np.argsort(sources, kind="stable")] = np.arange(count)
        return self._reader.read(slot, picks.take(back))
