"""A work item on its way through a worker: rows are loaded and labeled batch by batch, and written beside that.

Three things go on at once: threads decode the rows ahead, this thread labels and tokenizes, and others encode and
write what came of the batches before.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.plan.items import Failure, Target, WorkItem
from engine.sources.read import SourceReader
from engine.work import spill
from engine.work.decode import ByteBudget, is_forgotten, load_chunks
from engine.work.label import Labeling
from engine.work.marks import AtHand
from engine.work.quality.measure import CrossModal
from engine.work.rows import NOT_SELECTED, Labels, LoadedRow, Outcome, ShardRow
from engine.work.shard import ShardOutput
from manifests.formats.shards import Status
from manifests.log.actions import ShardAdded
from manifests.store.storage import Storage

# Batches that wait to be encoded and written, so that labels never pile up.
_BATCHES_BEHIND = 2
_ROWS_AN_ENCODER = 8


class Stopwatch:
    """How long each stage took, and each labeler; which one is on, and since when."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = dict.fromkeys(("wait", "label", "tokenize", "write"), 0.0)
        self.by_labeler: dict[str, float] = {}
        self.stage = "start"
        self.since = self.began

    @contextmanager
    def on(self, stage: str, labeler: str | None = None) -> Iterator[None]:
        """Time within goes to this stage."""
        before = self.stage
        began = time.monotonic()
        self.stage, self.since = stage, began
        try:
            yield
        finally:
            now = time.monotonic()
            self.seconds[stage] += now - began
            if labeler is not None:
                self.by_labeler[labeler] = self.by_labeler.get(labeler, 0.0) + now - began
            self.stage, self.since = before, now

    @property
    def busy_s(self) -> float:
        """Seconds of labelers and tokenizers, with the call that is on."""
        stage, since = self.stage, self.since
        now_on = time.monotonic() - since if stage in ("label", "tokenize") else 0.0
        return self.seconds["label"] + self.seconds["tokenize"] + now_on


@dataclass(frozen=True)
class ItemBatch:
    """Rows that stand together in one batch, at their places; `units` are those that go through at once."""

    units: list[list[tuple[int, int]]]

    @property
    def rows(self) -> list[int]:
        """The rows, in order."""
        return sorted(row for unit in self.units for row, _ in unit)


def known_rows(
    item: WorkItem, target: Target, samples: Sequence[Mapping[str, Any]], storage: Storage
) -> tuple[dict[int, ShardRow], dict[int, ShardRow]]:
    """The rows of a target that are not made: by the item itself, and by what earlier attempts at it left or learned.

    Only the first decide which rows share a batch, so that another attempt finds each row in its old place.
    """
    keys = [sample["key"] for sample in samples]
    selected = None if item.selected is None else np.unpackbits(np.frombuffer(item.selected, np.uint8))
    fixed: dict[int, ShardRow] = {}
    base = item.base.get(target)
    before = [None] * len(samples) if base is None else spill.rows_of(storage, base, keys)
    for number, (sample, row) in enumerate(zip(samples, before, strict=True)):
        is_selected = selected is None or bool(selected[number])
        if is_forgotten(sample):
            fixed[number] = ShardRow(Status.FORGOTTEN)
        elif row is None or row.status is Status.NOT_SELECTED:
            if not is_selected:
                fixed[number] = NOT_SELECTED
        elif row.status is not Status.FAILED or not is_selected or not _is_retried(item, row.failure):
            fixed[number] = row
    given = {
        number: ShardRow(Status.FAILED, None, failure)
        for number, failure in item.attempt.killers.items()
        if number not in fixed
    }
    for number, row in enumerate(spill.read(storage, spill.path_of(item, target), keys)):
        if number not in fixed:
            given[number] = row
    return fixed, given


def _is_retried(item: WorkItem, failure: Failure | None) -> bool:
    return not item.retry or failure is None or failure.class_name in item.retry


def batches_of(wanted: Sequence[int], done: set[int], suspects: set[int], size: int) -> list[ItemBatch]:
    """Batches of the wanted rows: each has its place by its rank among them, whatever is done already.

    Suspects go through alone, before the others of their batch.
    """
    batches = []
    for first in range(0, len(wanted), size):
        placed = [(row, place) for place, row in enumerate(wanted[first : first + size]) if row not in done]
        alone = [[pair] for pair in placed if pair[0] in suspects]
        others = [pair for pair in placed if pair[0] not in suspects]
        units = [*alone, *([others] if others else [])]
        if units:
            batches.append(ItemBatch(units))
    return batches


class ItemWork:
    """The work on one item. `do` does it; the other members may be read from another thread meanwhile."""

    def __init__(
        self,
        item: WorkItem,
        samples: Sequence[Mapping[str, Any]],
        source: SourceReader,
        storage: Storage,
        at_hand: AtHand,
        *,
        spill_after_s: float,
        decode_threads: int,
        queue_bytes: int,
    ) -> None:
        self.item = item
        self.samples = samples
        self.at_hand = at_hand
        self.clock = Stopwatch()
        self.rows_done = 0
        self.stopped = False
        # The most memory that was seen in use, and when another item was begun in the worker, while this one was written.
        self.rss_bytes = 0
        self.followed_at: float | None = None
        self._source = source
        self._storage = storage
        self._spill_after_s = spill_after_s
        self._decode_threads = decode_threads
        self._queue_bytes = queue_bytes
        self._budget = ByteBudget(queue_bytes)
        self._behind: deque[Future[None]] = deque()
        self._agreement = CrossModal()

    def stop(self) -> None:
        """Lets no further batch begin, and no thread wait for room: whoever waited for the item has gone."""
        self.stopped = True
        self._budget.close()

    @property
    def queue_fill(self) -> float:
        """The share of the queue's bytes that is in use."""
        return self._budget.fill

    def do(
        self,
        labeling: Labeling,
        outputs: Sequence[ShardOutput],
        batches: Sequence[ItemBatch],
        facts: Callable[[], Mapping[str, Any]],
        labeled: threading.Event,
    ) -> tuple[ShardAdded, ...]:
        """The records of the item's shards. `labeled` is set when all that is left is to encode and write them.

        `facts` tells then how they were made.
        """
        with ExitStack() as stack:
            encoders = stack.enter_context(ThreadPoolExecutor(max(1, self._decode_threads // 2), "encode"))
            writer = stack.enter_context(ThreadPoolExecutor(1, "write"))
            chunks = None if self.item.attempt.marks else self._chunks(labeling, batches)
            if chunks is not None:
                stack.callback(chunks.close)
            spilled = time.monotonic()
            for number, batch in enumerate(batches):
                outcomes: list[dict[int, Outcome]] = [{} for _ in outputs]
                for unit in batch.units:
                    if self.stopped:
                        raise InterruptedError(f"{self.item.name}: stopped")
                    labels = self._unit(labeling, batch, unit, chunks)
                    self._agreement.add(labels)
                    for output, found in zip(outputs, outcomes, strict=True):
                        found |= self._outcomes(output, labels)
                self.at_hand.end()
                is_last = number == len(batches) - 1
                until = len(self.samples) if is_last else batch.rows[-1] + 1
                self._wait(_BATCHES_BEHIND - 1)
                self._behind.append(writer.submit(self._write, encoders, outputs, outcomes, until))
                self.rows_done = until
                if not is_last and time.monotonic() - spilled > self._spill_after_s:
                    self._wait(0)
                    with self.clock.on("write"):
                        list(encoders.map(ShardOutput.spill, outputs))
                    spilled = time.monotonic()
            made = facts()
            labeled.set()
            if not batches:
                self._write(encoders, outputs, [{} for _ in outputs], len(self.samples))
            self._wait(0)
            agreement = self._agreement.finish()
            with self.clock.on("write"):
                records = encoders.map(
                    lambda output: output.write(metrics=agreement.get(output.target.modality, {}), **made), outputs
                )
                return tuple(records)

    def _chunks(self, labeling: Labeling, batches: Sequence[ItemBatch]) -> Generator[list[LoadedRow], None, None]:
        return load_chunks(
            self.item.plan,
            self.samples,
            [[row for row, _ in unit] for batch in batches for unit in batch.units],
            self._source,
            needs=labeling.needs,
            threads=self._decode_threads,
            queue_bytes=self._queue_bytes,
            most=labeling.chunk,
            budget=self._budget,
        )

    def _unit(
        self,
        labeling: Labeling,
        batch: ItemBatch,
        unit: list[tuple[int, int]],
        chunks: Generator[list[LoadedRow], None, None] | None,
    ) -> list[Labels]:
        """The labels of one unit."""
        self.at_hand.begin([row for row, _ in unit])
        with ExitStack() as stack:
            if chunks is None:
                # Nothing is decoded ahead, so that the mark is true while rows are decoded.
                self._budget = ByteBudget(self._queue_bytes)
                chunks = self._chunks(labeling, [ItemBatch([unit])])
                stack.callback(chunks.close)
            return labeling.unit([place for _, place in unit], self._timed(chunks))

    def _timed(self, chunks: Iterator[list[LoadedRow]]) -> Iterator[list[LoadedRow]]:
        while True:
            with self.clock.on("wait"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk
            # What was labeled makes room for what is decoded next.
            del chunk

    def _outcomes(self, output: ShardOutput, labels: Sequence[Labels]) -> dict[int, Outcome]:
        if not output.has_tokenizer:
            return output.outcomes(labels)
        self.at_hand.doing("tokenize", [made.row for made in labels])
        with self.clock.on("tokenize"):
            return output.outcomes(labels)

    def _wait(self, most: int) -> None:
        """Waits until at most so many batches are left to be written. Raises what writing raised."""
        with self.clock.on("write"):
            while len(self._behind) > most:
                self._behind.popleft().result()

    def _write(
        self,
        encoders: ThreadPoolExecutor,
        outputs: Sequence[ShardOutput],
        outcomes: Sequence[Mapping[int, Outcome]],
        until: int,
    ) -> None:
        """Encodes a batch by several threads, then gives each shard its rows in order."""
        pieces = []
        for output, found in zip(outputs, outcomes, strict=True):
            numbers = list(found)
            for first in range(0, len(numbers), _ROWS_AN_ENCODER):
                some = {row: found[row] for row in numbers[first : first + _ROWS_AN_ENCODER]}
                pieces.append((output, encoders.submit(output.rows, some)))
        rows: dict[int, dict[int, ShardRow]] = {id(output): {} for output in outputs}
        for output, piece in pieces:
            rows[id(output)] |= piece.result()
        for output, found in zip(outputs, outcomes, strict=True):
            output.add(until, found, rows[id(output)])
